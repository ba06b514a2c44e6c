// How the sums of a block reach the gradient: straight from registers.
#pragma once
#include "walk.cuh"

namespace smoe::weight_grad {

struct Four {
  float a, b, c, d;
};

__device__ __forceinline__ float exchange(float value, int lanes_apart) { return __shfl_xor_sync(~0u, value, lanes_apart); }

// Two lanes that hold two channels each, of this and of the next 8 channels, make it four neighbouring ones each: those of this
// 8 for the even lane, of the next for the odd one.
__device__ __forceinline__ Four join(const float* here, const float* next, bool odd) {
  const float a = exchange(odd ? here[0] : next[0], 1), b = exchange(odd ? here[1] : next[1], 1);
  return odd ? Four{a, b, next[0], next[1]} : Four{here[0], here[1], a, b};
}

__device__ __forceinline__ void write_four(float* to, const Four& sum, bool add) {
  if (add)
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(sum.a), "f"(sum.b), "f"(sum.c), "f"(sum.d)
                 : "memory");
  else
    asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(sum.a), "f"(sum.b), "f"(sum.c), "f"(sum.d)
                 : "memory");
}

// Adds a warpgroup's block to the gradient, or stores it where its region has rows of its own. Thread t of warp w has columns
// 16 w + t / 4 (+ 8) and channels 8 n + 2 (t % 4) (+ 1). No shared memory is taken, which makes longer rings, and nothing is
// waited for: the other warpgroup goes on. Lanes exchange numbers until a column gets 32 channels, 128 bytes, at a time.
template <int N, int TAPS>
__device__ __forceinline__ void write_block(const Task& t, const Item& item, const float (&sums)[TAPS][N / 2], int group) {
  const int lane = threadIdx.x % 32;
  const bool odd = lane & 1, second = lane & 4;  // of the lanes of two neighbouring columns, those of the second one
  const int first = odd * 8 + (lane & 2) * 2 + second * 16, channels = t.shape.C - item.first_channel;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float* places[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int column = item.first_column + group * BLOCK + threadIdx.x % 128 / 32 * 16 + lane / 8 * 2 + i + half * 8;
      int64_t row = column;
      if (t.first_row) {
        row += t.first_row[item.region];
      } else if (column < item.columns) {
        const int slot = divide_by_filters(t, column);
        row += (t.windows.ids[(int64_t)item.region * t.windows.cap + slot] - slot) * (int64_t)t.shape.F;
      }
      float* place = t.out + (row * TAPS + item.tap_row) * TAPS * t.shape.C + item.first_channel + first;
      places[i] = column < item.columns ? place : nullptr;
    }
#pragma unroll
    for (int j = 0; j < TAPS; j++)
#pragma unroll
      for (int n = 0; n < N / 8; n += 4) {
        const float* of_half = sums[j] + 4 * n + 2 * half;
        const Four low = join(of_half, of_half + 4, odd), high = join(of_half + 8, of_half + 12, odd);
        const Four kept = second ? high : low, given = second ? low : high;
        const Four got = {exchange(given.a, 4), exchange(given.b, 4), exchange(given.c, 4), exchange(given.d, 4)};
        if (n * 8 + first >= channels) continue;
        const int at = j * t.shape.C + n * 8;
        if (places[0]) write_four(places[0] + at, second ? got : kept, !t.first_row);
        if (places[1]) write_four(places[1] + at, second ? kept : got, !t.first_row);
      }
  }
}

}  // namespace smoe::weight_grad
