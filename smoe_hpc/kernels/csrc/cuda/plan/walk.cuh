// How a team of threads goes over the selections of a window for the plan: quotients, loads and stores of several at a time.
#pragma once
#include "sort.cuh"

namespace smoe {
namespace {

constexpr int LEFT_OUT = 0xffff;
constexpr int AT_ONCE = 4;  // loads of selections that a thread has in flight

// Quotients of numbers below 2^31 by multiplication.
struct Divider {
  uint32_t factor;
  int shift;
  Divider() = default;
  explicit Divider(uint32_t divisor) : shift(0) {
    const uint32_t by = divisor ? divisor : 1;
    while (1ull << shift < by) shift++;
    factor = static_cast<uint32_t>((1ull << (31 + shift)) / by + 1);
  }
  __device__ __forceinline__ int operator()(uint32_t number) const {
    return static_cast<int>(static_cast<uint64_t>(number) * factor >> (31 + shift));
  }
};

// A pixel of a window: its number on the map or -1, its bits, and its place in the forward window or LEFT_OUT.
struct PixelOfWindow {
  int number;
  uint16_t bits, centre;
};

// The place of a thread among the selections of a window, VEC at a time: entry = pixel * K + k.
template <int T, int VEC>
struct Walk {
  int entry, pixel, group, groups, step, rest;
  __device__ __forceinline__ Walk(int K, const Divider& by_groups) : entry(Team<T>::thread() * VEC), groups(K / VEC) {
    pixel = by_groups(Team<T>::thread()), group = Team<T>::thread() - pixel * groups;
    step = by_groups(T), rest = T - step * groups;
  }
  __device__ __forceinline__ void advance() {
    entry += T * VEC, pixel += step, group += rest;
    if (group >= groups) pixel++, group -= groups;
  }
};

template <int VEC>
__device__ __forceinline__ void load_selections(int (&to)[VEC], const int* from) {
  if constexpr (VEC == 4) {
    const int4 four = __ldg(reinterpret_cast<const int4*>(from));
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
  } else if constexpr (VEC == 2) {
    const int2 two = __ldg(reinterpret_cast<const int2*>(from));
    to[0] = two.x, to[1] = two.y;
  } else {
    to[0] = __ldg(from);
  }
}

template <int VEC>
__device__ __forceinline__ void load_staged(int (&to)[VEC], const uint16_t* from) {
  if constexpr (VEC == 4) {
    const uint2 four = *reinterpret_cast<const uint2*>(from);
    to[0] = four.x & 0xffff, to[1] = four.x >> 16, to[2] = four.y & 0xffff, to[3] = four.y >> 16;
  } else if constexpr (VEC == 2) {
    const uint32_t two = *reinterpret_cast<const uint32_t*>(from);
    to[0] = two & 0xffff, to[1] = two >> 16;
  } else {
    to[0] = from[0];
  }
}

template <int VEC>
__device__ __forceinline__ void store_places(uint16_t* to, const int (&from)[VEC]) {
  if constexpr (VEC == 4)
    *reinterpret_cast<uint2*>(to) = make_uint2(from[0] | from[1] << 16, from[2] | from[3] << 16);
  else if constexpr (VEC == 2)
    *reinterpret_cast<uint32_t*>(to) = from[0] | from[1] << 16;
  else
    to[0] = from[0];
}

// Selections of several steps of a walk, in flight together; N for those that are left out. Steps beyond the end have no entry.
template <int T, int VEC>
struct Selections {
  int experts[AT_ONCE][VEC], entries[AT_ONCE], pixels[AT_ONCE], groups[AT_ONCE];
  __device__ __forceinline__ void follow(Walk<T, VEC>& walk, int pixels_of_window) {
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++, walk.advance()) {
      const bool there = walk.pixel < pixels_of_window;
      entries[i] = there ? walk.entry : -1, pixels[i] = there ? walk.pixel : 0, groups[i] = walk.group;
    }
  }
  __device__ __forceinline__ void load(const PixelOfWindow* of_pixels, const int* index, int N, int K) {
    int numbers[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) numbers[i] = of_pixels[pixels[i]].number;
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++)
      load_selections<VEC>(experts[i], index + (int64_t)max(numbers[i], 0) * K + groups[i] * VEC);
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++)
#pragma unroll
      for (int v = 0; v < VEC; v++)
        experts[i][v] = numbers[i] < 0 ? N : min(static_cast<uint32_t>(experts[i][v]), static_cast<uint32_t>(N));
  }
  __device__ __forceinline__ void load(const uint16_t* staged) {
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) load_staged<VEC>(experts[i], staged + max(entries[i], 0));
  }
};

}  // namespace
}  // namespace smoe
