// The product of a tile's rows with a block of columns, for forward and input gradient: eight warps, each 32 rows x half the
// columns.
#pragma once
#include "portable.cuh"

namespace smoe::portable {

// Sums of a block of 32 GROUPS columns. A stage holds [columns][DEPTH], or, TRANSPOSED, [DEPTH][columns] in blocks of DEPTH
// columns. A bit of `active` stands for 16 of the DEPTH.
template <class T, bool TRANSPOSED, int GROUPS>
struct MatrixProduct {
  float sum[2][2 * GROUPS][4];
  int rows[2];

  __device__ __forceinline__ void start(const Layout& layout) {
    const int lane = lane_number(), first = warp_number() / 2 * 32 + (lane / 8 % 2) * 8 + lane % 8;
    rows[0] = layout.patch_row(first), rows[1] = layout.patch_row(first + 16);
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
      for (int n = 0; n < 2 * GROUPS; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) sum[m][n][i] = 0.f;
  }

  __device__ __forceinline__ void step(const char* patch, int shift, const char* stage, uint32_t active) {
    constexpr int SIXTEENS = DEPTH<T> / 16;
    const uint32_t a_base = shared_address(patch), b_base = shared_address(stage);
    if (active == (1u << SIXTEENS) - 1) {
#pragma unroll
      for (int k = 0; k < SIXTEENS; k++) sixteen(a_base, shift, b_base, k);
    } else {
#pragma unroll 1
      for (int k = 0; k < SIXTEENS; k++)
        if (active >> k & 1) sixteen(a_base, shift, b_base, k);
    }
  }

  __device__ __forceinline__ void sixteen(uint32_t a_base, int shift, uint32_t b_base, int k) {
    const int lane = lane_number(), side = warp_number() % 2;
    uint32_t a[2][4];
    load_matrices(a[0], a_base + place(rows[0] + shift, 2 * k + lane / 16));
    load_matrices(a[1], a_base + place(rows[1] + shift, 2 * k + lane / 16));
#pragma unroll
    for (int n = 0; n < GROUPS; n++) {
      uint32_t b[4];
      if (TRANSPOSED) {
        const int piece = (side * GROUPS + n) * 2 + lane / 16;
        load_matrices_transposed(b, b_base + piece / 8 * (DEPTH<T> * ROW) + place(k * 16 + lane % 16, piece % 8));
      } else {
        const int column = (side * GROUPS + n) * 16 + lane / 16 * 8 + lane % 8;
        load_matrices(b, b_base + place(column, 2 * k + lane / 8 % 2));
      }
#pragma unroll
      for (int m = 0; m < 2; m++) {
        matrix_product(sum[m][2 * n], a[m], b[0], b[1], T());
        matrix_product(sum[m][2 * n + 1], a[m], b[2], b[3], T());
      }
    }
  }

  __device__ __forceinline__ void end_patch() {}

  // Into [TILE_ROWS] rows of `pitch` bytes.
  __device__ __forceinline__ void write(char* to, int pitch) const {
    const int row = warp_number() / 2 * 32 + lane_number() / 4;
    char* at = to + row * pitch + (warp_number() % 2 * GROUPS * 16 + lane_number() % 4 * 2) * (int)sizeof(T);
    using Two = decltype(two(0.f, 0.f, T()));
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
      for (int n = 0; n < 2 * GROUPS; n++) {
        *reinterpret_cast<Two*>(at + m * 16 * pitch + n * 16) = two(sum[m][n][0], sum[m][n][1], T());
        *reinterpret_cast<Two*>(at + (m * 16 + 8) * pitch + n * 16) = two(sum[m][n][2], sum[m][n][3], T());
      }
  }
};

// The same in float32: 8 rows x 2 GROUPS columns a thread, 4 x 8 threads a warp. A LONG sum is made of those of the patches:
// one chain of so many additions would lose a digit.
template <bool TRANSPOSED, int GROUPS, bool LONG>
struct ScalarProduct {
  float sum[8][2 * GROUPS], total[LONG ? 8 : 1][2 * GROUPS];
  int rows[4];

  // So that eight neighbouring lanes, which shared memory serves together, ask for few different pieces on both sides.
  static __device__ __forceinline__ int lane_row() { return lane_number() / 2 % 4; }
  static __device__ __forceinline__ int lane_column() { return lane_number() / 8 * 2 + lane_number() % 2; }

  __device__ __forceinline__ void start(const Layout& layout) {
#pragma unroll
    for (int i = 0; i < 4; i++) rows[i] = layout.patch_row(warp_number() / 2 * 32 + 8 * i) + lane_row();
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
      for (int j = 0; j < 2 * GROUPS; j++) {
        sum[i][j] = 0.f;
        if (LONG) total[i % (LONG ? 8 : 1)][j] = 0.f;
      }
  }

  // Columns 8 apart, or, TRANSPOSED, fours of neighbours 32 apart.
  static __device__ __forceinline__ int row_of(int i) { return warp_number() / 2 * 32 + i * 4 + lane_row(); }
  static __device__ __forceinline__ int column_of(int j) {
    return warp_number() % 2 * GROUPS * 16 + (TRANSPOSED ? (lane_column() + j / 4 * 8) * 4 + j % 4 : lane_column() + 8 * j);
  }

  __device__ __forceinline__ void step(const char* patch, int shift, const char* stage, uint32_t active) {
    const int column = lane_column(), side = warp_number() % 2;
#pragma unroll 1
    for (int quad = 0; quad < DEPTH<float> / 4; quad++) {
      if (!(active >> (quad / 4) & 1)) continue;
      float4 a[8];
#pragma unroll
      for (int i = 0; i < 8; i++) a[i] = load4(patch + place(rows[i / 2] + shift + i % 2 * 4, quad));
      if (TRANSPOSED) {
#pragma unroll
        for (int k = 0; k < 4; k++)
#pragma unroll
          for (int j = 0; j < GROUPS / 2; j++) {
            const int piece = side * GROUPS * 4 + j * 8 + column;
            const float4 b = load4(stage + piece / 8 * (DEPTH<float> * ROW) + place(quad * 4 + k, piece % 8));
#pragma unroll
            for (int i = 0; i < 8; i++) {
              const float left = reinterpret_cast<const float*>(&a[i])[k];
              sum[i][4 * j] = fmaf(left, b.x, sum[i][4 * j]), sum[i][4 * j + 1] = fmaf(left, b.y, sum[i][4 * j + 1]);
              sum[i][4 * j + 2] = fmaf(left, b.z, sum[i][4 * j + 2]), sum[i][4 * j + 3] = fmaf(left, b.w, sum[i][4 * j + 3]);
            }
          }
      } else {
#pragma unroll
        for (int j = 0; j < 2 * GROUPS; j++) {
          const float4 b = load4(stage + place(side * GROUPS * 16 + 8 * j + column, quad));
#pragma unroll
          for (int i = 0; i < 8; i++) {
            sum[i][j] = fmaf(a[i].x, b.x, sum[i][j]), sum[i][j] = fmaf(a[i].y, b.y, sum[i][j]);
            sum[i][j] = fmaf(a[i].z, b.z, sum[i][j]), sum[i][j] = fmaf(a[i].w, b.w, sum[i][j]);
          }
        }
      }
    }
  }

  __device__ __forceinline__ void end_patch() {
    if constexpr (LONG) {
#pragma unroll
      for (int i = 0; i < 8; i++)
#pragma unroll
        for (int j = 0; j < 2 * GROUPS; j++) total[i][j] += sum[i][j], sum[i][j] = 0.f;
    }
  }

  __device__ __forceinline__ void write(char* to, int pitch) const {
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
      for (int j = 0; j < 2 * GROUPS; j++) {
        float number = sum[i][j];
        if constexpr (LONG) number = total[i][j];
        *reinterpret_cast<float*>(to + row_of(i) * pitch + column_of(j) * 4) = number;
      }
  }
};

constexpr int LONG_SUM = 1536;  // additions

template <class T, bool TRANSPOSED, int GROUPS, bool LONG>
using Product =
    std::conditional_t<std::is_same_v<T, float>, ScalarProduct<TRANSPOSED, GROUPS, LONG>, MatrixProduct<T, TRANSPOSED, GROUPS>>;

// A kernel of this type and length for two CTAs a processor, or one where the sums leave no room.
template <class T, bool LONG>
constexpr int CTAS = LONG && std::is_same_v<T, float> ? 1 : 2;

// The sums of all patches and taps. A source has `patches` in depth and gives, for each,
//   prepare(patch)               what its stages need to know (may synchronise)
//   fill(to, raw, patch, row, rows)   the patch for taps of `rows` rows from `row` on; a stage's room at `raw` where it EXPANDS
//   load(to, patch, shift)       the stage of a tap: the tap that reads the patch at `shift` = row of taps * ksize + column
//   active(patch, shift)         which 16s of the DEPTH are not zero
template <class Product, class Source>
__device__ void multiply(Product& product, Source& source, char* shared, const Layout& layout, int ksize) {
  char *patch_rows = shared + TABLES, *stages = shared + layout.staging;
  for (int patch = 0; patch < source.patches; patch++)
    for (int row = 0; row < ksize; row += layout.band) {
      const int rows = min(layout.band, ksize - row), first = row * ksize, last = (row + rows) * ksize;
      __syncthreads();  // everyone is done with what lies in shared memory
      source.prepare(patch);
      source.load(stages, patch, first);
      source.fill(patch_rows, stages + STAGE, patch, row, rows);
      commit_copies();
      if (Source::EXPANDS) __syncthreads();  // the second stage was in use
      if (layout.stages == 3) {
        if (first + 1 < last) source.load(stages + STAGE, patch, first + 1);
        commit_copies();
      }
      int now = 0, next = layout.stages - 1, moved = 0, column = 0;
      for (int shift = first; shift < last; shift++) {
        if (layout.stages == 3)
          wait_copies<1>();
        else
          wait_copies<0>();
        __syncthreads();
        if (shift + layout.stages - 1 < last) source.load(stages + next * STAGE, patch, shift + layout.stages - 1);
        commit_copies();
        product.step(patch_rows, moved << layout.log_batch, stages + now * STAGE, source.active(patch, shift));
        now = now + 1 == layout.stages ? 0 : now + 1, next = next + 1 == layout.stages ? 0 : next + 1;
        moved++;
        if (++column == ksize) column = 0, moved += layout.width() - ksize;
      }
      product.end_patch();
    }
  __syncthreads();
}

}  // namespace smoe::portable
