// Forward and the gradient to the input, for many channels: each pixel is a small matrix product between the samples'
// values around it and the filters it selected; vectors run over channels.
#include <utility>

#include "panels.h"

namespace smoe {

template <class T>
static T sum(Vector<T> v) {
  T lanes[Vectors<T>::lanes];
  __builtin_memcpy(lanes, &v, sizeof v);
  for (int half = Vectors<T>::lanes / 2; half; half /= 2)
    for (int n = 0; n < half; n++) lanes[n] += lanes[n + half];
  return lanes[0];
}

// -- forward: R samples times M filters, a dot product each ----------------------------------------------------------------

template <class T>
struct Seen {
  const T* values;  // [B, padded] of the pixel that a tap sees
  int64_t tap;      // where the tap's weights are in a filter
};

template <class T, int R, int M>
static void dot_products(const Seen<T>* seen, int64_t count, int64_t b, int64_t padded, const T* const* filters,
                         int64_t blocks, T* out, int64_t outputs) {
  for (int64_t block = 0; block < blocks; block++, filters += M, out += M) {
    Vector<T> sums[R][M] = {};
    for (int64_t n = 0; n < count; n++) {
      const T* x = seen[n].values + b * padded;
      for (int64_t c = 0; c < padded; c += Vectors<T>::lanes) {
        Vector<T> w[M];
#pragma GCC unroll 24
        for (int m = 0; m < M; m++) w[m] = load(filters[m] + seen[n].tap + c), keep(w[m]);
#pragma GCC unroll 24
        for (int r = 0; r < R; r++) {
          Vector<T> v = load(x + r * padded + c);
          keep(v);
#pragma GCC unroll 24
          for (int m = 0; m < M; m++) sums[r][m] += v * w[m];
        }
      }
    }
#pragma GCC unroll 24
    for (int r = 0; r < R; r++)
#pragma GCC unroll 24
      for (int m = 0; m < M; m++) out[(b + r) * outputs + m] = sum<T>(sums[r][m]);
  }
}

constexpr int MOST_ROWS = 4;

constexpr int most_filters(int rows) { return ACCUMULATORS / rows < 12 ? ACCUMULATORS / rows : 12; }

// All filters of a pixel for R samples from `b` on.
template <class T, int R, int... M>
static void pixel_rows(std::integer_sequence<int, M...>, const Blocks& blocks, const Seen<T>* seen, int64_t count, int64_t b,
                       int64_t padded, const T* const* filters, int64_t outputs, T* out) {
  using Function = void (*)(const Seen<T>*, int64_t, int64_t, int64_t, const T* const*, int64_t, T*, int64_t);
  static constexpr Function table[] = {dot_products<T, R, M + 1>...};
  blocks.runs([&](int64_t first, int64_t size, int64_t number) {
    table[size - 1](seen, count, b, padded, filters + first, number, out + first, outputs);
  });
}
template <class T, int R>
static void pixel_rows(const Blocks* blocks, const Seen<T>* seen, int64_t count, int64_t b, int64_t padded,
                       const T* const* filters, int64_t outputs, T* out) {
  pixel_rows<T, R>(std::make_integer_sequence<int, most_filters(R)>(), blocks[R - 1], seen, count, b, padded, filters, outputs,
                   out);
}

template <class T>
Status forward_by_channels(const Problem& p, Map<const T> x, const T* weight, Map<T> y) {
  const int64_t padded = up_to_multiple(p.C, Vectors<T>::lanes), outputs = p.outputs(), taps = p.taps();
  Memory<T> packed(p.N * p.F * taps * padded), panel(p.pixels() * p.B * padded);
  if (!packed.data || !panel.data) return NO_MEMORY;
  if (!pack_weight(p, weight, padded, packed.data) || !gather_map(p, x, p.C, padded, panel.data)) return NO_MEMORY;
  const Strips strips(p, larger(4, smaller(16, 32768 / (p.B * outputs + 1))));
  const Blocks samples(p.samples_of_choice(), MOST_ROWS);
  const Blocks blocks[] = {{outputs, most_filters(1)}, {outputs, most_filters(2)}, {outputs, most_filters(3)},
                           {outputs, most_filters(4)}};  // by the number of samples
  const int64_t filter_size = taps * padded;
  const int64_t out_bytes = up_to_multiple(strips.length * p.B * outputs * sizeof(T), 64);
  const int64_t bytes = out_bytes + taps * sizeof(Seen<T>) + outputs * sizeof(T*);
  const bool ran = parallel(strips.count, p.threads, bytes, [&](int64_t item, char* scratch) {
    T* out = (T*)scratch;
    Seen<T>* seen = (Seen<T>*)(scratch + out_bytes);
    const T** filters = (const T**)(seen + taps);
    const int64_t h = strips.row(item), first = strips.first(item), columns = strips.columns(item);
    for (int64_t column = 0; column < columns; column++) {
      int64_t count = 0;
      for (int64_t tap = 0; tap < taps; tap++) {
        const int64_t pixel = p.seen(h, first + column, tap / p.k, tap % p.k);
        if (pixel >= 0) seen[count++] = {panel.data + pixel * p.B * padded, tap * padded};
      }
      for (int64_t s = 0; s < p.S; s++) {
        const int32_t* chosen = p.filters_of(s, h * p.W + first + column);
        for (int64_t n = 0; n < outputs; n++) filters[n] = packed.data + chosen[n] * filter_size;
        T* pixel_out = out + column * p.B * outputs;
        samples.each([&](int64_t b, int64_t rows) {
          b += s;
          switch (rows) {
            case 1: pixel_rows<T, 1>(blocks, seen, count, b, padded, filters, outputs, pixel_out); break;
            case 2: pixel_rows<T, 2>(blocks, seen, count, b, padded, filters, outputs, pixel_out); break;
            case 3: pixel_rows<T, 3>(blocks, seen, count, b, padded, filters, outputs, pixel_out); break;
            default: pixel_rows<T, 4>(blocks, seen, count, b, padded, filters, outputs, pixel_out);
          }
        });
      }
    }
    scatter_strip(out, h, first, columns, p.B, outputs, outputs, y);
  });
  return ran ? DONE : NO_MEMORY;
}

// -- gradient to the input: R samples times V vectors of channels ----------------------------------------------------------

template <class T>
struct Seeing {
  const T* g;       // [B, outputs] of an output pixel that sees the input pixel
  const T** weights;  // [outputs] of [padded]: what each output weighs the input pixel's channels with
};

template <class T, int R, int V>
static void weighted_sums(const Seeing<T>* seeing, int64_t count, int64_t b, int64_t outputs, int64_t c, T* out,
                          int64_t padded) {
  constexpr int lanes = Vectors<T>::lanes;
  Vector<T> sums[R][V] = {};
  for (int64_t n = 0; n < count; n++) {
    const T* g = seeing[n].g + b * outputs;
    const T* const* weights = seeing[n].weights;
    for (int64_t o = 0; o < outputs; o++) {
      Vector<T> w[V];
#pragma GCC unroll 24
      for (int v = 0; v < V; v++) w[v] = load(weights[o] + c + v * lanes), keep(w[v]);
#pragma GCC unroll 24
      for (int r = 0; r < R; r++)
#pragma GCC unroll 24
        for (int v = 0; v < V; v++) sums[r][v] += w[v] * g[r * outputs + o];
    }
  }
#pragma GCC unroll 24
  for (int r = 0; r < R; r++)
#pragma GCC unroll 24
    for (int v = 0; v < V; v++) store(out + (b + r) * padded + c + v * lanes, sums[r][v]);
}

template <class T, int V, int... R>
static void weighted_sums_of(std::integer_sequence<int, R...>, const Seeing<T>* seeing, int64_t count, int64_t first_sample,
                             int64_t samples, int64_t outputs, int64_t c, T* out, int64_t padded) {
  using Function = void (*)(const Seeing<T>*, int64_t, int64_t, int64_t, int64_t, T*, int64_t);
  static constexpr Function table[] = {weighted_sums<T, R + 1, V>...};
  const Blocks blocks(samples, sizeof...(R));
  blocks.each([&](int64_t b, int64_t rows) {
    table[rows - 1](seeing, count, first_sample + b, outputs, c, out, padded);
  });
}

// All channels of an input pixel, for `samples` samples from `first` on.
template <class T>
static void input_pixel(const Seeing<T>* seeing, int64_t count, int64_t first, int64_t samples, int64_t outputs, T* out,
                        int64_t padded) {
  constexpr int lanes = Vectors<T>::lanes;
  using Few = std::make_integer_sequence<int, ACCUMULATORS / 4>;
  using Many = std::make_integer_sequence<int, ACCUMULATORS / 2>;
  for (int64_t c = 0; c < padded;) {
    const int64_t left = (padded - c) / lanes;
    if (samples <= ACCUMULATORS / 4 && left >= 4) {
      weighted_sums_of<T, 4>(Few(), seeing, count, first, samples, outputs, c, out, padded);
      c += 4 * lanes;
    } else if (left >= 2) {
      weighted_sums_of<T, 2>(Many(), seeing, count, first, samples, outputs, c, out, padded);
      c += 2 * lanes;
    } else {
      weighted_sums_of<T, 1>(Many(), seeing, count, first, samples, outputs, c, out, padded);
      c += lanes;
    }
  }
}

// `panel` is g as [P, B, outputs].
template <class T>
static Status input_grad(const Problem& p, const T* panel, const T* weight, Map<T> dx) {
  const int64_t padded = up_to_multiple(p.C, Vectors<T>::lanes), outputs = p.outputs(), taps = p.taps();
  Memory<T> packed(p.N * p.F * taps * padded);
  if (!packed.data || !pack_weight(p, weight, padded, packed.data)) return NO_MEMORY;
  const Strips strips(p, larger(4, smaller(16, 32768 / (p.B * padded + 1))));
  const int64_t most = 3 * taps;  // output pixels that see one: across both poles too
  const int64_t filter_size = taps * padded, out_bytes = up_to_multiple(strips.length * p.B * padded * sizeof(T), 64);
  const int64_t bytes = out_bytes + most * (sizeof(Seeing<T>) + outputs * sizeof(T*));
  const bool ran = parallel(strips.count, p.threads, bytes, [&](int64_t item, char* scratch) {
    T* out = (T*)scratch;
    Seeing<T>* seeing = (Seeing<T>*)(scratch + out_bytes);
    const T** weights = (const T**)(seeing + most);
    const int64_t h = strips.row(item), first = strips.first(item), columns = strips.columns(item);
    for (int64_t column = 0; column < columns; column++)
      for (int64_t s = 0; s < p.S; s++) {
        int64_t count = 0;
        for (int64_t tap = 0; tap < taps; tap++)
          p.rows_that_see(h, tap / p.k, [&](int64_t row, int64_t turn) {
            const int64_t w = p.column_at(first + column - (tap % p.k - p.reach()) - turn);
            if (w < 0) return;
            const int64_t pixel = row * p.W + w;
            const int32_t* chosen = p.filters_of(s, pixel);
            const T** here = weights + count * outputs;
            for (int64_t n = 0; n < outputs; n++) here[n] = packed.data + chosen[n] * filter_size + tap * padded;
            seeing[count++] = {panel + pixel * p.B * outputs, here};
          });
        input_pixel(seeing, count, s, p.samples_of_choice(), outputs, out + column * p.B * padded, padded);
      }
    scatter_strip(out, h, first, columns, p.B, p.C, padded, dx);
  });
  return ran ? DONE : NO_MEMORY;
}

template <class T>
Status backward_by_channels(const Problem& p, Map<const T> g, Map<const T> x, const T* weight, Map<T> dx, T* dw) {
  Memory<T> panel(p.pixels() * p.B * p.outputs());
  if (!panel.data || !gather_map(p, g, p.outputs(), p.outputs(), panel.data)) return NO_MEMORY;
  Status status = dx.data ? input_grad<T>(p, panel.data, weight, dx) : DONE;
  return status == DONE && dw ? weight_grad_by_channels<T>(p, panel.data, x, dw) : status;
}

template Status forward_by_channels(const Problem&, Map<const float>, const float*, Map<float>);
template Status forward_by_channels(const Problem&, Map<const double>, const double*, Map<double>);
template Status backward_by_channels(const Problem&, Map<const float>, Map<const float>, const float*, Map<float>, float*);
template Status backward_by_channels(const Problem&, Map<const double>, Map<const double>, const double*, Map<double>, double*);

}  // namespace smoe
