// The plan of a routing: which experts the pixels of each window select, and where in that list each selection stands.
//
// A team of threads makes one window, in shared memory: every selection marks its expert with the bits of the sub-windows it
// lies in, the marked experts are listed by number and, where masks are wanted, sorted by counting (for taps those that most of
// them need first, for tiles in the order of a Gray code), and every selection looks up its place. All three kinds of windows
// are made by one launch, the largest windows first. Where the input gradient's tiles are those of the forward, which then
// are the middles of its windows, a team makes both at once.
#include <algorithm>

#include "window.cuh"

namespace smoe {
namespace {

constexpr int MOST_STAGED = 32 << 10;  // bytes of selections kept in shared memory between marking and looking up
constexpr int MOST_SHARED = 227 << 10;
constexpr int CTAS = 4;  // that run together on a multiprocessor
constexpr int FEW_WINDOWS = 1024;  // up to which a team of more threads is worth what they cost
constexpr int FEW_ENTRIES = 512, FEW_EXPERTS = 1024;  // up to which a warp makes a window by itself

template <int T, int VEC, int KIND>
__device__ __forceinline__ void make_windows(const PlanTask& task, int block) {
  const int window = block * Team<T>::NUMBER + Team<T>::number();
  if (window < task.family[KIND].windows) make_window<T, VEC, KIND>(task, window);
}

template <int VEC>
__global__ void __launch_bounds__(BLOCK, CTAS) plan_kernel(const __grid_constant__ PlanTask task) {
  int block = blockIdx.x;
  if (block < task.family[WEIGHT_GRAD].blocks) {
    if (task.family[WEIGHT_GRAD].team == 32) return make_windows<32, VEC, WEIGHT_GRAD>(task, block);
    return make_windows<BLOCK, VEC, WEIGHT_GRAD>(task, block);
  }
  block -= task.family[WEIGHT_GRAD].blocks;
  if (block < task.family[INPUT_GRAD].blocks) {
    if (task.family[INPUT_GRAD].team == 32) return make_windows<32, VEC, INPUT_GRAD>(task, block);
    if (task.family[INPUT_GRAD].team == 128) return make_windows<128, VEC, INPUT_GRAD>(task, block);
    return make_windows<BLOCK, VEC, INPUT_GRAD>(task, block);
  }
  block -= task.family[INPUT_GRAD].blocks;
  if (task.family[FORWARD].team == 32) return make_windows<32, VEC, FORWARD>(task, block);
  if (task.family[FORWARD].team == 128) return make_windows<128, VEC, FORWARD>(task, block);
  make_windows<BLOCK, VEC, FORWARD>(task, block);
}

// Divides a team's shared memory; returns its bytes.
int lay_out(Family& f, int N, int K, int team, bool together, int lists) {
  const int warps = team / 32, pixels = f.rows * f.columns, table = (N + 8) / 8 * 16;
  int bytes = table;
  const auto take = [&](int more) {
    const int at = bytes;
    bytes += (more + 15) / 16 * 16;
    return at;
  };
  f.team = team;
  f.centre_table_at = together ? take(table) : 0;
  f.list_at = lists > 0 ? take(f.cap * 2) : 0;
  f.second_list_at = lists > 1 ? take(f.cap * 2) : 0;
  f.tally_at = take((warps * 8 + 15) / 16 * 16 + (f.bits ? BINS * 2 * (warps + 1) : 0));
  f.pixels_at = take(pixels * 8);
  const int64_t staged = (int64_t)pixels * K * 2;
  f.staged_at = staged <= MOST_STAGED ? take(static_cast<int>(staged)) : 0;
  f.team_bytes = bytes;
  return bytes;
}

template <int VEC>
int launch_plan(PlanTask& task, int64_t blocks, int bytes, cudaStream_t stream) {
  task.by_groups = Divider(task.shape.K / VEC);
  const cudaError_t status = cudaFuncSetAttribute(plan_kernel<VEC>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  return launch_early(plan_kernel<VEC>, static_cast<unsigned>(blocks), BLOCK, bytes, stream, task);
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
  task.index = index, task.choices = choices, task.subs_across = region_columns / tile_columns;
  task.by_sub_rows = Divider(tile_rows), task.by_sub_columns = Divider(tile_columns);
  task.shape = {0, 0, Hi, Wi, Ho, Wo, N, K, 0, ksize, off, wrap};
  task.together = tile_rows == input_rows && tile_columns == input_columns && Hi == Ho && Wi == Wo && off == ksize / 2 &&
                  ksize > 1 && taps <= SHORT_MASK;
  int64_t blocks = 0;
  int most_bytes = 0;
  const auto add = [&](int kind, int* counts, int* ids, uint16_t* masks, uint16_t* slots, int h, int w, int step_h, int step_w,
                       int halo, int first, int bits) {
    Family& f = task.family[kind];
    const int rows = step_h + halo, columns = step_w + halo, tiles_y = (h + step_h - 1) / step_h;
    const int tiles_x = (w + step_w - 1) / step_w;
    const int64_t entries = (int64_t)rows * columns * K, windows = (int64_t)choices * tiles_y * tiles_x;
    const int cap = static_cast<int>((N < entries ? N : entries) + 15) / 16 * 16;
    f = {counts, ids, masks, slots, tiles_y, tiles_x, step_h, step_w, first, rows, columns, cap, bits};
    f.by_tiles = Divider(tiles_y * tiles_x), f.by_tiles_x = Divider(tiles_x), f.by_columns = Divider(columns);
    const bool together = kind == INPUT_GRAD && task.together;
    const int least = entries <= FEW_ENTRIES && N <= FEW_EXPERTS ? 32
                      : kind == FORWARD || (kind == INPUT_GRAD && windows > FEW_WINDOWS) ? 128 : BLOCK;
    const int most_lists = bits > SHORT_MASK ? 2 : bits ? 1 : 0;
    const int least_lists = bits > SHORT_MASK ? 1 : 0;  // one can be kept where slots are written last
    int bytes = BLOCK / least * lay_out(f, N, K, least, together, most_lists);
    if (bytes > MOST_SHARED / 4) bytes = lay_out(f, N, K, BLOCK, together, most_lists);
    if (bytes > MOST_SHARED) bytes = lay_out(f, N, K, BLOCK, together, least_lists);
    if (bytes > MOST_SHARED || windows > INT32_MAX) return false;
    const int64_t teams = BLOCK / f.team;
    f.windows = static_cast<int>(windows), f.blocks = static_cast<int>((windows + teams - 1) / teams);
    blocks += f.blocks, most_bytes = std::max(most_bytes, bytes);
    return true;
  };
  const auto add_input = [&] {
    return add(INPUT_GRAD, input_counts, input_ids, input_masks, input_slots, Hi, Wi, input_rows, input_columns, ksize - 1,
               off - (ksize - 1), taps <= SHORT_MASK ? taps : 0);
  };
  bool fits =
      add(WEIGHT_GRAD, weight_counts, weight_ids, weight_masks, weight_slots, Ho, Wo, region_rows, region_columns, 0, 0, subs);
  bool input_fits = add_input();
  if (!input_fits && task.together) {
    task.together = 0;
    input_fits = add_input();
  }
  fits = fits && input_fits;
  if (!task.together) {
    fits = fits && add(FORWARD, forward_counts, forward_ids, nullptr, forward_slots, Ho, Wo, tile_rows, tile_columns, 0, 0, 0);
  } else {
    Family& f = task.family[FORWARD];
    f.counts = forward_counts, f.ids = forward_ids, f.slots = forward_slots, f.rows = tile_rows, f.columns = tile_columns;
    f.cap = static_cast<int>(std::min<int64_t>(N, (int64_t)tile_rows * tile_columns * K) + 15) / 16 * 16;
  }
  if (!fits || blocks > INT32_MAX) return UNSUPPORTED;
  if (blocks == 0) return 0;
  return K % 4 == 0 ? launch_plan<4>(task, blocks, most_bytes, stream) : launch_plan<1>(task, blocks, most_bytes, stream);
}
