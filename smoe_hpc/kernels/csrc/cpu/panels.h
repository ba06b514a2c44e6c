// Maps as panels [P, B, channels]: what a pixel's matrix product reads lies together, and channels fill vectors.
#pragma once
#include <type_traits>
#include <utility>

#include "common.h"

namespace smoe {

// A map's rows cut into strips of at most `length` columns.
struct Strips {
  int64_t height, width, length, per_row, count;
  Strips(const Problem& p, int64_t most)
      : height(p.H), width(p.W), length(smaller(most, p.W)), per_row(ceil_div(p.W, length)), count(p.H * per_row) {}
  int64_t row(int64_t item) const { return item / per_row; }
  int64_t first(int64_t item) const { return item % per_row * length; }
  int64_t columns(int64_t item) const { return smaller(length, width - first(item)); }
};

// Lane by lane from two vectors in turn: the lower halves of both, or the upper.
template <class T, int FIRST, int... LANE>
inline Vector<T> zip(Vector<T> a, Vector<T> b, std::integer_sequence<int, LANE...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (FIRST + LANE / 2 + LANE % 2 * (int)sizeof...(LANE))...);
#else
  using Whole = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef Whole Lanes __attribute__((vector_size(VECTOR_BYTES)));
  return __builtin_shuffle(a, b, Lanes{(FIRST + LANE / 2 + LANE % 2 * (int)sizeof...(LANE))...});
#endif
}

// to[j][i] = from[i][j] for a square of as many numbers a side as a vector has.
template <class T>
inline void transpose_square(const T* from, int64_t from_row, T* to, int64_t to_row) {
  constexpr int n = Vectors<T>::lanes;
  using Lanes = std::make_integer_sequence<int, n>;
  Vector<T> v[n], next[n];
#pragma GCC unroll 16
  for (int i = 0; i < n; i++) v[i] = load(from + i * from_row);
#pragma GCC unroll 4
  for (int done = 1; done < n; done *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < n / 2; i++) {
      next[2 * i] = zip<T, 0>(v[i], v[i + n / 2], Lanes());
      next[2 * i + 1] = zip<T, n / 2>(v[i], v[i + n / 2], Lanes());
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; i++) v[i] = next[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < n; i++) store(to + i * to_row, v[i]);
}

// to[j to_row + i] = from[i from_row + j] for i below `rows` and j below `columns`.
template <class T>
void transpose(const T* from, int64_t from_row, int64_t rows, int64_t columns, T* to, int64_t to_row) {
  constexpr int n = Vectors<T>::lanes;
  const int64_t whole_rows = rows / n * n, whole_columns = columns / n * n;
  for (int64_t i = 0; i < whole_rows; i += n) {
    for (int64_t j = 0; j < whole_columns; j += n)
      transpose_square(from + i * from_row + j, from_row, to + j * to_row + i, to_row);
    for (int64_t r = i; r < i + n; r++)
      for (int64_t j = whole_columns; j < columns; j++) to[j * to_row + r] = from[r * from_row + j];
  }
  for (int64_t i = whole_rows; i < rows; i++)
    for (int64_t j = 0; j < columns; j++) to[j * to_row + i] = from[i * from_row + j];
}

// Columns of one row, from a map to a panel [columns, B, padded] (zeros behind the channels) and from a panel to a map.
template <class T>
void gather_strip(const Map<const T>& map, int64_t row, int64_t first, int64_t columns, int64_t B, int64_t channels,
                  int64_t padded, T* panel) {
  for (int64_t b = 0; b < B; b++) {
    const T* from = map.data + b * map.sample + row * map.row + first * map.column;
    T* to = panel + b * padded;
    if (map.column == 1) {
      transpose(from, map.channel, channels, columns, to, B * padded);
    } else {
      for (int64_t w = 0; w < columns; w++)
        for (int64_t c = 0; c < channels; c++) to[w * B * padded + c] = from[c * map.channel + w * map.column];
    }
    for (int64_t w = 0; w < columns; w++)
      for (int64_t c = channels; c < padded; c++) to[w * B * padded + c] = 0;
  }
}

template <class T>
void scatter_strip(const T* panel, int64_t row, int64_t first, int64_t columns, int64_t B, int64_t channels, int64_t padded,
                   const Map<T>& map) {
  for (int64_t b = 0; b < B; b++) {
    T* to = map.data + b * map.sample + row * map.row + first * map.column;
    const T* from = panel + b * padded;
    if (map.column == 1) {
      transpose(from, B * padded, columns, channels, to, map.channel);
    } else {
      for (int64_t w = 0; w < columns; w++)
        for (int64_t c = 0; c < channels; c++) to[c * map.channel + w * map.column] = from[w * B * padded + c];
    }
  }
}

template <class T>
bool gather_map(const Problem& p, const Map<const T>& map, int64_t channels, int64_t padded, T* panel) {
  const Strips strips(p, 64);
  return parallel(strips.count, p.threads, 0, [&](int64_t item, char*) {
    const int64_t row = strips.row(item), first = strips.first(item);
    gather_strip(map, row, first, strips.columns(item), p.B, channels, padded, panel + (row * p.W + first) * p.B * padded);
  });
}

// [N F, C, taps] to [N F, taps, padded].
template <class T>
bool pack_weight(const Problem& p, const T* weight, int64_t padded, T* packed) {
  return parallel(p.N * p.F, p.threads, 0, [&](int64_t row, char*) {
    const T* from = weight + row * p.C * p.taps();
    T* to = packed + row * p.taps() * padded;
    for (int64_t tap = 0; tap < p.taps(); tap++)
      for (int64_t c = 0; c < padded; c++) to[tap * padded + c] = c < p.C ? from[c * p.taps() + tap] : 0;
  });
}

// `count` things in as few blocks as `most` of them in a block allow, all about equally large.
struct Blocks {
  int64_t count, size, larger;  // `larger` of the blocks have one more than `size`
  Blocks(int64_t things, int64_t most)
      : count(ceil_div(things, most)), size(things / (count ? count : 1)), larger(things - size * count) {}
  // each_block(first, size) for every block.
  template <class Each>
  void each(const Each& each_block) const {
    int64_t first = 0;
    for (int64_t n = 0; n < count; n++) {
      const int64_t here = size + (n < larger);
      each_block(first, here);
      first += here;
    }
  }
  // each_run(first, size, number) for the blocks of each size, which follow each other.
  template <class Each>
  void runs(const Each& each_run) const {
    if (larger) each_run((int64_t)0, size + 1, larger);
    if (size && count > larger) each_run(larger * (size + 1), size, count - larger);
  }
};

}  // namespace smoe
