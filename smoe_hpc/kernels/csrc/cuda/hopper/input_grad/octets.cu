// The gradient of the input for tiles of eight samples and at most 128 selected channels (see input_grad.cu for what is
// computed, octets.cuh for how it lies in memory).
//
// Four warpgroups: 0 and 1 multiply and store, 2 expands g into patches, 3 lists entries (one warp) and loads weights.
#include "octets_expand.cuh"
#include "octets_weights.cuh"
#include "store.cuh"
#include "hopper/wgmma.cuh"

namespace smoe::input_grad::octets {
namespace {

constexpr int MULTIPLIERS = 2 * WARPS, THREADS = (MULTIPLIERS + EXPANDERS + LOADERS + 1) * LANES;

// Where the products of a warpgroup stand.
struct Consumer {
  uint32_t pixel;      // address of this lane's pixel of A in the first patch
  uint32_t slot;       // its entry of each step
  Place stage;         // the one at hand
  Place begun, ended;  // patches
  int previous;        // stage not yet released, or -1
  uint4 marks;         // of the stage at hand
  uint2 four;          // distances of its entries
};

// Waits for the stage at hand and the patches that begin with it.
__device__ __forceinline__ void wait_for_stage(const Control* control, Consumer& c) {
  barrier_wait(shared_address(control->stage_full + c.stage.index), c.stage.round);
  fence_for_matrix_unit();  // here, for it would make those who copy wait for their copies
  c.marks = control->notes[c.stage.index].marks;
  c.four = *(const uint2*)control->notes[c.stage.index].piece[c.slot];
#pragma unroll 1
  for (uint32_t i = 0; i < c.marks.x; i++) {
    barrier_wait(shared_address(control->patch_full + c.begun.index), c.begun.round);
    c.begun.advance(PATCHES);
  }
}

// One stage; A fragments go to `a`, whose products of the stage before the last must be done. While these products run it waits
// for the tile's next stage. Returns whether the stage is the tile's last.
template <class T, int N>
__device__ __forceinline__ bool multiply_stage(const Task& t, uint32_t stages, const Control* control, Consumer& c,
                                               float (&sum)[N / 2], uint32_t (&a)[STEPS][4], int lane) {
  using Product = MatrixProduct<T, N, true>;
#pragma unroll
  for (int k = 0; k < STEPS; k++)
    load_matrices_transposed(a[k], c.pixel + ((k < 2 ? c.four.x : c.four.y) >> k % 2 * 16 & NONE) * PIECE);
  const uint32_t b = stages + c.stage.index * STEPS * STEP_BYTES<N>;
  matrix_fence();
#pragma unroll
  for (int k = 0; k < STEPS; k++) Product::run(sum, a[k], step_operand(b + k * STEP_BYTES<N>), true);
  matrix_commit();
  const int previous = c.previous;
  const bool last = c.marks.z;
#pragma unroll 1
  for (uint32_t i = 0; i < c.marks.y; i++) {
    if (lane == 0) barrier_arrive(shared_address(control->patch_empty + c.ended.index));
    c.ended.advance(PATCHES);
  }
  c.previous = c.stage.index;
  c.stage.advance(t.stages);
  if (!last) wait_for_stage(control, c);
  matrix_wait<1>();
  if (lane == 0 && previous >= 0) barrier_arrive(shared_address(control->stage_empty + previous));
  return last;
}

template <class T, int N>
__device__ __forceinline__ void multiply(const Task& t, char* shared, const Control* control, int group, int warp, int lane) {
  const int row = group * 64 + warp * 16, pixel = (row + (lane & 8)) / SAMPLES;
  const uint32_t stages = shared_address(shared) + t.stage_offset;
  Consumer c;
  c.pixel = shared_address(shared) + (pixel / t.tile.columns * DOWN + pixel % t.tile.columns * RIGHT) * PIECE;
  c.slot = lane / 16 * 8 + lane % 8;
  for (int number = blockIdx.x; number < t.items; number += gridDim.x) {
    float sum[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; i++) sum[i] = 0;
    uint32_t even[STEPS][4], odd[STEPS][4];
    c.previous = -1;
    wait_for_stage(control, c);
    while (true) {
      if (multiply_stage<T, N>(t, stages, control, c, sum, even, lane)) break;
      if (multiply_stage<T, N>(t, stages, control, c, sum, odd, lane)) break;
    }
    const Rows rows = rows_of(t, item_of(t, number), row + lane / 4, N);
    matrix_wait<0>();
    if (lane == 0) barrier_arrive(shared_address(control->stage_empty + c.previous));
    store_rows<T, N>(rows, sum, lane);
  }
}

template <class T, int N>
__global__ void __launch_bounds__(THREADS, 1) octets_kernel(const __grid_constant__ Task t) {
  extern __shared__ __align__(1024) char shared[];
  Control* control = (Control*)(shared + t.control_offset);
  const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
  if (threadIdx.x == 0) {
    for (int i = 0; i < t.stages; i++) {
      barrier_init(shared_address(control->stage_full + i), LANES + 1);
      barrier_init(shared_address(control->stage_empty + i), MULTIPLIERS);
    }
    for (int i = 0; i < PATCHES; i++) {
      barrier_init(shared_address(control->patch_full + i), EXPANDERS);
      barrier_init(shared_address(control->patch_empty + i), MULTIPLIERS);
    }
    for (int i = 0; i < ORDERS; i++) {
      barrier_init(shared_address(control->order_full + i), 1);
      barrier_init(shared_address(control->order_empty + i), 1);
    }
    barriers_visible();
  }
  // The pieces of zeros stay.
  for (uint32_t i = threadIdx.x; i < PATCHES * PATCH_BYTES / PIECE; i += THREADS) ((uint4*)shared)[i] = make_uint4(0, 0, 0, 0);
  __syncthreads();
  if (warp < MULTIPLIERS) {
    fewer_registers<128>();
    multiply<T, N>(t, shared, control, warp / WARPS, warp % WARPS, lane);
  } else if (warp < MULTIPLIERS + EXPANDERS) {
    more_registers<184>();
    expand(t, shared, control, warp - MULTIPLIERS, lane);
  } else {
    fewer_registers<72>();
    const int loader = warp - MULTIPLIERS - EXPANDERS;
    if (loader < LOADERS)
      load_entries<N>(t, shared, control, loader, lane);
    else
      list_entries<N>(t, control, lane);
  }
}

}  // namespace

bool fits(const Task& t) {
  return t.tile.batch == SAMPLES && t.windows.rows <= WINDOW && t.windows.columns <= WINDOW &&
         t.channels <= CHANNELS && t.windows.cap * t.shape.F < (int)NONE - WIDTH &&
         (int64_t)t.shape.Ho * t.shape.Wo * t.channels <= INT32_MAX;
}

template <class T, int N>
int run(Task& t, int blocks, cudaStream_t stream) {
  constexpr uint32_t STAGE_BYTES = STEPS * STEP_BYTES<N>;
  t.stage_offset = (PATCHES * PATCH_BYTES + 1023) / 1024 * 1024;
  t.stages = (int)min((uint32_t)MOST_STAGES, (uint32_t)(SHARED_LIMIT - t.stage_offset - sizeof(Control)) / STAGE_BYTES);
  t.control_offset = t.stage_offset + t.stages * STAGE_BYTES;
  auto kernel = octets_kernel<T, N>;
  const int bytes = (int)(t.control_offset + sizeof(Control));
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return (int)error;
  kernel<<<blocks, THREADS, bytes, stream>>>(t);
  return (int)cudaGetLastError();
}

template int run<__nv_bfloat16, 64>(Task&, int, cudaStream_t);
template int run<__nv_bfloat16, 128>(Task&, int, cudaStream_t);
template int run<__half, 64>(Task&, int, cudaStream_t);
template int run<__half, 128>(Task&, int, cudaStream_t);

}  // namespace smoe::input_grad::octets
