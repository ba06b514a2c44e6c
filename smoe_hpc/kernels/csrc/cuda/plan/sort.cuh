// Sorting among the threads of a team for the plan: which experts are marked, by number, and the stable sort of them by masks.
#pragma once
#include "common.cuh"

namespace smoe {
namespace {

constexpr int SHORT_MASK = 9;  // bits, of 3x3 taps; longer masks take two passes of 8
constexpr int BINS = 1 << SHORT_MASK;
constexpr int BLOCK = 256;  // threads of a CTA, which are one team or several

// T threads of a CTA that make a window of their own.
template <int T>
struct Team {
  static constexpr int WARPS = T / 32, NUMBER = BLOCK / T;
  static_assert(T % 32 == 0 && BLOCK % T == 0 && BINS % T == 0);
  static __device__ __forceinline__ int thread() { return threadIdx.x % T; }
  static __device__ __forceinline__ int number() { return threadIdx.x / T; }
  static __device__ __forceinline__ void sync() {
    if constexpr (T == BLOCK)
      __syncthreads();
    else if constexpr (T == 32)
      __syncwarp();
    else
      barrier_among<T>(1 + number());
  }
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

// What a team needs in shared memory to list and to sort.
template <int T>
struct Tally {
  int warp_sums[2][Team<T>::WARPS];           // taken in turn
  alignas(16) uint16_t bin_start[BINS];
  alignas(16) uint16_t counts[Team<T>::WARPS][BINS];  // entries of each warp's run
};

// The sum of the team's threads before this one, and of all. A call may follow another, of the other `turn`, at once.
template <int T>
__device__ __forceinline__ int exclusive_sum(int value, int (&warp_sums)[Team<T>::WARPS], int* total) {
  const int lane = threadIdx.x % 32, warp = Team<T>::thread() / 32;
  int sum = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += other;
  }
  if constexpr (T == 32) {
    *total = __shfl_sync(~0u, sum, 31);
    return sum - value;
  }
  if (lane == 31) warp_sums[warp] = sum;
  Team<T>::sync();
  int before = 0, all = 0;
#pragma unroll
  for (int i = 0; i < Team<T>::WARPS; i++) {
    before += i < warp ? warp_sums[i] : 0;
    all += warp_sums[i];
  }
  *total = all;
  return before + sum - value;
}

template <int T>
__device__ __forceinline__ void clear_counts(Tally<T>& m) {
  uint4* words = reinterpret_cast<uint4*>(m.counts);
  for (int i = Team<T>::thread(); i < static_cast<int>(sizeof(m.counts) / 16); i += T) words[i] = make_uint4(0, 0, 0, 0);
}

// Calls write(place, expert, mask) for the marked experts by number, and returns how many there are. What `write` writes is
// for the others to see after a barrier.
template <int T, typename Marked, typename Write>
__device__ __forceinline__ int list_marked(const uint16_t* table, int N, Tally<T>& m, Marked marked, Write write) {
  int listed = 0;
  for (int base = 0, turn = 0; base < N; base += T * 8, turn ^= 1) {
    const int first = base + Team<T>::thread() * 8;
    uint4 eight = make_uint4(0, 0, 0, 0);
    if (first < N) eight = *reinterpret_cast<const uint4*>(table + first);
    uint32_t pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
    for (int i = 0; i < 4; i++) pairs[i] &= first + 2 * i + 1 < N ? ~0u : first + 2 * i < N ? 0xffff : 0;
    int own = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) own += marked(pairs[i] & 0xffff) + marked(pairs[i] >> 16);
    int total, place = listed + exclusive_sum<T>(own, m.warp_sums[turn], &total);
    if (own)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        if (marked(pairs[i] & 0xffff)) write(place++, first + 2 * i, pairs[i] & 0xffff);
        if (marked(pairs[i] >> 16)) write(place++, first + 2 * i + 1, pairs[i] >> 16);
      }
    listed += total;
  }
  return listed;
}

// One stable pass of a counting sort of the experts `from`: write(place, expert, mask) by digit(mask). Every warp
// has a run of the entries, so that equal digits keep their order. The counts have to be cleared before.
template <int T, typename Digit, typename Write>
__device__ __forceinline__ void sort_pass(const uint16_t* table, Tally<T>& m, const uint16_t* from, int count, Digit digit,
                                          Write write) {
  constexpr int WARPS = Team<T>::WARPS, OWN = BINS / T;  // bins of a thread
  struct alignas(2 * OWN) Bins {
    uint16_t of[OWN];
  };
  const int thread = Team<T>::thread(), lane = thread % 32, warp = thread / 32;
  uint16_t* own = m.counts[warp];
  const int share = ((count + WARPS - 1) / WARPS + 31) / 32 * 32;
  const int begin = warp * share, end = min(begin + share, count);
  for (int base = begin; base < end; base += 32) {
    const bool there = base + lane < end;
    const int d = there ? digit(table[from[base + lane]]) : BINS + lane;
    const uint32_t peers = __match_any_sync(~0u, d);
    if (there && lane == __ffs(peers) - 1) own[d] += __popc(peers);
    __syncwarp();
  }
  Team<T>::sync();
  Bins sums{};
#pragma unroll
  for (int w = 0; w < WARPS; w++) {
    Bins* place = reinterpret_cast<Bins*>(m.counts[w]) + thread;
    const Bins here = *place;
    *place = sums;
#pragma unroll
    for (int i = 0; i < OWN; i++) sums.of[i] += here.of[i];
  }
  int all = 0, total;
#pragma unroll
  for (int i = 0; i < OWN; i++) all += sums.of[i];
  int start = exclusive_sum<T>(all, m.warp_sums[0], &total);
  Bins starts;
#pragma unroll
  for (int i = 0; i < OWN; i++) starts.of[i] = start, start += sums.of[i];
  reinterpret_cast<Bins*>(m.bin_start)[thread] = starts;
  Team<T>::sync();
  for (int base = begin; base < end; base += 32) {
    const bool there = base + lane < end;
    const int expert = there ? from[base + lane] : 0;
    const uint32_t mask = there ? table[expert] : 0;
    const int d = there ? digit(mask) : BINS + lane;
    const uint32_t peers = __match_any_sync(~0u, d);
    const int place = there ? m.bin_start[d] + own[d] + __popc(peers & ((1u << lane) - 1)) : 0;
    __syncwarp();
    if (there) write(place, expert, mask);
    if (there && lane == __ffs(peers) - 1) own[d] += __popc(peers);
    __syncwarp();
  }
  Team<T>::sync();
}

}  // namespace
}  // namespace smoe
