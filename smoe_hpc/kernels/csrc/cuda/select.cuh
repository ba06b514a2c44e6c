// What the ways of selecting share: the task, keys that sort as values do, loads, and the sort of a pixel's selection.
#pragma once
#include "common.cuh"

namespace smoe {

struct Selection {
  const float* values;  // [S, N, P]
  int* index;           // [S, P, K]
  int64_t* indices;     // [S, K, P] or null
  int choices, N, P, K, by_rank, aligned;
};

// Lists longer than a pixel's values in shared memory: a list of what may be among the best, one read of the values.
int select_streaming(const Selection& s, cudaStream_t stream);
// Selections too long for such lists: five reads of the values.
int select_wide(const Selection& s, cudaStream_t stream);

namespace {

// A CTA takes 8 neighbouring pixels, 32 bytes of each row, which is the least that memory moves; a warp each to select.
constexpr int PIXELS = 8, THREADS = PIXELS * 32;
constexpr int VEC = 4, ROWS = THREADS * VEC / PIXELS, SWEEPS = 4;  // a thread reads 4 pixels of 4 rows at a time
constexpr int APART = 32 / PIXELS;  // words that pixels' memories are apart beyond a multiple of the banks
constexpr int SORTED_IN_REGISTERS = 256;  // entries of a list; longer ones are sorted in shared memory

// A number that sorts as the value: both zeros alike, NaN (which the addition makes one number) above everything. Never 0.
__device__ __forceinline__ uint32_t key_of(float value) {
  const int bits = __float_as_int(value + 0.0f);
  return bits ^ (bits >> 31 | 0x80000000);
}
__device__ __forceinline__ float value_of(uint32_t key) {
  return __uint_as_float(key & 0x80000000 ? key ^ 0x80000000 : ~key);
}

// The CTA's pixels, and the four of them that a thread reads.
struct Place {
  int choice, first, here, column, row, pixel, lane;
  __device__ explicit Place(const Selection& s) {
    const int groups = (s.P + PIXELS - 1) / PIXELS;
    choice = blockIdx.x / groups, first = blockIdx.x % groups * PIXELS;
    here = min(PIXELS, s.P - first);
    column = threadIdx.x % (PIXELS / VEC) * VEC, row = threadIdx.x / (PIXELS / VEC);
    pixel = threadIdx.x / 32, lane = threadIdx.x % 32;
  }
};

__device__ __forceinline__ void load_values(float (&to)[VEC], const Selection& s, const Place& at, int expert) {
  const float* from = s.values + ((int64_t)at.choice * s.N + expert) * s.P + at.first + at.column;
  if (s.aligned) {
    const float4 four = __ldg(reinterpret_cast<const float4*>(from));
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
  } else {
#pragma unroll
    for (int i = 0; i < VEC; i++) to[i] = at.column + i < at.here ? __ldg(from + i) : 0.0f;
  }
}

// Sum over the lanes before this one.
__device__ __forceinline__ uint32_t sum_before(uint32_t value) {
  uint32_t sum = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t other = __shfl_up_sync(~0u, sum, step);
    if (threadIdx.x % 32 >= step) sum += other;
  }
  return sum - value;
}

// A bound that K keys pass, or at most `most`, if there is one; else, among equals, the K-th largest key, which `kept` keys
// pass. Of `count` keys, more than `most`, `highest` is the largest; count_above(bound) gives a lane's share of those that
// pass. Interpolates between bounds that too many and too few pass, in few steps where values are spread out, and halves the
// distance where they are not.
template <typename Count>
__device__ __forceinline__ uint32_t find_bound(uint32_t highest, int count, int K, int most, int* kept, Count count_above) {
  constexpr int INTERPOLATED = 12;
  uint32_t low = 1, high = highest;
  int passing = count, too_few = 0;
  if (highest == ~0u) {
    too_few = __reduce_add_sync(~0u, count_above(high));
    if (too_few >= K) low = high, passing = too_few;
  } else {
    high++;
  }
#pragma unroll 1
  for (int step = 0; passing > most && high - low > 1; step++) {
    float share = 0.5f;
    if (step < INTERPOLATED && step % 4 != 3) share = __fdividef(passing - 0.5f * (K + most) + 0.5f, passing - too_few);
    const uint32_t ahead = static_cast<uint32_t>(share * static_cast<float>(high - low));
    const uint32_t bound = low + min(max(ahead, 1u), high - low - 1);
    const int above = __reduce_add_sync(~0u, count_above(bound));
    if (above >= K)
      low = bound, passing = above;
    else
      high = bound, too_few = above;
  }
  *kept = passing;
  return low;
}

// A lane's count of its keys in registers, in numbers of the unit that does not compare.
template <int R>
__device__ __forceinline__ int count_keys(const uint32_t (&key)[R], uint32_t bound) {
  float above = 0.0f;
#pragma unroll
  for (int r = 0; r < R; r++)
    if (key[r] >= bound) above += 1.0f;
  return static_cast<int>(above);
}

template <int R>
__device__ __forceinline__ uint32_t find_bound(const uint32_t (&key)[R], int count, int K, int most, int* kept) {
  uint32_t highest = 0;
#pragma unroll
  for (int r = 0; r < R; r++) highest = max(highest, key[r]);
  highest = __reduce_max_sync(~0u, highest);
  return find_bound(highest, count, K, most, kept, [&](uint32_t bound) { return count_keys(key, bound); });
}

// Entries to sort, the largest first: by key, of equal keys the lower number, or by number alone.
template <typename Entry>
__device__ __forceinline__ Entry entry_of(uint32_t key, uint32_t id) {
  if constexpr (sizeof(Entry) == 8) return static_cast<Entry>(key) << 32 | (0xffffffffu - id);
  return 0xffffffffu - id;
}
template <typename Entry>
__device__ __forceinline__ uint32_t number_of(Entry entry) {
  return 0xffffffffu - static_cast<uint32_t>(entry);
}

// Numbers of a warp's list into `to`, in order; 32 Q >= count. Bitonic, Q neighbouring entries a lane.
template <int Q, typename Entry>
__device__ __noinline__ void sort_in_registers(const uint32_t* keys, const uint16_t* ids, uint32_t* to, int count) {
  const int lane = threadIdx.x % 32;
  Entry entry[Q];
#pragma unroll
  for (int q = 0; q < Q; q++) {
    const int place = lane * Q + q;
    entry[q] = place < count ? entry_of<Entry>(keys[place], ids[place]) : 0;
  }
  __syncwarp();
#pragma unroll
  for (int run = 2; run <= 32 * Q; run *= 2)
#pragma unroll
    for (int stride = run / 2; stride > 0; stride /= 2) {
      if (stride >= Q) {
#pragma unroll
        for (int q = 0; q < Q; q++) {
          const Entry other = __shfl_xor_sync(~0u, entry[q], stride / Q);
          const int place = lane * Q + q;
          const bool larger = ((place & run) == 0) == ((place & stride) == 0);
          entry[q] = larger ? max(entry[q], other) : min(entry[q], other);
        }
      } else {
#pragma unroll
        for (int q = 0; q < Q; q++) {
          if (q & stride) continue;
          const Entry large = max(entry[q], entry[q | stride]), small = min(entry[q], entry[q | stride]);
          const bool falling = ((lane * Q + q) & run) == 0;
          entry[q] = falling ? large : small;
          entry[q | stride] = falling ? small : large;
        }
      }
    }
#pragma unroll
  for (int q = 0; q < Q; q++)
    if (lane * Q + q < count) to[lane * Q + q] = number_of(entry[q]);
}

// The same in place, for long lists, whose memory is a power of two at least.
template <typename Entry>
__device__ __noinline__ void sort_in_memory(uint32_t* keys, uint16_t* ids, int count) {
  const int lane = threadIdx.x % 32;
  int size = 2;
  while (size < count) size *= 2;
  for (int i = count + lane; i < size; i += 32) keys[i] = 0, ids[i] = 0xffff;
  __syncwarp();
  for (int run = 2; run <= size; run *= 2)
    for (int stride = run / 2; stride > 0; stride /= 2) {
      for (int i = lane; i < size / 2; i += 32) {
        const int a = i / stride * stride * 2 + i % stride, b = a + stride;
        const uint32_t key_a = keys[a], key_b = keys[b], id_a = ids[a], id_b = ids[b];
        const Entry first = entry_of<Entry>(key_a, id_a), second = entry_of<Entry>(key_b, id_b);
        if ((first < second) == ((a & run) == 0)) {
          keys[a] = key_b, keys[b] = key_a;
          ids[a] = id_b, ids[b] = id_a;
        }
      }
      __syncwarp();
    }
  for (int i = lane; i < count; i += 32) keys[i] = ids[i];
}

// Sorts a warp's list; its numbers take the place of the keys.
template <typename Entry>
__device__ __forceinline__ void sort_list(uint32_t* keys, uint16_t* ids, int count) {
  if (count <= 32)
    sort_in_registers<1, Entry>(keys, ids, keys, count);
  else if (count <= 128)
    sort_in_registers<4, Entry>(keys, ids, keys, count);
  else if (count <= SORTED_IN_REGISTERS)
    sort_in_registers<8, Entry>(keys, ids, keys, count);
  else
    sort_in_memory<Entry>(keys, ids, count);
}

// Writes the numbers that stand at the beginning of each pixel's memory, `stride` apart.
__device__ __forceinline__ void write_selection(const Selection& s, const Place& at, const uint32_t* numbers, int stride) {
  __syncwarp();
  if (at.pixel < at.here) {
    int* index = s.index + ((int64_t)at.choice * s.P + at.first + at.pixel) * s.K;
    for (int i = at.lane; i < s.K; i += 32) index[i] = numbers[at.pixel * stride + i];
  }
  if (s.indices == nullptr) return;
  __syncthreads();
  int64_t* indices = s.indices + (int64_t)at.choice * s.K * s.P + at.first;
  const int to = threadIdx.x % PIXELS;
  if (to < at.here)
    for (int k = threadIdx.x / PIXELS; k < s.K; k += 32) indices[(int64_t)k * s.P + to] = numbers[to * stride + k];
}

}  // namespace
}  // namespace smoe
