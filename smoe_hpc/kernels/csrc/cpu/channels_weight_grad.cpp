// The gradient to the weights, for many channels: every pixel adds the product of its samples' gradients and values to the
// filters it selected. A piece of work is a row of taps and a few channels, whose sums over all filters stay in the cache.
#include <cstring>
#include <utility>

#include "panels.h"

namespace smoe {

constexpr int64_t LEAST_PIECES = 64, LEAST_PIXELS = 256;  // so that many threads have work, and each enough
constexpr int64_t MOST_BYTES = 1 << 28;                   // of partial sums
constexpr int64_t PIXELS_IN_SHORT = 128;  // whose sum is kept apart before it goes into the long sum: less is rounded off

// M filters times V vectors of channels, summed over `samples` samples, added to `sum` [N F, V vectors].
template <class T, int M, int V>
static void add_products(const T* g, int64_t outputs, const T* x, int64_t padded, int64_t samples, T* sum,
                         const int32_t* filters, int64_t blocks) {
  constexpr int lanes = Vectors<T>::lanes;
  for (int64_t block = 0; block < blocks; block++, g += M, filters += M) {
    Vector<T> sums[M][V] = {};
    for (int64_t b = 0; b < samples; b++) {
      Vector<T> v[V];
#pragma GCC unroll 24
      for (int n = 0; n < V; n++) v[n] = load(x + b * padded + n * lanes), keep(v[n]);
#pragma GCC unroll 24
      for (int m = 0; m < M; m++)
#pragma GCC unroll 24
        for (int n = 0; n < V; n++) sums[m][n] += v[n] * g[b * outputs + m];
    }
#pragma GCC unroll 24
    for (int m = 0; m < M; m++) {  // one after the other: two may be the same filter
      T* to = sum + (int64_t)filters[m] * V * lanes;
#pragma GCC unroll 24
      for (int n = 0; n < V; n++) store(to + n * lanes, load(to + n * lanes) + sums[m][n]);
    }
  }
}

template <class T, int V, int... M>
static void add_pixel(std::integer_sequence<int, M...>, const Blocks& blocks, const T* g, int64_t outputs, const T* x,
                      int64_t padded, int64_t samples, T* sum, const int32_t* filters) {
  using Function = void (*)(const T*, int64_t, const T*, int64_t, int64_t, T*, const int32_t*, int64_t);
  static constexpr Function table[] = {add_products<T, M + 1, V>...};
  blocks.runs([&](int64_t first, int64_t size, int64_t number) {
    table[size - 1](g + first, outputs, x, padded, samples, sum, filters + first, number);
  });
}

// `panel` is g as [P, B, outputs].
template <class T>
Status weight_grad_by_channels(const Problem& p, const T* panel, Map<const T> x, T* dw) {
  constexpr int lanes = Vectors<T>::lanes;
  const int64_t vectors = p.C > lanes ? 2 : 1, block = vectors * lanes;
  const int64_t blocks = ceil_div(p.C, block), width = blocks * block;  // of x's panel
  const int64_t outputs = p.outputs(), taps = p.taps(), filters = p.N * p.F, pixels = p.pixels();
  const int64_t slice = filters * block, sums = taps * blocks * slice;  // of a tap and a block; of a part of the pixels
  int64_t parts = smaller(ceil_div(LEAST_PIECES, p.k * blocks), larger(pixels / LEAST_PIXELS, 1));
  parts = larger(1, smaller(parts, MOST_BYTES / (int64_t)(sums * sizeof(double) + 1)));
  const int64_t in_short = larger(PIXELS_IN_SHORT, 4 * filters / outputs);
  const int64_t samples = p.samples_of_choice();
  const Blocks columns(outputs, ACCUMULATORS / vectors);
  Memory<T> values(pixels * p.B * width);
  Memory<double> partial(parts * sums);  // [parts, blocks, taps, filters, block]
  if (!values.data || !partial.data || !gather_map(p, x, p.C, width, values.data)) return NO_MEMORY;

  using One = std::make_integer_sequence<int, ACCUMULATORS>;
  using Two = std::make_integer_sequence<int, ACCUMULATORS / 2>;
  const auto add = [&](int64_t pixel, int64_t from, int64_t channel, T* sum) {
    for (int64_t s = 0; s < p.S; s++) {
      const int32_t* chosen = p.filters_of(s, pixel);
      const T* g = panel + (pixel * p.B + s) * outputs;
      const T* v = values.data + (from * p.B + s) * width + channel;
      if (vectors == 2)
        add_pixel<T, 2>(Two(), columns, g, outputs, v, width, samples, sum, chosen);
      else
        add_pixel<T, 1>(One(), columns, g, outputs, v, width, samples, sum, chosen);
    }
  };
  const bool ran = parallel(parts * blocks * p.k, p.threads, p.k * slice * sizeof(T), [&](int64_t item, char* scratch) {
    T* short_sum = (T*)scratch;  // of the k taps of row i
    double* long_sum = partial.data + item * p.k * slice;
    const int64_t part = item / (p.k * blocks), channel = item / p.k % blocks * block, i = item % p.k;
    const int64_t last = pixels * (part + 1) / parts;
    std::memset(short_sum, 0, p.k * slice * sizeof(T));
    std::memset(long_sum, 0, p.k * slice * sizeof(double));
    int64_t added = 0;
    for (int64_t pixel = pixels * part / parts; pixel < last; pixel++) {
      for (int64_t j = 0; j < p.k; j++) {
        const int64_t from = p.seen(pixel / p.W, pixel % p.W, i, j);
        if (from >= 0) add(pixel, from, channel, short_sum + j * slice);
      }
      if (++added % in_short == 0 || pixel + 1 == last)
        for (int64_t n = 0; n < p.k * slice; n++) long_sum[n] += short_sum[n], short_sum[n] = 0;
    }
  });
  if (!ran) return NO_MEMORY;

  return parallel(filters, p.threads, 0, [&](int64_t filter, char*) {
    for (int64_t tap = 0; tap < taps; tap++)
      for (int64_t first = 0; first < p.C; first += block) {
        const double* from = partial.data + (first / block * taps + tap) * slice + filter * block;
        T* to = dw + (filter * p.C + first) * taps + tap;
        for (int64_t c = 0; c < smaller(block, p.C - first); c++) {
          double total = 0;
          for (int64_t part = 0; part < parts; part++) total += from[part * sums + c];
          to[c * taps] = (T)total;
        }
      }
  }) ? DONE : NO_MEMORY;
}

template Status weight_grad_by_channels(const Problem&, const float*, Map<const float>, float*);
template Status weight_grad_by_channels(const Problem&, const double*, Map<const double>, double*);

}  // namespace smoe
