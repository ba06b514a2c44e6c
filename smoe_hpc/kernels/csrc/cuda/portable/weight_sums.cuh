// Sums of a weight gradient's block in registers: 128 columns x a row of channels for each of a few neighbouring taps.
#pragma once
#include "portable.cuh"

namespace smoe::portable {

// Sums of 128 columns x DEPTH channels for each of TAPS taps: eight warps, of 32 columns x 32 channels each.
template <class T, int TAPS>
struct MatrixSums {
  float sum[TAPS][2][4][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < TAPS * 32; i++) (&sum[0][0][0][0])[i] = 0.f;
  }

  // `active`: a bit for each 16 columns.
  __device__ __forceinline__ void add(const char* x, const char* g, const Layout& layout, uint32_t active) {
    const int lane = lane_number(), rows = warp_number() / 2, side = warp_number() % 2;
    const uint32_t x_base = shared_address(x), g_base = shared_address(g);
    if (!(active >> (rows * 2) & 3)) return;
#pragma unroll 1
    for (int k = 0; k < TILE_ROWS / 16; k++) {
      uint32_t a[2][4];
      const int g_row = k * 16 + lane / 16 * 8 + lane % 8, x_row = layout.patch_row(k * 16 + lane % 16);
#pragma unroll
      for (int m = 0; m < 2; m++) {
        const int piece = rows * 4 + m * 2 + lane / 8 % 2;
        load_matrices_transposed(a[m], g_base + piece / 8 * (TILE_ROWS * ROW) + place(g_row, piece % 8));
      }
#pragma unroll
      for (int tap = 0; tap < TAPS; tap++)
#pragma unroll
        for (int n = 0; n < 2; n++) {
          uint32_t b[4];
          load_matrices_transposed(b, x_base + place(x_row + (tap << layout.log_batch), side * 4 + n * 2 + lane / 16));
#pragma unroll
          for (int m = 0; m < 2; m++) {
            matrix_product(sum[tap][m][2 * n], a[m], b[0], b[1], T());
            matrix_product(sum[tap][m][2 * n + 1], a[m], b[2], b[3], T());
          }
        }
    }
  }

  // f(tap, column, channel, sums of four neighbouring channels). Of four lanes with two channels each of two columns, every
  // second one takes four channels of the first column, the others of the second.
  template <class F>
  __device__ __forceinline__ void each(const F& f) const {
    const int lane = lane_number(), rows = warp_number() / 2, side = warp_number() % 2;
    const bool second = lane & 1;
#pragma unroll
    for (int tap = 0; tap < TAPS; tap++)
#pragma unroll
      for (int m = 0; m < 2; m++)
#pragma unroll
        for (int n = 0; n < 4; n++) {
          const float* own = sum[tap][m][n];
          const float x = __shfl_xor_sync(~0u, second ? own[0] : own[2], 1);
          const float y = __shfl_xor_sync(~0u, second ? own[1] : own[3], 1);
          const float4 four = second ? float4{x, y, own[2], own[3]} : float4{own[0], own[1], x, y};
          f(tap, rows * 32 + m * 16 + (second ? 8 : 0) + lane / 4, side * 32 + n * 8 + lane % 4 / 2 * 4, four);
        }
  }
};

// The same in float32: 16 columns x 32 channels a warp, 4 x 4 a thread.
template <int TAPS>
struct ScalarSums {
  float sum[TAPS][4][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < TAPS * 16; i++) (&sum[0][0][0])[i] = 0.f;
  }

  __device__ __forceinline__ void add(const char* x, const char* g, const Layout& layout, uint32_t active) {
    if (!(active >> warp_number() & 1)) return;
    const int lane = lane_number() / 8 * 2 + lane_number() % 2, piece = warp_number() * 4 + lane_number() / 2 % 4;
    const char* own = g + piece / 8 * (TILE_ROWS * ROW);
#pragma unroll 1
    for (int eight = 0; eight < TILE_ROWS; eight += 8) {
      const int x_row = layout.patch_row(eight);
#pragma unroll
      for (int row = 0; row < 8; row++) {
        const float4 a = load4(own + place(eight + row, piece % 8));
#pragma unroll
        for (int tap = 0; tap < TAPS; tap++) {
          const float4 b = load4(x + place(x_row + row + (tap << layout.log_batch), lane));
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const float left = reinterpret_cast<const float*>(&a)[i];
            sum[tap][i][0] = fmaf(left, b.x, sum[tap][i][0]), sum[tap][i][1] = fmaf(left, b.y, sum[tap][i][1]);
            sum[tap][i][2] = fmaf(left, b.z, sum[tap][i][2]), sum[tap][i][3] = fmaf(left, b.w, sum[tap][i][3]);
          }
        }
      }
    }
  }

  template <class F>
  __device__ __forceinline__ void each(const F& f) const {
    const int column = warp_number() * 16 + lane_number() / 2 % 4 * 4;
    const int channel = (lane_number() / 8 * 2 + lane_number() % 2) * 4;
#pragma unroll
    for (int tap = 0; tap < TAPS; tap++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        f(tap, column + i, channel, float4{sum[tap][i][0], sum[tap][i][1], sum[tap][i][2], sum[tap][i][3]});
  }
};

template <class T, int TAPS>
using Sums = std::conditional_t<std::is_same_v<T, float>, ScalarSums<TAPS>, MatrixSums<T, TAPS>>;

__device__ __forceinline__ void add_four(float* to, float4 four) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(four.x), "f"(four.y), "f"(four.z), "f"(four.w)
               : "memory");
#else
  atomicAdd(to, four.x), atomicAdd(to + 1, four.y), atomicAdd(to + 2, four.z), atomicAdd(to + 3, four.w);
#endif
}

}  // namespace smoe::portable
