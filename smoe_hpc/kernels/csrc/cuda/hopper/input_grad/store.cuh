// How the input gradient's multiplying warps write a tile's sums to dx.
#pragma once
#include "task.cuh"

#include <type_traits>

namespace smoe::input_grad {

template <class T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *(uint32_t*)&pair;
  } else {
    __half2 pair = __floats2half2_rn(low, high);
    return *(uint32_t*)&pair;
  }
}

// The four lanes of a quad hold r[i] of column i each; afterwards lane i holds the four values of its own column.
__device__ __forceinline__ void transpose_quad(uint32_t (&r)[4], int lane) {
  bool odd = lane & 1, upper = lane & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    uint32_t other = __shfl_xor_sync(EVERY_LANE, odd ? r[i] : r[i + 1], 1);
    (odd ? r[i] : r[i + 1]) = other;
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    uint32_t other = __shfl_xor_sync(EVERY_LANE, upper ? r[i] : r[i + 2], 2);
    (upper ? r[i] : r[i + 2]) = other;
  }
}

// Where a thread's two rows of a tile go in dx, and how many channels; none for rows outside.
struct Rows {
  uint16_t* to[2];
  int channels[2];
};

__device__ __forceinline__ Rows rows_of(const Task& t, const Item& item, int row, int block_channels) {
  Rows rows;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int place = row + half * 8, pixel = place / t.tile.batch, b = item.chunk * t.tile.batch + place % t.tile.batch;
    const int h = item.y * t.windows.step_h + pixel / t.tile.columns, w = item.x * t.windows.step_w + pixel % t.tile.columns;
    const int channel = item.channel_block * block_channels;
    rows.to[half] = t.dx + (((int64_t)b * t.shape.Hi + h) * t.shape.Wi + w) * t.shape.C + channel;
    rows.channels[half] = b < t.shape.B && h < t.shape.Hi && w < t.shape.Wi ? t.shape.C - channel : 0;
    asm volatile("" : "+l"(rows.to[half]), "+r"(rows.channels[half]));  // here, not where they are used
  }
  return rows;
}

template <class T, int N>
__device__ __forceinline__ void store_rows(const Rows& rows, const float (&sum)[N / 2], int lane) {
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int n = 0; n < N / 32; n++) {
      uint32_t r[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float* pair = sum + (n * 4 + i) * 4 + half * 2;
        r[i] = pack_pair<T>(pair[0], pair[1]);
      }
      transpose_quad(r, lane);
      const int channel = (n * 4 + lane % 4) * 8;
      if (channel < rows.channels[half]) *(uint4*)(rows.to[half] + channel) = make_uint4(r[0], r[1], r[2], r[3]);
    }
}

}  // namespace smoe::input_grad
