// dw[e f, tap, c] = sum over the pixels that select e of g times the shifted x, portably. A CTA takes one region of the map,
// some samples, a block of up to 128 columns of the region's union of experts, up to three neighbouring taps of one row and one
// row of shared memory of channels, and sums over all pixels and samples in registers.
//
// Fast: the sums are added to dw by atomic additions. In order: the regions are dealt out to a few parts, each with its own
// copy of dw; within a part a row of dw is added to in the order of the regions, each CTA waiting until the regions before it
// that have this row are done; at last the parts are added up. CTAs take their work by a ticket, so that whoever is waited for
// has started. Then the result is the same to the last bit at every run.
#include "weight_cut.cuh"
#include "weight_sums.cuh"

namespace smoe::portable {

template <class T>
constexpr bool STAGED = sizeof(T) == 2;  // there is room for values of g on their way

template <class T>
struct WeightGradTask {
  Map<T> x, g;
  float* out;             // [parts, N F, taps, C]
  Shape shape;
  Windows windows;
  Layout layout;          // of a sub-tile
  int choices, chunks, chunks_per_group, groups;
  int shares, tap_groups, channel_blocks;
  int parts, words;       // 0 parts: atomic additions
  unsigned* ticket;
  unsigned* turns;        // [parts, ksize, tap_groups, channel_blocks, N F]: regions done
  Divisor filters;
  uint32_t* presence;     // [parts, N, words]: a bit for each of the part's regions that has the expert
};

struct Tables {  // of a block of columns, in shared memory
  int rows[MOST_COLUMNS];          // of dw; -1: none
  unsigned turn[MOST_COLUMNS];     // regions before this one that have the row
  uint32_t masks[8];               // of 16 columns each
  unsigned ticket;
};
static_assert(sizeof(Tables) <= TABLES);

struct Item {  // what one CTA does
  int window, group, share, tap_row, first_tap, taps, first_channel, turns;
};

template <class T>
__device__ Item find_item(const WeightGradTask<T>& task, unsigned number) {
  Item item;
  item.share = number % task.shares, number /= task.shares;
  const int channel_block = number % task.channel_blocks;
  number /= task.channel_blocks;
  const int tap_group = number % task.tap_groups;
  number /= task.tap_groups;
  item.tap_row = number % task.shape.ksize, number /= task.shape.ksize;
  item.group = number % task.groups, item.window = number / task.groups;
  item.first_tap = tap_group * MOST_TAPS, item.taps = min(MOST_TAPS, task.shape.ksize - item.first_tap);
  item.first_channel = channel_block * DEPTH<T>;
  item.turns = (item.tap_row * task.tap_groups + tap_group) * task.channel_blocks + channel_block;
  return item;
}

// Rows of dw, masks and turns of the columns from `first` on.
template <class T>
__device__ void fill_tables(const WeightGradTask<T>& task, const Item& item, Tables& tables, int first, int columns) {
  const Shape& s = task.shape;
  const Windows& v = task.windows;
  if (threadIdx.x >= MOST_COLUMNS) return;
  const int column = first + threadIdx.x, slot = task.filters.of(column);
  const bool there = (int)threadIdx.x < columns;
  const int64_t at = (int64_t)item.window * v.cap + slot;
  const int expert = there ? v.ids[at] : 0;
  uint32_t mask = !there ? 0 : v.masks ? v.masks[at] : ~0u;
#pragma unroll
  for (int other = 8; other > 0; other /= 2) mask |= __shfl_xor_sync(~0u, mask, other);
  if (threadIdx.x % 16 == 0) tables.masks[threadIdx.x / 16] = mask;
  tables.rows[threadIdx.x] = there ? expert * s.F + column - slot * s.F : -1;
  if (task.parts > 0 && there) {
    const int part = item.window % task.parts, number = item.window / task.parts;
    const uint32_t* bits = task.presence + ((int64_t)part * s.N + expert) * task.words;
    int before = __popc(bits[number / 32] & ((1u << number % 32) - 1));
    for (int word = 0; word < number / 32; word++) before += __popc(bits[word]);
    tables.turn[threadIdx.x] = before * task.groups + item.group;
  }
}

template <class T, class Sum>
__device__ __forceinline__ void sum_columns(const WeightGradTask<T>& task, const Item& item, const Tables& tables, char* shared,
                                            Sum& sums, int first, int columns) {
  constexpr int G_BYTES = TILE_ROWS * MOST_COLUMNS * (int)sizeof(T);
  const Shape& s = task.shape;
  const Windows& v = task.windows;
  const Layout& l = task.layout;
  char *g_rows = shared + TABLES, *x_rows = g_rows + G_BYTES, *raw = shared + l.staging;
  const int window = item.window % (v.tiles_y * v.tiles_x), across = v.columns / l.columns, subs = v.rows / l.rows * across;
  const int first_chunk = item.group * task.chunks_per_group;
  const int last_chunk = min(first_chunk + task.chunks_per_group, task.chunks);
  for (int sub = 0; sub < subs; sub++) {
    const uint32_t mask = lane_number() < MOST_COLUMNS / 16 ? tables.masks[lane_number()] : 0;
    const uint32_t active = __ballot_sync(~0u, mask >> sub & 1);
    const int sub_top = sub / across * l.rows, sub_left = sub % across * l.columns;
    const int h0 = window / v.tiles_x * v.step_h + v.first + sub_top, w0 = window % v.tiles_x * v.step_w + v.first + sub_left;
    if (active == 0 || h0 >= s.Ho || w0 >= s.Wo) continue;
    for (int chunk = first_chunk; chunk < last_chunk; chunk++) {
      const int first_sample = task.choices > 1 ? item.window / (v.tiles_y * v.tiles_x) : chunk << l.log_batch;
      const int samples = min(l.batch(), s.B - first_sample);
      __syncthreads();  // everyone is done with what lies in shared memory
      load_patch(x_rows, task.x, l, l.rows, h0 + item.tap_row - s.off, w0 + item.first_tap - s.off, first_sample,
                 samples, item.first_channel);
      commit_copies();
      clear_rows(g_rows, G_BYTES / ROW);
      __syncthreads();
      auto locate = [&](int q, const uint16_t*& slots, int64_t& offset) {
        const int r = q >> l.log_columns, c = q & (l.columns - 1);
        slots = v.slots + ((int64_t)item.window * v.rows * v.columns + (sub_top + r) * v.columns + sub_left + c) * s.K;
        offset = task.g.offset(first_sample, h0 + r, w0 + c);
        return task.g.has(h0 + r, w0 + c);
      };
      const Gradient<T> g{task.g.data, (int64_t)s.Ho * s.Wo * s.K * s.F, s.K, samples, task.filters, task.g.aligned};
      expand<STAGED<T>>(g_rows, TILE_ROWS * ROW, raw, g, l.rows * l.columns, l.log_batch, first, columns, locate);
      wait_copies<0>();
      __syncthreads();
      sums.add(x_rows, g_rows, l, active);
    }
  }
}

template <class T, class Sum>
__device__ __forceinline__ void store_sums(const WeightGradTask<T>& task, const Item& item, const Tables& tables,
                                           const Sum& sums) {
  const Shape& s = task.shape;
  const int64_t all_rows = (int64_t)s.N * s.F;
  const int part = task.parts > 0 ? item.window % task.parts : 0, taps = s.ksize * s.ksize;
  float* out = task.out + part * all_rows * taps * s.C + (int64_t)(item.tap_row * s.ksize + item.first_tap) * s.C;
  unsigned* turns = task.turns + ((int64_t)part * s.ksize * task.tap_groups * task.channel_blocks + item.turns) * all_rows;
  const int row = threadIdx.x < MOST_COLUMNS ? tables.rows[threadIdx.x] : -1;
  if (task.parts > 0) {
    if (row >= 0)
      while (*(volatile unsigned*)(turns + row) != tables.turn[threadIdx.x]) __nanosleep(32);
    __threadfence();
    __syncthreads();
  }
  sums.each([&](int tap, int column, int inside, float4 four) {
    const int to_row = tables.rows[column], channel = item.first_channel + inside;
    if (to_row < 0 || channel >= s.C || tap >= item.taps) return;
    float* to = out + (int64_t)to_row * taps * s.C + tap * s.C + channel;
    const bool is_first = task.parts > 0 && tables.turn[column] == 0;
    if (s.C % 4 == 0) {
      if (is_first)
        __stcg(reinterpret_cast<float4*>(to), four);
      else
        add_four(to, four);
      return;
    }
    const float numbers[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (channel + i < s.C) {
        if (is_first)
          __stcg(to + i, numbers[i]);
        else
          atomicAdd(to + i, numbers[i]);
      }
  });
  if (task.parts > 0) {
    __threadfence();
    __syncthreads();
    if (row >= 0) *(volatile unsigned*)(turns + row) = tables.turn[threadIdx.x] + 1;
  }
}

template <class T, int TAPS>
__global__ void __launch_bounds__(THREADS, 2) weight_grad_kernel(const __grid_constant__ WeightGradTask<T> task) {
  extern __shared__ __align__(128) char shared[];
  Tables& tables = *reinterpret_cast<Tables*>(shared);
  if (task.parts > 0) {
    if (threadIdx.x == 0) tables.ticket = atomicAdd(task.ticket, 1u);
    __syncthreads();
  }
  const Item item = find_item(task, task.parts > 0 ? tables.ticket : blockIdx.x);
  const int all = task.windows.counts[item.window] * task.shape.F, blocks = (all + MOST_COLUMNS - 1) / MOST_COLUMNS;
  for (int block = item.share; block < blocks; block += task.shares) {
    const int first = block * MOST_COLUMNS, columns = min(MOST_COLUMNS, all - first);
    __syncthreads();
    fill_tables(task, item, tables, first, columns);
    __syncthreads();
    Sums<T, TAPS> sums;
    sums.clear();
    sum_columns(task, item, tables, shared, sums, first, columns);
    store_sums(task, item, tables, sums);
  }
}

template <class T>
int launch_weight_grad(const void* x, const void* g, float* dw, const Shape& s, const Windows& v, const Tile& tile, int choices,
                       int type, int processors, void* workspace, int64_t workspace_bytes, bool ordered, cudaStream_t stream) {
  const Cut cut(s, v, tile, choices, type, processors, ordered);
  const int halo = s.ksize == 1 ? 0 : MOST_TAPS - 1;  // taps beyond the last are summed too, and dropped
  const int64_t rows = (int64_t)s.N * s.F, size = rows * s.ksize * s.ksize * s.C;
  const int64_t items = cut.windows * cut.groups * s.ksize * cut.tap_groups * cut.channel_blocks * cut.shares;
  WeightGradTask<T> task{{static_cast<const T*>(x), s.Hi, s.Wi, s.C, s.wrap, is_aligned(x, s.C * sizeof(T))},
                         {static_cast<const T*>(g), s.Ho, s.Wo, s.K * s.F, 0, is_aligned(g, (int64_t)s.K * s.F * sizeof(T))},
                         dw, s, v, {}, choices, cut.chunks, cut.chunks_per_group, cut.groups,
                         cut.shares, cut.tap_groups, cut.channel_blocks, cut.parts, cut.words, nullptr, nullptr, divisor(s.F),
                         nullptr};
  if (!lay_out(tile, halo, task.layout) || (choices > 1 && (choices != s.B || tile.batch != 1)) || v.rows % tile.rows != 0 ||
      v.columns % tile.columns != 0 || items > INT32_MAX || !rows_fit(s) || cut.bytes > workspace_bytes)
    return UNSUPPORTED;
  if (size == 0) return 0;
  if constexpr (std::is_same_v<T, float>)
    if (cut.few > 0 && cut.few <= workspace_bytes)
      return launch_few_weight_grad(task.x.data, task.g.data, dw, s, v, choices, static_cast<float*>(workspace), stream);
  const int g_bytes = TILE_ROWS * MOST_COLUMNS * (int)sizeof(T), patch = tile.rows * (tile.columns + halo) * tile.batch * ROW;
  task.layout.staging = TABLES + g_bytes + patch;
  const int bytes = task.layout.staging + (STAGED<T> ? UNITS : 0);
  if (bytes > MOST_SHARED) return UNSUPPORTED;

  const bool parted = cut.parts > 0;
  cudaError_t status = cudaMemsetAsync(parted ? workspace : dw, 0, parted ? cut.head : size * 4, stream);
  if (status != cudaSuccess) return status;
  if (cut.parts > 0) {
    task.ticket = static_cast<unsigned*>(workspace);
    task.presence = task.ticket + 4;
    task.turns = task.presence + (int64_t)cut.parts * s.N * cut.words;
    task.out = reinterpret_cast<float*>(static_cast<char*>(workspace) + cut.head);
  }
  if (items > 0) {
    if (cut.parts > 0) {
      mark_presence<<<(unsigned)cut.windows, 128, 0, stream>>>(v.counts, v.ids, v.cap, s.N, cut.parts, cut.words,
                                                               task.presence);
      if ((status = cudaGetLastError()) != cudaSuccess) return status;
    }
    auto kernel = halo == 0 ? weight_grad_kernel<T, 1> : weight_grad_kernel<T, MOST_TAPS>;
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (status != cudaSuccess) return status;
    kernel<<<(unsigned)items, THREADS, bytes, stream>>>(task);
    if ((status = cudaGetLastError()) != cudaSuccess) return status;
  }
  if (cut.parts == 0) return 0;
  add_parts<<<(unsigned)rows, 256, 0, stream>>>(task.out, task.presence, dw, s.N, s.F, cut.parts, cut.words,
                                                s.ksize * s.ksize * s.C);
  return cudaGetLastError();
}

}  // namespace smoe::portable

// Bytes of workspace that the weight gradient needs, 0 for most atomic additions; launches nothing.
extern "C" int smoe_weight_grad_portable_workspace(int64_t* bytes, const smoe::Shape* shape, const smoe::Windows* windows,
                                                   const smoe::Tile* tile, int choices, int type, int processors, int ordered,
                                                   cudaStream_t) {
  *bytes = smoe::portable::Cut(*shape, *windows, *tile, choices, type, processors, ordered != 0).bytes;
  return 0;
}

// dw [N F, taps, C], float32, from x [B, Hi, Wi, C] and g [B, Ho, Wo, K F], both of `type`. The windows are regions of whole
// tiles. `ordered`: the same bits at every run on a device of as many processors; else atomic additions. The workspace is
// 16-byte aligned. The rest as in smoe_forward_portable; too small a workspace is UNSUPPORTED too.
extern "C" int smoe_weight_grad_portable(const void* x, const void* g, float* dw, const smoe::Shape* shape,
                                         const smoe::Windows* windows, const smoe::Tile* tile, int choices, int type,
                                         int processors, void* workspace, int64_t workspace_bytes, int ordered,
                                         cudaStream_t stream) {
  using namespace smoe;
  auto launch = [&](auto number) {
    return portable::launch_weight_grad<decltype(number)>(x, g, dw, *shape, *windows, *tile, choices, type, processors,
                                                          workspace, workspace_bytes, ordered != 0, stream);
  };
  return portable::of_type(type, launch);
}
