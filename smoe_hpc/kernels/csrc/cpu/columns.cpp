// The three operations for few channels: vectors run over the columns of the map. A tap is a row of the input, shifted, times
// a row of weights, gathered from what each pixel of the row selected; the samples share the gathered weights.
#include <cstring>
#include <utility>

#include "panels.h"

namespace smoe {

constexpr int TOGETHER = 8;    // samples whose sums are kept in registers at once
constexpr int64_t PARTS = 16;  // of the rows, whose weight gradients are summed apart

// A map's rows with what lies beyond their ends: [rows, B, channels, width]. `reach` columns lie before the first one, and
// the end is filled up to whole vectors.
template <class T>
struct Rows {
  int64_t channels, whole, width, sample, row;  // vectors' worth of columns, and with the ends; strides
  Memory<T> memory;
  Rows(const Problem& p, int64_t rows, int64_t count)
      : channels(count),
        whole(up_to_multiple(p.W, Vectors<T>::lanes)),
        width(whole + 2 * p.reach()),
        sample(channels * width),
        row(p.B * sample),
        memory(rows * row) {}
  T* at(int64_t number) const { return memory.data + number * row; }

  // Row `number` becomes row h of the map, its columns turned by `turn`; h -1 is an empty row.
  void fill(const Problem& p, int64_t number, const Map<const T>& map, int64_t h, int64_t turn) const {
    T* to = at(number);
    if (h < 0) {
      std::memset(to, 0, row * sizeof(T));
      return;
    }
    for (int64_t b = 0; b < p.B; b++)
      for (int64_t c = 0; c < channels; c++, to += width)
        fill_row(p, map.data + b * map.sample + c * map.channel + h * map.row, map.column, turn, to + p.reach());
  }

 private:
  void fill_row(const Problem& p, const T* from, int64_t stride, int64_t turn, T* to) const {
    const int64_t reach = p.reach();
    if (stride == 1 && turn == 0)
      std::memcpy(to, from, p.W * sizeof(T));
    else
      for (int64_t w = 0; w < p.W; w++) to[w] = from[(w + turn < p.W ? w + turn : w + turn - p.W) * stride];
    for (int64_t w = p.W; w < width - reach; w++) to[w] = 0;
    for (int64_t w = 1; w <= reach; w++) to[-w] = 0;
    if (p.padding != ZEROS)
      for (int64_t w = 0; w < reach; w++) to[-1 - w] = to[p.W - 1 - w], to[p.W + w] = to[w];
  }
};

// Weights by place in the filter, [C taps, N F + 1]; the last filter is empty.
template <class T>
struct Table {
  int64_t filters, places;
  Memory<T> memory;
  Table(const Problem& p, const T* weight)
      : filters(p.N * p.F), places(p.C * p.taps()), memory(places * (filters + 1)) {
    if (!memory.data) return;
    for (int64_t place = 0; place < places; place++) {
      T* to = memory.data + place * (filters + 1);
      for (int64_t filter = 0; filter < filters; filter++) to[filter] = weight[filter * places + place];
      to[filters] = 0;
    }
  }
  // to[w] = the weight that filter chosen[w] has at this place.
  void look_up(int64_t place, const int32_t* chosen, int64_t count, T* to) const {
    const T* from = memory.data + place * (filters + 1);
    for (int64_t w = 0; w < count; w++) to[w] = from[chosen[w]];
  }
};

// out[r, w] = sum over taps of rows[at[n] + r sample + w] * weights[n, w], for R samples.
template <class T, int R>
static void weighted_rows(const T* rows, int64_t sample, const int64_t* at, const T* weights, int64_t taps, int64_t width,
                          T* out) {
  for (int64_t w = 0; w < width; w += Vectors<T>::lanes) {
    Vector<T> sums[R] = {};
    for (int64_t n = 0; n < taps; n++) {
      Vector<T> weight = load(weights + n * width + w);
      keep(weight);
      const T* row = rows + at[n] + w;
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) sums[r] += load(row + r * sample) * weight;
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) store(out + r * width + w, sums[r]);
  }
}

// sums[n, w] += sum over R samples of g[r g_sample + w] * rows[at[n] + r sample + w].
template <class T, int R>
static void add_products(const T* rows, int64_t sample, const int64_t* at, int64_t taps, const T* g, int64_t g_sample,
                         int64_t width, T* sums) {
  for (int64_t w = 0; w < width; w += Vectors<T>::lanes) {
    Vector<T> gradient[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) gradient[r] = load(g + r * g_sample + w), keep(gradient[r]);
    for (int64_t n = 0; n < taps; n++) {
      Vector<T> sum = load(sums + n * width + w);
      const T* row = rows + at[n] + w;
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) sum += load(row + r * sample) * gradient[r];
      store(sums + n * width + w, sum);
    }
  }
}

// `weighted_rows` for all samples, into one row and channel of a map; `to` is the first sample's.
template <class T, int... R>
static void weighted_map_row(std::integer_sequence<int, R...>, const Problem& p, const T* rows, int64_t sample, int64_t width,
                             const int64_t* at, const T* weights, int64_t taps, T* out, T* to, const Map<T>& map) {
  using Function = void (*)(const T*, int64_t, const int64_t*, const T*, int64_t, int64_t, T*);
  static constexpr Function table[] = {weighted_rows<T, R + 1>...};
  const Blocks samples(p.samples_of_choice(), sizeof...(R));
  samples.each([&](int64_t b, int64_t count) {
    table[count - 1](rows + b * sample, sample, at, weights, taps, width, out);
    for (int64_t r = 0; r < count; r++) {
      T* target = to + (b + r) * map.sample;
      if (map.column == 1)
        std::memcpy(target, out + r * width, p.W * sizeof(T));
      else
        for (int64_t w = 0; w < p.W; w++) target[w * map.column] = out[r * width + w];
    }
  });
}

template <class T, int... R>
static void add_all_products(std::integer_sequence<int, R...>, const Problem& p, const T* rows, int64_t sample,
                             const int64_t* at, int64_t taps, const T* g, int64_t g_sample, int64_t width, T* sums) {
  using Function = void (*)(const T*, int64_t, const int64_t*, int64_t, const T*, int64_t, int64_t, T*);
  static constexpr Function table[] = {add_products<T, R + 1>...};
  const Blocks samples(p.samples_of_choice(), sizeof...(R));
  samples.each([&](int64_t b, int64_t count) {
    table[count - 1](rows + b * sample, sample, at, taps, g + b * g_sample, g_sample, width, sums);
  });
}

using Together = std::make_integer_sequence<int, TOGETHER>;

// Where the taps of an output row see, from the first of its k input rows on; in the order of a filter's weights.
template <class T>
static void tap_places(const Problem& p, const Rows<T>& rows, int64_t* at) {
  for (int64_t n = 0; n < p.C * p.taps(); n++) at[n] = n / p.k % p.k * rows.row + n / p.taps() * rows.width + n % p.k;
}

// x as rows -reach..H+reach-1.
template <class T>
static bool fill_input(const Problem& p, const Map<const T>& x, const Rows<T>& rows) {
  return rows.memory.data && parallel(p.H + 2 * p.reach(), p.threads, 0, [&](int64_t item, char*) {
           int64_t turn;
           const int64_t h = p.row_at(item - p.reach(), turn);
           rows.fill(p, item, x, h, turn);
         });
}

template <class T>
Status forward_by_columns(const Problem& p, Map<const T> x, const T* weight, Map<T> y) {
  const Rows<T> rows(p, p.H + 2 * p.reach(), p.C);
  const Table<T> table(p, weight);
  if (!table.memory.data || !fill_input(p, x, rows)) return NO_MEMORY;
  const int64_t width = rows.whole, places = table.places, outputs = p.outputs();
  const int64_t weight_bytes = up_to_multiple((places + TOGETHER) * width * sizeof(T), 64);
  const int64_t bytes = weight_bytes + places * sizeof(int64_t) + p.W * sizeof(int32_t);
  const bool ran = parallel(p.S * p.H, p.threads, bytes, [&](int64_t item, char* scratch) {
    T *weights = (T*)scratch, *out = weights + places * width;
    int64_t* at = (int64_t*)(scratch + weight_bytes);
    int32_t* chosen = (int32_t*)(at + places);
    const int64_t s = item / p.H, h = item % p.H;
    tap_places(p, rows, at);
    std::memset(weights, 0, places * width * sizeof(T));
    for (int64_t o = 0; o < outputs; o++) {
      for (int64_t w = 0; w < p.W; w++) chosen[w] = p.filters_of(s, h * p.W + w)[o];
      for (int64_t place = 0; place < places; place++) table.look_up(place, chosen, p.W, weights + place * width);
      weighted_map_row(Together(), p, rows.at(h) + s * rows.sample, rows.sample, width, at, weights, places, out,
                       y.data + s * y.sample + o * y.channel + h * y.row, y);
    }
  });
  return ran ? DONE : NO_MEMORY;
}

// -- backward: g as rows 0..H-1 and, for those that see across a pole, the same rows turned as rows H..2H-1 ------------------

template <class T>
static bool fill_gradient(const Problem& p, const Map<const T>& g, const Rows<T>& rows) {
  return rows.memory.data && parallel(p.H, p.threads, 0, [&](int64_t h, char*) {
           rows.fill(p, h, g, h, 0);
           if (p.padding == SPHERE && (h < p.reach() || h >= p.H - p.reach())) rows.fill(p, p.H + h, g, h, p.W / 2);
         });
}

// An input row is seen by output rows as an output row sees input rows, so the gradient to the input is the same sum, over
// rows of g and the weights that the pixels there selected.
template <class T>
static Status input_grad(const Problem& p, const Rows<T>& rows, const T* weight, const Map<T>& dx) {
  const Table<T> table(p, weight);
  if (!table.memory.data) return NO_MEMORY;
  const int64_t outputs = p.outputs(), width = rows.whole, reach = p.reach(), most_rows = 3 * p.k;
  const int64_t most = most_rows * p.k * outputs;
  const int64_t weight_bytes = up_to_multiple((most + TOGETHER) * width * sizeof(T), 64), filters = p.W + 2 * reach;
  const int64_t row_bytes = 2 * sizeof(int64_t) + outputs * filters * sizeof(int32_t);
  const int64_t bytes = weight_bytes + most * sizeof(int64_t) + most_rows * row_bytes;
  const bool ran = parallel(p.S * p.H, p.threads, bytes, [&](int64_t item, char* scratch) {
    T *weights = (T*)scratch, *out = weights + most * width;
    int64_t *at = (int64_t*)(scratch + weight_bytes), *row_of_taps = at + most, *number = row_of_taps + most_rows;
    int32_t* chosen = (int32_t*)(number + most_rows);  // [rows, outputs, W + 2 reach], as the rows of g lie
    const int64_t s = item / p.H, h = item % p.H;
    int64_t seeing = 0;
    for (int64_t i = 0; i < p.k; i++)
      p.rows_that_see(h, i, [&](int64_t row, int64_t turn) {
        row_of_taps[seeing] = i;
        number[seeing] = turn ? p.H + row : row;
        for (int64_t w = 0; w < filters; w++) {
          const int64_t column = p.column_at(w - reach + turn);
          const int32_t* here = column < 0 ? nullptr : p.filters_of(s, row * p.W + column);
          for (int64_t o = 0; o < outputs; o++)
            chosen[(seeing * outputs + o) * filters + w] = here ? here[o] : (int32_t)table.filters;
        }
        seeing++;
      });
    std::memset(weights, 0, seeing * p.k * outputs * width * sizeof(T));
    for (int64_t c = 0; c < p.C; c++) {
      int64_t count = 0;
      for (int64_t n = 0; n < seeing; n++)
        for (int64_t j = 0; j < p.k; j++)
          for (int64_t o = 0; o < outputs; o++, count++) {
            at[count] = number[n] * rows.row + o * rows.width + 2 * reach - j;
            table.look_up(c * p.taps() + row_of_taps[n] * p.k + j, chosen + (n * outputs + o) * filters + 2 * reach - j, p.W,
                          weights + count * width);
          }
      weighted_map_row(Together(), p, rows.at(0) + s * rows.sample, rows.sample, width, at, weights, count, out,
                       dx.data + s * dx.sample + c * dx.channel + h * dx.row, dx);
    }
  });
  return ran ? DONE : NO_MEMORY;
}

template <class T>
static Status weight_grad(const Problem& p, const Rows<T>& g, const Map<const T>& x, T* dw) {
  const Rows<T> rows(p, p.H + 2 * p.reach(), p.C);
  const int64_t places = p.C * p.taps(), width = rows.whole, outputs = p.outputs();
  const int64_t parts = smaller(PARTS, p.H), size = p.N * p.F * places;
  Memory<double> partial(parts * size);
  if (!partial.data || !fill_input(p, x, rows)) return NO_MEMORY;
  const int64_t sum_bytes = up_to_multiple(places * width * sizeof(T), 64);
  const bool ran = parallel(parts, p.threads, sum_bytes + places * sizeof(int64_t), [&](int64_t part, char* scratch) {
    T* sums = (T*)scratch;
    int64_t* at = (int64_t*)(scratch + sum_bytes);
    double* total = partial.data + part * size;
    std::memset(total, 0, size * sizeof(double));
    tap_places(p, rows, at);
    for (int64_t h = p.H * part / parts; h < p.H * (part + 1) / parts; h++)
      for (int64_t s = 0; s < p.S; s++)
        for (int64_t o = 0; o < outputs; o++) {
          std::memset(sums, 0, places * width * sizeof(T));
          add_all_products(Together(), p, rows.at(h) + s * rows.sample, rows.sample, at, places,
                           g.at(h) + s * g.sample + o * g.width + p.reach(), g.sample, width, sums);
          for (int64_t w = 0; w < p.W; w++) {
            double* to = total + p.filters_of(s, h * p.W + w)[o] * places;
            for (int64_t n = 0; n < places; n++) to[n] += sums[n * width + w];
          }
        }
  });
  if (!ran) return NO_MEMORY;
  for (int64_t n = 0; n < size; n++) {
    double sum = 0;
    for (int64_t part = 0; part < parts; part++) sum += partial.data[part * size + n];
    dw[n] = (T)sum;
  }
  return DONE;
}

template <class T>
Status backward_by_columns(const Problem& p, Map<const T> g, Map<const T> x, const T* weight, Map<T> dx, T* dw) {
  const Rows<T> rows(p, p.padding == SPHERE ? 2 * p.H : p.H, p.outputs());
  if (!fill_gradient(p, g, rows)) return NO_MEMORY;
  const Status status = dx.data ? input_grad<T>(p, rows, weight, dx) : DONE;
  return status == DONE && dw ? weight_grad<T>(p, rows, x, dw) : status;
}

template Status forward_by_columns(const Problem&, Map<const float>, const float*, Map<float>);
template Status forward_by_columns(const Problem&, Map<const double>, const double*, Map<double>);
template Status backward_by_columns(const Problem&, Map<const float>, Map<const float>, const float*, Map<float>, float*);
template Status backward_by_columns(const Problem&, Map<const double>, Map<const double>, const double*, Map<double>, double*);

}  // namespace smoe
