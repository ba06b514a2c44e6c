// The K largest of more than 1024 values at every pixel: of some hundred values a bound is guessed that somewhat more than K
// will pass, and one read of all values lists those that do. The K best of the list are the selection, whatever the guess.
//
// Where a pixel's list comes out shorter than K or too long, the CTA reads once more without a guess: the list is cut back to
// little more than K entries whenever it is half full, and from then on only what is larger than the lowest kept one enters.
#include "select.cuh"

namespace smoe {
namespace {

constexpr int PIXELS = 16, THREADS = 32 * PIXELS;  // of a CTA
using Place = PlaceAmong<PIXELS>;
constexpr int SAMPLE = ROWS * SWEEPS;  // values that the guess is made of

template <int CAPACITY>
struct List {
  static constexpr int KEY_STRIDE = CAPACITY + APART, ID_STRIDE = CAPACITY + 2 * APART;
  static constexpr int BYTES = PIXELS * (KEY_STRIDE * 4 + ID_STRIDE * 2);
  uint32_t* all_keys;
  uint16_t* all_ids;
  int* counts;
  __device__ void add(int pixel, int place, uint32_t key, int expert) const {
    if (place >= CAPACITY) return;
    all_keys[pixel * KEY_STRIDE + place] = key;
    all_ids[pixel * ID_STRIDE + place] = expert;
  }
};

template <int R>
__device__ uint32_t find_in_registers(const uint32_t* keys, float deviations, int count, int K, int most, int* kept) {
  uint32_t key[R];
#pragma unroll
  for (int r = 0; r < R; r++) {
    const int place = r * 32 + threadIdx.x % 32;
    key[r] = place < count ? keys[place] : 0;
  }
  return find_bound(key, deviations, count, K, most, kept);
}

// The bound of a warp's list, as above. Of a list of what lies above some bound, the deviations are INFINITY.
__device__ uint32_t find_bound(const uint32_t* keys, float deviations, int count, int K, int most, int* kept) {
  if (count <= 256) return find_in_registers<8>(keys, deviations, count, K, most, kept);
  if (count <= 512) return find_in_registers<16>(keys, deviations, count, K, most, kept);
  const int lane = threadIdx.x % 32;
  uint32_t lowest = ~0u, highest = 0;
  for (int place = lane; place < count; place += 32) lowest = min(lowest, keys[place]), highest = max(highest, keys[place]);
  lowest = __reduce_min_sync(~0u, lowest), highest = __reduce_max_sync(~0u, highest);
  return find_bound(lowest, highest, INFINITY, count, K, most, kept, [&](uint32_t bound) {
    uint32_t above = TALLY;
    for (int place = lane; place < count; place += 32) above += keys[place] >= bound;
    return above;
  });
}

// Keeps the best of a warp's list: at least K of them, and at most `most`. Returns their number and the lowest kept key.
// `numbered`: the entry at place i is expert i, and `ids` does not say so yet.
__device__ int keep_best(uint32_t* keys, uint16_t* ids, int count, int K, int most, bool numbered, uint32_t* lowest) {
  const int lane = threadIdx.x % 32;
  int kept = count;
  const uint32_t least = count > most ? find_bound(keys, INFINITY, count, K, most, &kept) : 0;
  int last_tie = 0xffff;
  if (kept > most) {  // equal keys: those of the lowest numbers, K in all
    int missing = 0;
    for (int place = lane; place < count; place += 32) missing -= keys[place] > least;
    missing = K + __reduce_add_sync(~0u, missing);
    last_tie = 0;
    for (int bit = 15; bit >= 0; bit--) {  // the largest number with fewer than `missing` ties below it
      const int bound = last_tie | 1 << bit;
      int below = 0;
      for (int place = lane; place < count; place += 32)
        below += keys[place] == least && (numbered ? place : ids[place]) < bound;
      if (__reduce_add_sync(~0u, below) < missing) last_tie = bound;
    }
  }
  *lowest = least;
  int filled = 0;
  for (int base = 0; base < count; base += 32) {
    const int place = base + lane;
    const uint32_t own = place < count ? keys[place] : 0;
    const int id = numbered || place >= count ? place : ids[place];
    const bool keep = place < count && (own > least || (own == least && id <= last_tie));
    const uint32_t others = __ballot_sync(~0u, keep);
    __syncwarp();  // all have read before any writes
    if (keep) {
      const int to = filled + __popc(others & ((1u << lane) - 1));
      keys[to] = own;
      ids[to] = id;
    }
    filled += __popc(others);
  }
  __syncwarp();
  return filled;
}

// Lists every value that is not below the pixel's bound. A warp counts its own, asks for as many places at once, and its
// lanes take theirs in turn.
template <int CAPACITY>
__device__ void list_above(const Selection& s, const Place& at, const List<CAPACITY>& list, const uint32_t* bounds) {
  static_assert(VEC == 4 && SWEEPS * 32 < 256, "counts of four pixels in a byte each");
  constexpr int COLUMNS = PIXELS / VEC;  // neighbouring lanes have different pixels
  const int experts = at.column < at.here ? s.N : 0;
  float bound[VEC];
#pragma unroll
  for (int i = 0; i < VEC; i++) bound[i] = at.column + i < at.here ? value_of(bounds[at.column + i]) : INFINITY;
  for (int base = at.warp_row(); base < s.N; base += ROWS * SWEEPS) {
    const int first = base + at.lane / COLUMNS;
    const float* from = values_of(s, at, first);
    float value[SWEEPS][VEC];
#pragma unroll
    for (int u = 0; u < SWEEPS; u++)
      if (first + u * ROWS < experts) load_values(value[u], s, at, from + u * ROWS * (int64_t)s.P);
    uint32_t own = 0;
#pragma unroll
    for (int u = 0; u < SWEEPS; u++)
#pragma unroll
      for (int i = 0; i < VEC; i++)
        if (first + u * ROWS < experts && !(value[u][i] < bound[i])) own += 1u << 8 * i;  // a NaN is not below
    uint32_t before = own;
#pragma unroll
    for (int step = COLUMNS; step < 32; step *= 2) {
      const uint32_t other = __shfl_up_sync(~0u, before, step);
      if (at.lane >= step) before += other;
    }
    const uint32_t all = __shfl_sync(~0u, before, 32 - COLUMNS + at.lane / VEC % COLUMNS) >> at.lane % VEC * 8 & 255;
    const int places = at.lane < PIXELS && all ? atomicAdd(&list.counts[at.lane], all) : 0;
    before -= own;
#pragma unroll
    for (int i = 0; i < VEC; i++) {
      int place = __shfl_sync(~0u, places, at.column + i) + (before >> 8 * i & 255);
#pragma unroll
      for (int u = 0; u < SWEEPS; u++)
        if (first + u * ROWS < experts && !(value[u][i] < bound[i]))
          list.add(at.column + i, place++, key_of(value[u][i]), first + u * ROWS);
    }
  }
}

// The same without a bound to begin with: lists are cut back when they are half full. One sweep at a time.
template <int CAPACITY>
__device__ void list_best(const Selection& s, const Place& at, const List<CAPACITY>& list, uint32_t* floors) {
  uint32_t* keys = list.all_keys + at.pixel * List<CAPACITY>::KEY_STRIDE;
  uint16_t* ids = list.all_ids + at.pixel * List<CAPACITY>::ID_STRIDE;
  const int begun = min(CAPACITY, s.N);
  for (int expert = at.row; expert < begun; expert += ROWS) {
    float value[VEC];
    if (at.column >= at.here) break;
    load_values(value, s, at, values_of(s, at, expert));
#pragma unroll
    for (int i = 0; i < VEC; i++) list.add(at.column + i, expert, key_of(value[i]), expert);
  }
  __syncthreads();
  const int room = CAPACITY - s.K, some = s.K + min(s.K, room / 4);  // before the end, a list is cut back roughly
  auto cut_back = [&](int count, bool numbered) {
    uint32_t lowest;
    const int left = keep_best(keys, ids, count, s.K, some, numbered, &lowest);
    if (at.lane == 0) list.counts[at.pixel] = left, floors[at.pixel] = lowest;
  };
  cut_back(begun, true);
  __syncthreads();
  for (int base = CAPACITY; base < s.N; base += ROWS) {
    const int expert = base + at.row;
    uint32_t waiting = at.column < at.here && expert < s.N ? (1 << VEC) - 1 : 0;
    float value[VEC];
    if (waiting) load_values(value, s, at, values_of(s, at, expert));
    // What is listed has lower numbers than this sweep's values, so that these enter only if they are larger than the lowest
    // kept one; in a second round, after others of the sweep have come in, equal ones must too.
    bool equal_too = false, again = true;
    while (again) {
#pragma unroll
      for (int i = 0; i < VEC; i++) {
        if (!(waiting >> i & 1)) continue;
        const uint32_t key = key_of(value[i]), floor = floors[at.column + i];
        if (key > floor || (equal_too && key == floor)) {
          const int place = atomicAdd(&list.counts[at.column + i], 1);
          if (place >= CAPACITY) continue;  // waits until the list has been cut back
          list.add(at.column + i, place, key, expert);
        }
        waiting &= ~(1u << i);
      }
      again = __syncthreads_or(waiting != 0);
      equal_too = true;
      const int listed = min(list.counts[at.pixel], CAPACITY);
      __syncwarp();
      if (listed > s.K + room / 2) cut_back(listed, false);
      __syncthreads();
    }
  }
}

template <int CAPACITY, bool BY_RANK>
__global__ void __launch_bounds__(THREADS, CAPACITY == 1024 ? 2 : 1) streaming_kernel(const Selection s, int guess) {
  using L = List<CAPACITY>;
  extern __shared__ __align__(16) uint32_t memory[];
  __shared__ int counts[PIXELS];
  __shared__ uint32_t bounds[PIXELS];
  const L list{memory, reinterpret_cast<uint16_t*>(memory + PIXELS * L::KEY_STRIDE), counts};
  const Place at(s);
  uint32_t* keys = list.all_keys + at.pixel * L::KEY_STRIDE;
  uint16_t* ids = list.all_ids + at.pixel * L::ID_STRIDE;

  wait_for_earlier();
#pragma unroll
  for (int u = 0; u < SWEEPS; u++) {  // every so many-th value
    const int sample = at.row + u * ROWS;
    float value[VEC] = {};
    if (at.column < at.here) load_values(value, s, at, values_of(s, at, static_cast<uint32_t>(sample) * s.N / SAMPLE));
#pragma unroll
    for (int i = 0; i < VEC; i++) list.add(at.column + i, sample, key_of(value[i]), 0);
  }
  __syncthreads();
  int kept;
  const uint32_t bound = find_bound(keys, s.deviations, SAMPLE, guess, guess + guess / 8, &kept);
  if (at.lane == 0) bounds[at.pixel] = bound, counts[at.pixel] = 0;
  __syncthreads();
  list_above(s, at, list, bounds);
  __syncthreads();
  const bool good = at.pixel >= at.here || (counts[at.pixel] >= s.K && counts[at.pixel] <= CAPACITY);
  if (!__syncthreads_and(good)) {
    list_best(s, at, list, bounds);
    __syncthreads();
  }
  if (at.pixel < at.here) {
    uint32_t lowest;
    keep_best(keys, ids, counts[at.pixel], s.K, s.K, false, &lowest);
    if (BY_RANK)
      sort_list<uint64_t>(keys, ids, s.K);
    else
      sort_list<uint32_t>(keys, ids, s.K);
  }
  write_selection(s, at, list.all_keys, L::KEY_STRIDE);
}

template <int CAPACITY, bool BY_RANK>
int launch_streaming(const Selection& s, cudaStream_t stream) {
  constexpr int BYTES = List<CAPACITY>::BYTES;
  const cudaError_t status =
      cudaFuncSetAttribute(streaming_kernel<CAPACITY, BY_RANK>, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES);
  if (status != cudaSuccess) return status;
  // The sample has `expected` of the selected values, give or take the square root. Four times that more are let pass, and
  // no more than fill three quarters of the list.
  const double expected = static_cast<double>(s.K) * SAMPLE / s.N;
  int spread = 0;
  while (spread * spread < expected * 16) spread++;
  int guess = static_cast<int>(expected) + spread + 4;
  const int most = static_cast<int>(0.75 * CAPACITY * SAMPLE / s.N);
  if (guess > most) guess = most > 1 ? most : 1;
  const unsigned blocks = s.choices * ((s.P + PIXELS - 1) / PIXELS);
  return launch_early(streaming_kernel<CAPACITY, BY_RANK>, blocks, THREADS, BYTES, stream, s, guess);
}

}  // namespace

int select_streaming(const Selection& s, cudaStream_t stream) {
  if (s.K <= 256) return s.by_rank ? launch_streaming<1024, true>(s, stream) : launch_streaming<1024, false>(s, stream);
  return s.by_rank ? launch_streaming<2048, true>(s, stream) : launch_streaming<2048, false>(s, stream);
}

}  // namespace smoe
