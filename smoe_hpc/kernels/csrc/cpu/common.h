// Sizes, strides, vectors and the ways beyond the edge, shared by the CPU kernels.
//
// Letters: B batch, C input channels, H latitude rows, W longitude columns, P = H W pixels, N experts, K selected, F filters
// per expert, S choices (1, or B where each sample has its own), k taps along one side.
#pragma once
#include <cstdint>
#include <initializer_list>

#include "threads.h"

namespace smoe {

enum Padding : int { ZEROS = 0, PERIODIC_LONGITUDE = 1, SPHERE = 2 };

enum Status : int { DONE = 0, OUT_OF_RANGE = 1, NO_MEMORY = 2 };

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, ACCUMULATORS = 24;  // accumulators that a loop keeps in registers
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32, ACCUMULATORS = 12;
#else
constexpr int VECTOR_BYTES = 16, ACCUMULATORS = 12;
#endif

template <class T>
struct Vectors {
  static constexpr int lanes = VECTOR_BYTES / (int)sizeof(T);
  typedef T Vector __attribute__((vector_size(VECTOR_BYTES)));
  typedef T Anywhere __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(T)), may_alias));
};
template <class T>
using Vector = typename Vectors<T>::Vector;

// Keeps a value in a register: compilers prefer to load it again for every use, and loads are what the loops wait for.
template <class V>
inline void keep(V& value) {
#if defined(__x86_64__)
  asm("" : "+x"(value));
#elif defined(__aarch64__)
  asm("" : "+w"(value));
#endif
}

template <class T>
inline Vector<T> load(const T* from) {
  return *(const typename Vectors<T>::Anywhere*)from;
}
template <class T>
inline void store(T* to, Vector<T> value) {
  *(typename Vectors<T>::Anywhere*)to = value;
}

inline int64_t up_to_multiple(int64_t count, int64_t of) { return (count + of - 1) / of * of; }
inline int64_t ceil_div(int64_t count, int64_t by) { return (count + by - 1) / by; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// A map [B, channels, H, W] anywhere in memory.
template <class T>
struct Map {
  T* data;
  int64_t sample, channel, row, column;  // strides
};

struct Problem {
  int64_t B, C, H, W, N, K, F, k, S;
  int padding, threads;
  const int32_t* filters;  // [S, P, K F]: the filter, 0..N F - 1, that makes each output of a pixel

  int64_t pixels() const { return H * W; }
  int64_t taps() const { return k * k; }
  int64_t outputs() const { return K * F; }
  int64_t reach() const { return k / 2; }
  int64_t samples_of_choice() const { return S == 1 ? B : 1; }

  const int32_t* filters_of(int64_t choice, int64_t pixel) const { return filters + (choice * pixels() + pixel) * outputs(); }

  // Row of the map that lies at row h, which may lie beyond an edge; -1: none. `turn` is how far to the east its columns
  // lie: a row beyond a pole is half a turn away.
  int64_t row_at(int64_t h, int64_t& turn) const {
    turn = 0;
    if (h >= 0 && h < H) return h;
    if (padding != SPHERE) return -1;
    turn = W / 2;
    return h < 0 ? -1 - h : 2 * H - 1 - h;
  }
  // The same for columns.
  int64_t column_at(int64_t w) const {
    if (w >= 0 && w < W) return w;
    if (padding == ZEROS) return -1;
    w %= W;
    return w < 0 ? w + W : w;
  }
  // Pixel that tap (i, j) of output pixel (h, w) sees; -1: none.
  int64_t seen(int64_t h, int64_t w, int64_t i, int64_t j) const {
    int64_t turn;
    const int64_t row = row_at(h + i - reach(), turn);
    const int64_t column = row < 0 ? -1 : column_at(w + j - reach() + turn);
    return column < 0 ? -1 : row * W + column;
  }
  // Calls found(h, turn) for the output rows whose taps of row i see row h_seen.
  template <class Found>
  void rows_that_see(int64_t h_seen, int64_t i, const Found& found) const {
    const int64_t direct = h_seen - (i - reach());
    if (direct >= 0 && direct < H) found(direct, (int64_t)0);
    if (padding != SPHERE) return;
    for (int64_t beyond : {-1 - h_seen, 2 * H - 1 - h_seen}) {
      const int64_t h = beyond - (i - reach());
      if (h >= 0 && h < H) found(h, W / 2);
    }
  }
};

// Whether vectors are to run over the columns of the map (few channels) or over the channels.
inline bool few_channels(const Problem& p) { return p.C <= 4; }

// The two ways; weight and dw are [N F, C, taps], and dx.data or dw may be null.
template <class T>
Status forward_by_columns(const Problem&, Map<const T> x, const T* weight, Map<T> y);
template <class T>
Status backward_by_columns(const Problem&, Map<const T> g, Map<const T> x, const T* weight, Map<T> dx, T* dw);
template <class T>
Status forward_by_channels(const Problem&, Map<const T> x, const T* weight, Map<T> y);
template <class T>
Status backward_by_channels(const Problem&, Map<const T> g, Map<const T> x, const T* weight, Map<T> dx, T* dw);
// g as a panel [P, B, K F].
template <class T>
Status weight_grad_by_channels(const Problem&, const T* g, Map<const T> x, T* dw);

}  // namespace smoe
