// The gradient of the input, for sm_90a: dx[pixel] = sum over taps and selections of g[pixel + off - tap] w[expert, tap].
//
// A tile of 128 rows (pixels of the input times samples) is a matrix product: what the pixels around it select, taken
// together, are the columns of the reduction, times the taps. A is g *expanded*: for 64 of the columns, a patch with a row
// for each output pixel of the window and sample, zero where that pixel did not select that column. One patch serves all
// taps, read at shifted rows. B is the columns' weights of that tap. Sixteen columns that no pixel of the sub-window
// of a tap selects are neither loaded nor multiplied; `masks` tells, and its order of columns makes such sixteens common.
//
// Four warpgroups: 0 loads weights into a ring of stages, 1 expands g into two patches, 2 and 3 multiply and store. The
// ring carries with each stage what to do with it, so that the multipliers know nothing of the plan.
//
// Tiles of eight samples have a kernel of their own, which is faster (octets.cu).
//
// A gradient that is not finite reaches the inputs that it reaches mathematically, and no others. Weights that are not
// finite also reach the pixels of the tile that did not select them (0 * inf).
#include "expand.cuh"
#include "octets.cuh"
#include "store.cuh"
#include "weights.cuh"
#include "hopper/wgmma.cuh"

namespace smoe::input_grad {
namespace {

// Where the products of a warpgroup stand.
struct Consumer {
  uint32_t stages, stage_full, stage_empty, patch_full, patch_empty;
  uint32_t patch, other_patch;
  Place stage;
  uint32_t patch_index = 0, patch_round = 0;
  uint32_t row, half;  // of A that this lane loads, less the shift; which 8 of 16 columns
  int previous;        // stage not yet released, or -1
};

__device__ __forceinline__ void load_step(const Consumer& c, uint32_t step, uint32_t (&a)[4]) {
  const uint32_t row = c.row + step / STEPS, piece = step % STEPS * 2 + c.half;
  load_matrices(a, c.patch + row * PATCH_ROW_BYTES + ((piece ^ row % 8) << 4));
}

// One stage; A fragments go to `a`, whose products of the stage before the last must be done. Steps that a stage lacks are
// multiplied too, zero by zero: a branch among the products would make them wait for each other. Returns the flags.
template <class T, int N>
__device__ __forceinline__ uint32_t multiply_stage(const Task& t, const Control* control, Consumer& c, float (&sum)[N / 2],
                                                   uint32_t (&a)[STEPS][4], int lane) {
  using Product = MatrixProduct<T, N, true>;
  barrier_wait(c.stage_full + 8 * c.stage.index, c.stage.round);
  fence_for_matrix_unit();  // here, for it would make those who copy wait for their copies
  const uint4 note = *(const uint4*)&control->notes[c.stage.index];
  const uint32_t flags = note.z, steps = flags & 0xff, b = c.stages + c.stage.index * STEPS * STEP_BYTES<N>;
  if (flags & FIRST) barrier_wait(c.patch_full + 8 * c.patch_index, c.patch_round);
#pragma unroll
  for (int k = 0; k < STEPS; k++) {
    load_step(c, (k < 2 ? note.x : note.y) >> k % 2 * 16 & NONE, a[k]);
#pragma unroll
    for (int i = 0; i < 4; i++) a[k][i] = k < steps ? a[k][i] : 0;
  }
  matrix_fence();
#pragma unroll
  for (int k = 0; k < STEPS; k++) Product::run(sum, a[k], step_operand(b + k * STEP_BYTES<N>), true);
  matrix_commit();
  matrix_wait<1>();
  if (lane == 0) {
    if (c.previous >= 0) barrier_arrive(c.stage_empty + 8 * c.previous);
    if (flags & END_OF_PATCH) barrier_arrive(c.patch_empty + 8 * c.patch_index);
  }
  c.previous = c.stage.index;
  c.stage.advance(t.stages);
  if (flags & END_OF_PATCH) {
    const uint32_t patch = c.patch;
    c.patch = c.other_patch;
    c.other_patch = patch;
    c.patch_round ^= c.patch_index;
    c.patch_index ^= 1;
  }
  return flags;
}

template <class T, int N>
__device__ __forceinline__ void multiply(const Task& t, char* shared, const Control* control, int group, int warp, int lane) {
  const int row = group * 64 + warp * 16;
  const int loaded = row + lane % 16, pixel = loaded / t.tile.batch;
  Consumer c;
  c.patch = shared_address(shared);
  c.other_patch = c.patch + t.patch_bytes;
  c.stages = c.patch + t.stage_offset;
  c.stage_full = shared_address(control->stage_full);
  c.stage_empty = shared_address(control->stage_empty);
  c.patch_full = shared_address(control->patch_full);
  c.patch_empty = shared_address(control->patch_empty);
  c.row = (pixel / t.tile.columns * t.windows.columns + pixel % t.tile.columns) * t.tile.batch + loaded % t.tile.batch;
  c.half = lane / 16;
  for (int number = blockIdx.x; number < t.items; number += gridDim.x) {
    float sum[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; i++) sum[i] = 0;
    uint32_t even[STEPS][4], odd[STEPS][4];
    c.previous = -1;
    while (true) {
      if (multiply_stage<T, N>(t, control, c, sum, even, lane) & END_OF_TILE) break;
      if (multiply_stage<T, N>(t, control, c, sum, odd, lane) & END_OF_TILE) break;
    }
    matrix_wait<0>();
    if (lane == 0) barrier_arrive(c.stage_empty + 8 * c.previous);
    store_rows<T, N>(rows_of(t, item_of(t, number), row + lane / 4, N), sum, lane);
  }
}

template <class T, int N, Mode MODE>
__global__ void __launch_bounds__(4 * WARPS * LANES, 1) input_grad_kernel(const __grid_constant__ Task t) {
  extern __shared__ __align__(1024) char shared[];
  Control* control = (Control*)(shared + t.control_offset);
  const int group = threadIdx.x / (WARPS * LANES), warp = threadIdx.x / LANES % WARPS, lane = threadIdx.x % LANES;
  if (threadIdx.x == 0) {
    for (int i = 0; i < t.stages; i++) {
      barrier_init(shared_address(control->stage_full + i), LANES + 1);
      barrier_init(shared_address(control->stage_empty + i), 2 * WARPS);
    }
    for (int i = 0; i < PATCHES; i++) {
      barrier_init(shared_address(control->patch_full + i), WARPS);
      barrier_init(shared_address(control->patch_empty + i), 2 * WARPS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (group >= 2) {
    more_registers<152>();
    multiply<T, N>(t, shared, control, group - 2, warp, lane);
  } else {
    fewer_registers<104>();
    if (group == 0)
      load_weights<N>(t, shared, control, warp, lane);
    else
      expand<MODE>(t, shared, control, warp, lane);
  }
}

template <class T, int N, Mode MODE>
int launch(const Task& t, size_t bytes, int blocks, cudaStream_t stream) {
  auto kernel = input_grad_kernel<T, N, MODE>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
  if (error != cudaSuccess) return (int)error;
  kernel<<<blocks, 4 * WARPS * LANES, bytes, stream>>>(t);
  return (int)cudaGetLastError();
}

// Divides shared memory up; with the rows of g and the slots `staged` or not. Returns the bytes, or 0.
size_t divide_shared(Task& t, uint32_t stage_bytes, bool staged) {
  const size_t rows = (size_t)t.pixels * t.tile.batch;
  const size_t patches = (PATCHES * rows * PATCH_ROW_BYTES + 1023) / 1024 * 1024;
  const size_t raw = staged ? rows * t.channels * 2 : 0;
  const size_t slots = staged ? ((size_t)t.pixels * t.shape.K * 2 + 15) / 16 * 16 : 0;
  if (patches + raw + slots + sizeof(Control) > SHARED_LIMIT) return 0;
  const size_t stages = (SHARED_LIMIT - patches - raw - slots - sizeof(Control)) / stage_bytes;
  if (stages < 3) return 0;
  t.stages = stages > MAX_STAGES ? MAX_STAGES : (int)stages;
  t.patch_bytes = (uint32_t)(rows * PATCH_ROW_BYTES);
  t.stage_offset = (uint32_t)patches;
  t.raw_offset = t.stage_offset + t.stages * stage_bytes;
  t.slot_offset = (uint32_t)(t.raw_offset + raw);
  t.control_offset = (uint32_t)(t.slot_offset + slots);
  return t.control_offset + sizeof(Control);
}

template <class T, int N>
int run(Task& t, int processors, cudaStream_t stream) {
  t.channel_blocks = (t.shape.C + N - 1) / N;
  int64_t items = (int64_t)t.tiles * ((t.shape.B + t.tile.batch - 1) / t.tile.batch) * t.channel_blocks;
  if (items > 0x3fffffff) return UNSUPPORTED;
  t.items = (int)items;
  const int blocks = t.items < processors ? t.items : processors;
  if (blocks == 0) return 0;
  constexpr uint32_t STAGE_BYTES = STEPS * STEP_BYTES<N>;
  if (octets::fits(t)) return octets::run<T, N>(t, blocks, stream);
  if (size_t bytes = divide_shared(t, STAGE_BYTES, true)) return launch<T, N, STAGED>(t, bytes, blocks, stream);
  if (size_t bytes = divide_shared(t, STAGE_BYTES, false)) return launch<T, N, DIRECT>(t, bytes, blocks, stream);
  return UNSUPPORTED;
}

}  // namespace
}  // namespace smoe::input_grad

// dx [B, Hi, Wi, C] from g [B, Ho, Wo, K F] and packed weights [N F, taps, C], all of `type` (bfloat16 or float16).
// `windows` are those of the input gradient; with `choices` > 1 each sample has its own and a tile holds one sample.
// A pixel's selections must differ from one another. Writes all of dx. 0, a cudaError_t, or UNSUPPORTED.
extern "C" int smoe_input_grad_hopper(const void* g, const void* weights, void* dx, const smoe::Shape* shape,
                                      const smoe::Windows* windows, const smoe::Tile* tile, int choices, int type,
                                      int processors, cudaStream_t stream) {
  using namespace smoe;
  using namespace smoe::input_grad;
  Task t = {};
  t.g = (const uint16_t*)g;
  t.weights = (const uint16_t*)weights;
  t.dx = (uint16_t*)dx;
  t.shape = *shape;
  t.windows = *windows;
  t.tile = *tile;
  t.tiles = windows->tiles_y * windows->tiles_x;
  t.per_sample = choices > 1;
  t.channels = shape->K * shape->F;
  t.taps = shape->ksize * shape->ksize;
  t.pixels = windows->rows * windows->columns;
  t.filter_magic = shape->F > 1 ? (uint32_t)((((uint64_t)1 << 32) + shape->F - 1) / shape->F) : 0;
  const uintptr_t unaligned = ((uintptr_t)g | (uintptr_t)weights | (uintptr_t)dx) & 15;
  const bool fits = tile->rows * tile->columns * tile->batch == TILE_ROWS && windows->step_h == tile->rows &&
                    windows->step_w == tile->columns && windows->rows == tile->rows + shape->ksize - 1 &&
                    windows->columns == tile->columns + shape->ksize - 1;
  const bool kernel_size = shape->ksize == 1 || shape->ksize == 3;
  const bool samples = choices == 1 || (choices == shape->B && tile->batch == 1);
  const bool channels = shape->C % 8 == 0 && t.channels % 8 == 0 && t.channels < MAX_CHANNELS && shape->F <= 512;
  const bool countable = t.pixels <= MAX_PIXELS && windows->cap <= 0xff00 && (int64_t)windows->cap * shape->F < 1 << 22 &&
                         (int64_t)shape->N * shape->F * t.taps * (shape->C / 8) < EVERY_LANE;
  if (!fits || unaligned || !kernel_size || !samples || !channels || !countable || processors < 1) return UNSUPPORTED;
  const bool narrow = shape->C <= 64;
  if (type == BFLOAT16 && narrow) return run<__nv_bfloat16, 64>(t, processors, stream);
  if (type == BFLOAT16) return run<__nv_bfloat16, 128>(t, processors, stream);
  if (type == FLOAT16 && narrow) return run<__half, 64>(t, processors, stream);
  if (type == FLOAT16) return run<__half, 128>(t, processors, stream);
  return UNSUPPORTED;
}
