// The plan of a routing: which experts the pixels of each window select, and where in that list each selection stands.
//
// One CTA makes one window, in shared memory: every selection marks its expert with the bits of the sub-windows it lies in,
// the marked experts are listed by number and, where masks are wanted, sorted by counting (for taps those that most of them
// need first, for tiles in the order of a Gray code), and every selection looks up its place. All three kinds of windows are
// made by one launch, the largest windows first.
#include <algorithm>

#include "plan_sort.cuh"

namespace smoe {
namespace {

constexpr int MOST_STAGED = 32 << 10;  // bytes of selections kept in shared memory between marking and looking up
constexpr int MOST_SHARED = 227 << 10;
constexpr int FEW_WINDOWS = 2048;  // up to which a CTA of more threads is worth what they cost
constexpr int LEFT_OUT = 0xffff;
constexpr int AT_ONCE = 4;  // loads of selections that a thread has in flight

enum Kind { FORWARD, INPUT_GRAD, WEIGHT_GRAD };

struct Family {
  int* counts;
  int* ids;
  uint16_t* masks;
  uint16_t* slots;
  int kind, tiles_y, tiles_x, step_h, step_w, first, rows, columns, cap, bits;
};

struct PlanTask {
  Family family[3];
  const int* index;
  Shape shape;  // of a convolution; B and C are not used
  int choices, sub_rows, sub_columns;
};

// The sub-windows that window pixel (u, v) lies in, a bit each; 0: nobody reads it.
__device__ uint32_t bits_of_pixel(const Family& f, const PlanTask& task, int ty, int tx, int u, int v) {
  if (f.kind == FORWARD) return 1;
  if (f.kind == WEIGHT_GRAD) return 1u << (u / task.sub_rows * (f.columns / task.sub_columns) + v / task.sub_columns);
  const int reach = task.shape.ksize - 1;
  const int inside_h = min(f.step_h, task.shape.Hi - ty * f.step_h), inside_w = min(f.step_w, task.shape.Wi - tx * f.step_w);
  if (u >= inside_h + reach || v >= inside_w + reach) return 0;
  if (f.bits == 0) return 0xffff;
  uint32_t mask = 0;
  for (int i = 0; i <= reach; i++)
    for (int j = 0; j <= reach; j++) {
      const int r = u - (reach - i), c = v - (reach - j);
      if (r >= 0 && r < inside_h && c >= 0 && c < inside_w) mask |= 1u << (i * (reach + 1) + j);
    }
  return mask;
}

// Number of the output pixel at place (u, v) of the window, or -1 outside the map.
__device__ int pixel_at(const Family& f, const Shape& s, int ty, int tx, int u, int v) {
  const int h = ty * f.step_h + f.first + u;
  int w = tx * f.step_w + f.first + v;
  if (f.kind == INPUT_GRAD && s.wrap) w = (w % s.Wo + s.Wo) % s.Wo;
  return h >= 0 && h < s.Ho && w >= 0 && w < s.Wo ? h * s.Wo + w : -1;
}

struct Memory {
  uint16_t* table;       // [N] mask of each expert, later its place in the list
  uint16_t* list;        // [cap] experts by number, if they fit
  Tally tally;
  int* pixels;           // [window pixels] number of the output pixel or -1
  uint16_t* pixel_bits;  // [window pixels]
  uint16_t* staged;      // [window pixels * K] selected experts, if they fit
};

// The place of a thread among the selections of a window, VEC at a time: entry = pixel * K + k.
template <int THREADS, int VEC>
struct Walk {
  int entry, pixel, group, groups, step, rest;
  __device__ explicit Walk(int K) : entry(threadIdx.x * VEC), groups(K / VEC) {
    pixel = threadIdx.x / groups, group = threadIdx.x % groups;
    step = THREADS / groups, rest = THREADS % groups;
  }
  __device__ void advance() {
    entry += THREADS * VEC, pixel += step, group += rest;
    if (group >= groups) pixel++, group -= groups;
  }
};

template <int VEC>
__device__ __forceinline__ void load_selections(int (&to)[VEC], const int* from) {
  if constexpr (VEC == 4) {
    const int4 four = __ldg(reinterpret_cast<const int4*>(from));
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
  } else {
    to[0] = __ldg(from);
  }
}

template <int VEC>
__device__ __forceinline__ void load_staged(int (&to)[VEC], const uint16_t* from) {
  if constexpr (VEC == 4) {
    const uint2 four = *reinterpret_cast<const uint2*>(from);
    to[0] = four.x & 0xffff, to[1] = four.x >> 16, to[2] = four.y & 0xffff, to[3] = four.y >> 16;
  } else {
    to[0] = from[0];
  }
}

template <int VEC>
__device__ __forceinline__ void store_slots(uint16_t* to, const uint32_t (&from)[VEC]) {
  if constexpr (VEC == 4)
    *reinterpret_cast<uint2*>(to) = make_uint2(from[0] | from[1] << 16, from[2] | from[3] << 16);
  else
    to[0] = from[0];
}

template <int T, int VEC>
__global__ void __launch_bounds__(T, 1280 / T) plan_kernel(const __grid_constant__ PlanTask task, int most_pixels,
                                                        int most_listed) {
  constexpr int THREADS = Team<T>::THREADS, WARPS = Team<T>::WARPS, BINS = Team<T>::BINS;
  extern __shared__ __align__(16) char shared[];
  __shared__ int warp_sums[WARPS];
  const int N = task.shape.N, K = task.shape.K;

  int which = WEIGHT_GRAD, window = blockIdx.x;
  while (window >= task.choices * task.family[which].tiles_y * task.family[which].tiles_x) {
    window -= task.choices * task.family[which].tiles_y * task.family[which].tiles_x;
    which--;
  }
  const Family& f = task.family[which];
  const int tiles = f.tiles_y * f.tiles_x, pixels = f.rows * f.columns;
  const int ty = window % tiles / f.tiles_x, tx = window % f.tiles_x;
  const int* index = task.index + (int64_t)(window / tiles) * task.shape.Ho * task.shape.Wo * K;

  Memory m;
  m.table = reinterpret_cast<uint16_t*>(shared);
  m.list = m.table + (N + 7) / 8 * 8;
  m.tally.counts = m.list + most_listed;
  m.tally.bin_start = m.tally.counts + BINS * WARPS;
  m.pixels = reinterpret_cast<int*>(m.tally.bin_start + BINS);
  m.pixel_bits = reinterpret_cast<uint16_t*>(m.pixels + most_pixels);
  m.staged = m.pixel_bits + most_pixels;
  const bool staged = pixels * K * 2 <= MOST_STAGED;

  for (int i = threadIdx.x; i < (N + 7) / 8; i += THREADS) reinterpret_cast<uint4*>(m.table)[i] = make_uint4(0, 0, 0, 0);
  for (int i = threadIdx.x; i < pixels; i += THREADS) {
    const uint32_t bits = bits_of_pixel(f, task, ty, tx, i / f.columns, i % f.columns);
    m.pixels[i] = bits ? pixel_at(f, task.shape, ty, tx, i / f.columns, i % f.columns) : -1;
    m.pixel_bits[i] = bits;
  }
  __syncthreads();

  const Walk<T, VEC> begin(K);
  for (Walk<T, VEC> walk = begin; walk.pixel < pixels;) {
    int experts[AT_ONCE][VEC], entries[AT_ONCE], bits[AT_ONCE];  // loads of several steps in flight
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++, walk.advance()) {
      const int from = walk.pixel < pixels ? m.pixels[walk.pixel] : -1;
      entries[i] = walk.pixel < pixels ? walk.entry : -1;
      bits[i] = walk.pixel < pixels ? m.pixel_bits[walk.pixel] : 0;
      if (from >= 0)
        load_selections<VEC>(experts[i], index + (int64_t)from * K + walk.group * VEC);
      else
        for (int v = 0; v < VEC; v++) experts[i][v] = LEFT_OUT;
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      uint32_t kept[VEC];
#pragma unroll
      for (int v = 0; v < VEC; v++) {
        const uint32_t expert = experts[i][v];
        kept[v] = expert < (uint32_t)N ? expert : LEFT_OUT;
        if (expert < (uint32_t)N && (m.table[expert] & bits[i]) != bits[i])
          atomicOr(reinterpret_cast<uint32_t*>(m.table) + expert / 2, bits[i] << (expert % 2 * 16));
      }
      if (staged && entries[i] >= 0) store_slots<VEC>(m.staged + entries[i], kept);
    }
  }
  __syncthreads();

  int* ids = f.ids + (int64_t)window * f.cap;
  uint16_t* masks = f.masks ? f.masks + (int64_t)window * f.cap : nullptr;
  uint16_t* slots = f.slots + (int64_t)window * pixels * K;
  auto settle = [&](int place, int expert, uint32_t mask) {
    ids[place] = expert;
    if (masks) masks[place] = mask;
    m.table[expert] = place;
  };
  int count;
  if (f.bits == 0) {
    count = list_marked<T>(m.table, N, warp_sums, settle);
  } else {
    uint16_t* list = most_listed ? m.list : slots;  // which are written last
    count = list_marked<T>(m.table, N, warp_sums, [&](int place, int expert, uint32_t) { list[place] = expert; });
    if (f.kind == INPUT_GRAD) {
      auto digit = [](uint32_t mask) { return ORDERS.tap_mask[mask]; };
      sort_pass<T>(m.table, m.tally, list, count, warp_sums, digit, settle);
    } else if (f.bits <= SHORT_MASK) {
      auto digit = [](uint32_t mask) { return gray_rank(mask); };
      sort_pass<T>(m.table, m.tally, list, count, warp_sums, digit, settle);
    } else {
      auto low = [](uint32_t mask) { return gray_rank(mask) & 255; };
      auto high = [](uint32_t mask) { return gray_rank(mask) >> 8; };
      auto relist = [&](int place, int expert, uint32_t) { slots[place] = expert; };
      sort_pass<T>(m.table, m.tally, list, count, warp_sums, low, relist);
      sort_pass<T>(m.table, m.tally, slots, count, warp_sums, high, settle);
    }
  }
  if (threadIdx.x == 0) f.counts[window] = count;
  for (int i = count + threadIdx.x; i < f.cap; i += THREADS) {
    ids[i] = 0;
    if (masks) masks[i] = 0;
  }

  for (Walk<T, VEC> walk = begin; walk.pixel < pixels; walk.advance()) {
    uint32_t places[VEC];
    int experts[VEC];
    const int from = staged ? -1 : m.pixels[walk.pixel];
    if (staged)
      load_staged<VEC>(experts, m.staged + walk.entry);
    else if (from >= 0)
      load_selections<VEC>(experts, index + (int64_t)from * K + walk.group * VEC);
    else
      for (int v = 0; v < VEC; v++) experts[v] = LEFT_OUT;
#pragma unroll
    for (int v = 0; v < VEC; v++) places[v] = (uint32_t)experts[v] < (uint32_t)N ? m.table[experts[v]] : LEFT_OUT;
    store_slots<VEC>(slots + walk.entry, places);
  }
}

// Shared memory of a CTA.
struct Sizes {
  int most_pixels = 0, most_listed = 0, staged = 0;
  size_t bytes(int N, int threads) const {
    const int sorted = 4 * threads * (threads / 32 + 1);
    return (size_t)((N + 7) / 8 * 8 + most_listed + sorted) * 2 + (size_t)most_pixels * 6 + staged;
  }
};

template <int T, int VEC>
int launch_plan(const PlanTask& task, int64_t windows, const Sizes& sizes, cudaStream_t stream) {
  const int bytes = static_cast<int>(sizes.bytes(task.shape.N, T));
  const cudaError_t status =
      cudaFuncSetAttribute(plan_kernel<T, VEC>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  plan_kernel<T, VEC><<<static_cast<unsigned>(windows), T, bytes, stream>>>(task, sizes.most_pixels, sizes.most_listed);
  return cudaGetLastError();
}

template <int T>
int choose_loads(const PlanTask& task, int64_t windows, const Sizes& sizes, cudaStream_t stream) {
  if (task.shape.K % 4 == 0) return launch_plan<T, 4>(task, windows, sizes, stream);
  return launch_plan<T, 1>(task, windows, sizes, stream);
}

}  // namespace
}  // namespace smoe

// Makes the windows of a routing. index [S, Ho Wo, K]; tables as in `Windows`, the slots of a window as [pixels, K]. Tiles of
// the forward windows are tile_rows x tile_columns output pixels, of the input gradient's input_rows x input_columns input
// pixels plus the halo; regions of the weight gradient are region_rows x region_columns pixels, whole tiles, at most 16.
// A selection outside 0..N-1 is left out. UNSUPPORTED: more than 65535 experts, or windows too large for shared memory.
extern "C" int smoe_plan(
    const int* index, int choices, int Hi, int Wi, int Ho, int Wo, int N, int K, int ksize, int off, int wrap, int tile_rows,
    int tile_columns, int input_rows, int input_columns, int region_rows, int region_columns, int* forward_counts,
    int* forward_ids, uint16_t* forward_slots, int* input_counts, int* input_ids, uint16_t* input_masks, uint16_t* input_slots,
    int* weight_counts, int* weight_ids, uint16_t* weight_masks, uint16_t* weight_slots, cudaStream_t stream) {
  using namespace smoe;
  const int subs = region_rows / tile_rows * (region_columns / tile_columns), taps = ksize * ksize;
  if (N > 65535 || subs < 1 || subs > 16) return UNSUPPORTED;
  PlanTask task{};
  task.index = index, task.choices = choices, task.sub_rows = tile_rows, task.sub_columns = tile_columns;
  task.shape = {0, 0, Hi, Wi, Ho, Wo, N, K, 0, ksize, off, wrap};
  int64_t windows = 0;
  Sizes sizes;
  auto add = [&](int kind, int* counts, int* ids, uint16_t* masks, uint16_t* slots, int h, int w, int step_h, int step_w,
                 int halo, int first, int bits) {
    const int rows = step_h + halo, columns = step_w + halo, tiles_y = (h + step_h - 1) / step_h;
    const int tiles_x = (w + step_w - 1) / step_w;
    const int64_t entries = (int64_t)rows * columns * K;
    const int cap = static_cast<int>((N < entries ? N : entries) + 15) / 16 * 16;
    task.family[kind] = {counts, ids, masks, slots, kind, tiles_y, tiles_x, step_h, step_w, first, rows, columns, cap, bits};
    windows += (int64_t)choices * tiles_y * tiles_x;
    sizes.most_pixels = std::max(sizes.most_pixels, (rows * columns + 7) / 8 * 8);
    if (bits) sizes.most_listed = std::max(sizes.most_listed, cap);
    if (entries * 2 <= MOST_STAGED) sizes.staged = std::max(sizes.staged, static_cast<int>(entries * 2));
  };
  add(FORWARD, forward_counts, forward_ids, nullptr, forward_slots, Ho, Wo, tile_rows, tile_columns, 0, 0, 0);
  add(INPUT_GRAD, input_counts, input_ids, input_masks, input_slots, Hi, Wi, input_rows, input_columns, ksize - 1,
      off - (ksize - 1), taps <= SHORT_MASK ? taps : 0);
  add(WEIGHT_GRAD, weight_counts, weight_ids, weight_masks, weight_slots, Ho, Wo, region_rows, region_columns, 0, 0, subs);
  const bool few = windows <= FEW_WINDOWS;
  const int threads = few ? 256 : 128;
  if (sizes.bytes(N, threads) > MOST_SHARED && subs <= SHORT_MASK) sizes.most_listed = 0;
  if (sizes.bytes(N, threads) > MOST_SHARED || windows > INT32_MAX) return UNSUPPORTED;
  if (windows == 0) return 0;
  return few ? choose_loads<256>(task, windows, sizes, stream) : choose_loads<128>(task, windows, sizes, stream);
}
