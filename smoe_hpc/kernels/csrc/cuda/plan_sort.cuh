// Sorting inside a CTA for the plan: which experts are marked, by number, and the stable sort of them by their masks.
#pragma once
#include "common.cuh"

namespace smoe {
namespace {

constexpr int SHORT_MASK = 9;  // bits, of 3x3 taps; longer masks take two passes of 8

// A CTA's sizes: a pass of the sort has four bins a thread.
template <int T>
struct Team {
  static constexpr int THREADS = T, WARPS = T / 32, BINS = 4 * T;
  static_assert(BINS >= 1 << SHORT_MASK);
};

// The order of masks of taps: more bits set come first, then the smaller number.
struct Orders {
  uint16_t tap_mask[1 << SHORT_MASK];  // place of a mask among all
};
constexpr Orders make_orders() {
  Orders o{};
  int place = 0;
  for (int ones = SHORT_MASK; ones >= 0; ones--)
    for (int mask = 0; mask < 1 << SHORT_MASK; mask++) {
      int found = 0;
      for (int bit = 0; bit < SHORT_MASK; bit++) found += mask >> bit & 1;
      if (found == ones) o.tap_mask[mask] = place++;
    }
  return o;
}
__device__ const Orders ORDERS = make_orders();

// The order of masks of tiles: that of a Gray code, in which neighbours differ in one tile.
__device__ int gray_rank(uint32_t mask) {
  for (int shift = 1; shift < 16; shift *= 2) mask ^= mask >> shift;
  return mask;
}

// The sum of the threads before this one, and of all.
template <int WARPS>
__device__ int exclusive_sum(int value, int* warp_sums, int* total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = value;
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  int before = 0, all = 0;
  for (int i = 0; i < WARPS; i++) {
    before += i < warp ? warp_sums[i] : 0;
    all += warp_sums[i];
  }
  *total = all;
  return before + sum - value;
}

// What a pass of the sort needs in shared memory.
struct Tally {
  uint16_t* counts;     // [warps][bins] entries of each warp's run
  uint16_t* bin_start;  // [bins]
};

// Calls write(place, expert, mask) for the marked experts by number, and returns how many there are.
template <int THREADS, typename Write>
__device__ int list_marked(const uint16_t* table, int N, int* warp_sums, Write write) {
  int listed = 0;
  for (int base = 0; base < N; base += THREADS * 8) {
    const int first = base + threadIdx.x * 8;
    uint4 eight = make_uint4(0, 0, 0, 0);
    if (first < N) eight = *reinterpret_cast<const uint4*>(table + first);
    const uint32_t pairs[4] = {eight.x, eight.y, eight.z, eight.w};
    int own = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) own += ((pairs[i] & 0xffff) != 0) + (pairs[i] >> 16 != 0);
    int total, place = listed + exclusive_sum<THREADS / 32>(own, warp_sums, &total);
    if (own)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        if (pairs[i] & 0xffff) write(place++, first + 2 * i, pairs[i] & 0xffff);
        if (pairs[i] >> 16) write(place++, first + 2 * i + 1, pairs[i] >> 16);
      }
    listed += total;
    __syncthreads();
  }
  return listed;
}

// One stable pass of a counting sort of the experts `from`: write(place, expert, mask) by digit(mask). Every warp
// has a run of the entries, so that equal digits keep their order.
template <int T, typename Digit, typename Write>
__device__ void sort_pass(const uint16_t* table, const Tally& m, const uint16_t* from, int count, int* warp_sums, Digit digit,
                          Write write) {
  constexpr int THREADS = Team<T>::THREADS, WARPS = Team<T>::WARPS, BINS = Team<T>::BINS;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint2* fours = reinterpret_cast<uint2*>(m.counts) + threadIdx.x;  // the counts of this thread's bins, of the first warp
#pragma unroll
  for (int w = 0; w < WARPS; w++) fours[w * THREADS] = make_uint2(0, 0);
  __syncthreads();
  uint16_t* own = m.counts + warp * BINS;
  const int share = ((count + WARPS - 1) / WARPS + 31) / 32 * 32;
  const int begin = warp * share, end = min(begin + share, count);
  for (int base = begin; base < end; base += 32) {
    const bool there = base + lane < end;
    const uint32_t active = __ballot_sync(~0u, there);
    if (there) {
      const int d = digit(table[from[base + lane]]);
      const uint32_t peers = __match_any_sync(active, d);
      if (lane == __ffs(peers) - 1) own[d] += __popc(peers);
    }
    __syncwarp();
  }
  __syncthreads();
  uint2 sums = make_uint2(0, 0);  // each two sums of at most 65535 side by side
#pragma unroll
  for (int w = 0; w < WARPS; w++) {
    const uint2 here = fours[w * THREADS];
    fours[w * THREADS] = sums;
    sums.x += here.x, sums.y += here.y;
  }
  int total;
  const int second = sums.x & 0xffff, third = second + (sums.x >> 16), fourth = third + (sums.y & 0xffff);
  const uint32_t start = exclusive_sum<WARPS>(fourth + (sums.y >> 16), warp_sums, &total);
  reinterpret_cast<uint2*>(m.bin_start)[threadIdx.x] =
      make_uint2(start | (start + second) << 16, (start + third) | (start + fourth) << 16);
  __syncthreads();
  for (int base = begin; base < end; base += 32) {
    const bool there = base + lane < end;
    const uint32_t active = __ballot_sync(~0u, there);
    uint32_t peers = 0;
    int d = 0;
    if (there) {
      const int expert = from[base + lane];
      const uint32_t mask = table[expert];
      d = digit(mask);
      peers = __match_any_sync(active, d);
      write(m.bin_start[d] + own[d] + __popc(peers & ((1u << lane) - 1)), expert, mask);
    }
    __syncwarp();
    if (there && lane == __ffs(peers) - 1) own[d] += __popc(peers);
    __syncwarp();
  }
  __syncthreads();
}

}  // namespace
}  // namespace smoe
