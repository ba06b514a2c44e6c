// What the ways of selecting share: the task, keys that sort as values do, loads, and the sort of a pixel's selection.
#pragma once
#include <cmath>

#include "early_launch.cuh"

namespace smoe {

struct Selection {
  const float* values;  // [S, N, P]
  int* index;           // [S, P, K]
  int choices, N, P, K, by_rank;
  int aligned, wide;  // whether four values, or four numbers of `index`, can be moved at once
  float deviations;  // above the mean at which the selected values begin, of normally distributed ones
};

// Lists longer than a pixel's values in shared memory: a list of what may be among the best, one read of the values.
int select_streaming(const Selection& s, cudaStream_t stream);
// Selections too long for such lists: five reads of the values.
int select_wide(const Selection& s, cudaStream_t stream);

namespace {

// A CTA takes neighbouring pixels, 8 or more: 32 bytes of each row are the least that memory moves. A warp each to select.
constexpr int VEC = 4, ROWS = 32 * VEC, SWEEPS = 4;  // a thread reads 4 pixels of 4 rows at a time
constexpr int APART = 4;  // words that pixels' memories are apart beyond a multiple of the banks
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
template <int PIXELS>
struct PlaceAmong {
  int choice, first, here, column, row, pixel, lane;
  __device__ explicit PlaceAmong(const Selection& s) {
    const int groups = (s.P + PIXELS - 1) / PIXELS;
    choice = blockIdx.x / groups, first = blockIdx.x % groups * PIXELS;
    here = min(PIXELS, s.P - first);
    column = threadIdx.x % (PIXELS / VEC) * VEC, row = threadIdx.x / (PIXELS / VEC);
    pixel = threadIdx.x / 32, lane = threadIdx.x % 32;
  }
  __device__ int warp_row() const { return row - lane / (PIXELS / VEC); }  // of the warp's first lane
};

// Whole lines of 128 bytes come to the L2 cache, for the CTAs that have the neighbouring pixels.
template <typename Place>
__device__ __forceinline__ void load_values(float (&to)[VEC], const Selection& s, const Place& at, const float* from) {
  if (s.aligned) {
    asm volatile("ld.global.nc.L2::128B.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3])
                 : "l"(from));
  } else {
#pragma unroll
    for (int i = 0; i < VEC; i++) to[i] = at.column + i < at.here ? __ldg(from + i) : 0.0f;
  }
}
template <typename Place>
__device__ __forceinline__ const float* values_of(const Selection& s, const Place& at, int expert) {
  return s.values + ((int64_t)at.choice * s.N + expert) * s.P + at.first + at.column;
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

__device__ __forceinline__ float reciprocal(float x) {
  asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}

// A bound that K keys pass, or at most `most`, if there is one; else, among equals, the K-th largest key, which `kept` keys
// pass. Of `count` keys, more than `most`, `low` is the smallest and `high` the largest; count_above(bound) gives a lane's
// share of those that pass, of which TALLY stands for none.
//
// First tries `guess`, then interpolates between values that too many and too few pass, giving less weight to one that stays
// (as the Illinois algorithm does), in few steps where values are spread out; where they are not, halves the distance of keys.
constexpr uint32_t TALLY = 0x4b000000;  // bits of 2^23, to which a count is added as a float
template <typename Count>
__device__ __forceinline__ uint32_t find_bound(uint32_t low, uint32_t high, float guess, int count, int K, int most, int* kept,
                                               Count count_above) {
  constexpr int INTERPOLATED = 16;
  const auto passing_of = [&](uint32_t bound) {
    return static_cast<int>(__reduce_add_sync(~0u, count_above(bound)) - 32 * TALLY);
  };
  const float aim = 0.5f * (K + most) - 0.5f;
  int passing = count, too_few = 0;
  if (high == ~0u) {
    too_few = passing_of(high);
    if (too_few >= K) low = high, passing = too_few;
  } else {
    high++;
  }
  float over = passing - aim, under = too_few - aim, from = value_of(low), to = value_of(high);
  int lately = 2;  // whether the last bound was passed by enough
#pragma unroll 1
  for (int step = 0; passing > most && high - low > 1; step++) {
    float at = fmaf(over * reciprocal(over - under), to - from, from);
    if (step == 0 && fabsf(guess) < INFINITY) at = guess;
    uint32_t bound = low + (high - low) / 2;
    if (step < INTERPOLATED && fabsf(at) < INFINITY) bound = min(max(key_of(at), low + 1), high - 1);
    const int above = passing_of(bound), enough = above >= K;
    const float off = above - aim, value = value_of(bound), weight = enough == lately ? 0.5f : 1.0f;
    over = enough ? off : over * weight, under = enough ? under * weight : off;
    low = enough ? bound : low, high = enough ? high : bound;
    from = enough ? value : from, to = enough ? to : value;
    passing = enough ? above : passing, lately = enough;
  }
  *kept = passing;
  return low;
}

// A lane's count of its keys in registers, in numbers of the unit that does not compare.
template <int R>
__device__ __forceinline__ uint32_t count_keys(const uint32_t (&key)[R], uint32_t bound) {
  float above = __uint_as_float(TALLY);
#pragma unroll
  for (int r = 0; r < R; r++)
    if (key[r] >= bound) above += 1.0f;
  return __float_as_uint(above);
}

// The bound of keys in registers; 0 is none. `deviations`: how many standard deviations above the mean it would lie if values
// were normally distributed.
template <int R>
__device__ __forceinline__ uint32_t find_bound(const uint32_t (&key)[R], float deviations, int count, int K, int most,
                                               int* kept) {
  constexpr int LOOKED_AT = 8;  // of a lane's keys, for mean and deviation
  uint32_t lowest = ~0u, highest = 0;
#pragma unroll
  for (int r = 0; r < R; r++) lowest = min(lowest, key[r] - 1), highest = max(highest, key[r]);  // 0 becomes the largest
  lowest = __reduce_min_sync(~0u, lowest) + 1;
  highest = __reduce_max_sync(~0u, highest);
  float guess = INFINITY;
  if constexpr (R > LOOKED_AT) {
    float number = 0.0f, sum = 0.0f, squares = 0.0f;
#pragma unroll
    for (int r = 0; r < R; r += R / LOOKED_AT) {
      const float value = value_of(key[r]);
      if (key[r]) number += 1.0f, sum += value, squares = fmaf(value, value, squares);
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      number += __shfl_xor_sync(~0u, number, step);
      sum += __shfl_xor_sync(~0u, sum, step);
      squares += __shfl_xor_sync(~0u, squares, step);
    }
    const float mean = __fdividef(sum, number);
    guess = fmaf(deviations, sqrtf(fmaxf(__fdividef(squares, number) - mean * mean, 0.0f)), mean);
  }
  return find_bound(lowest, highest, guess, count, K, most, kept, [&](uint32_t bound) { return count_keys(key, bound); });
}

// How many standard deviations above the mean a share of normally distributed values begins, roughly.
inline float deviations_of(double share) {
  const double tail = share < 0.5 ? share : 1.0 - share;
  const double t = sqrt(-2.0 * log(tail > 1e-9 ? tail : 1e-9));
  const double z = t - (2.515517 + t * (0.802853 + t * 0.010328)) / (1.0 + t * (1.432788 + t * (0.189269 + t * 0.001308)));
  return static_cast<float>(share < 0.5 ? z : -z);
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
template <int PIXELS>
__device__ __forceinline__ void write_selection(const Selection& s, const PlaceAmong<PIXELS>& at, const uint32_t* numbers,
                                                int stride) {
  __syncwarp();
  if (at.pixel < at.here) {
    int* index = s.index + ((int64_t)at.choice * s.P + at.first + at.pixel) * s.K;
    const uint32_t* own = numbers + at.pixel * stride;
    if (s.wide)
      for (int i = at.lane; i < s.K / 4; i += 32) reinterpret_cast<uint4*>(index)[i] = reinterpret_cast<const uint4*>(own)[i];
    else
      for (int i = at.lane; i < s.K; i += 32) index[i] = own[i];
  }
}

}  // namespace
}  // namespace smoe
