// The weight gradient on Hopper: dw[n, tap, c] = sum over pixels p and samples b of g[b, p, n] x[b, p + tap, c] for the experts
// that each pixel selects, as dense products of a region's rows with the columns of its list of experts.
//
// One persistent block a multiprocessor: four warps that load (load.cuh) and two consumer warpgroups, each with one
// block of 64 columns. A product is [64 columns x 16 rows] [16 rows x 128 channels] for each tap of a row of taps: its sums
// stay in registers for a whole item. g^T comes from registers, and one ldmatrix serves all taps of the row; x from shared
// memory. Two ways bring g to the consumers: gather.cuh where it can, spread.cuh else.
//
// A column of a block that a row does not select adds 0 * x: NaN or infinite x reaches all experts of the two blocks that the
// pixel's sub-window needs, NaN or infinite g only its own expert.
#include "gather.cuh"
#include "host.cuh"
#include "ordered.cuh"
#include "write.cuh"
#include "hopper/wgmma.cuh"

namespace smoe::weight_grad {

constexpr int THREADS = 384;
// Of a thread: as the block was started with 168 each, one loading and two consumer warpgroups share 3 * 168.
constexpr int LOADING_REGISTERS = 40, CONSUMING_REGISTERS = 232;

// One lane of a warp.
__device__ __forceinline__ bool elected() {
  uint32_t chosen;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(chosen));
  return chosen;
}

// Gives back the stages of x that the step of this word was the last to read.
template <int TAPS>
__device__ __forceinline__ void release_x(const Task& t, Shared& shared, uint32_t word) {
  if (!elected()) return;
  const int stage = word >> X_STAGE_AT & 7;
  barrier_arrive(at(shared.x_empty, stage));
  if (TAPS > 1 && (word & LAST_OF_RUN)) barrier_arrive(at(shared.x_empty, stage + 1 == t.x_stages ? 0 : stage + 1));
}

// Registers are scarce here: what a step needs to know comes with its word. GATHER: see gather.cuh; g's ring is
// that of the raw g then, and what belongs to the other (`fragment`, words, g_empty) is not used.
template <typename T, int N, int TAPS, bool GATHER>
__device__ __forceinline__ void consume(const Task& t, Shared& shared, uint32_t base, int group) {
  Place g;
  float sums[TAPS][N / 2];
#pragma unroll
  for (int i = 0; i < TAPS * N / 2; i++) sums[i / (N / 2)][i % (N / 2)] = 0;
  const Gather gather(t, shared, base, group);
  // Rows 0-7 and 8-15 of columns, then the same of the next 8 rows: where a lane finds its 16 bytes of a fragment.
  const uint32_t fragment = base + t.g_at + group * G_BLOCK + (threadIdx.x % 32 / 16) * G_GROUP +
                            (threadIdx.x % 128 / 32 * 16 + threadIdx.x % 16) * 16;
  barrier_wait(at(shared.g_full, g.stage), g.parity);
  uint32_t word = GATHER ? shared.steps[g.stage].word : shared.words[g.stage];
  while (!(word & END)) {
    uint32_t before = 0;  // the word of the step before, if its products may be under way
    do {
      {
        Place x{(int)(word >> X_STAGE_AT & 7), word >> X_PARITY_AT & 1};
        if (TAPS == 1 || (word & FIRST_OF_RUN)) barrier_wait(at(shared.x_full, x.stage), x.parity);
        if (TAPS > 1) {
          x.next(t.x_stages);
          barrier_wait(at(shared.x_full, x.stage), x.parity);
        }
      }
      if (word & NEEDED << group) {
        uint32_t a[2][4];
        const uint32_t notes = GATHER ? gather.notes(g.stage) : 0;
#pragma unroll
        for (int k = 0; k < STEP / 16; k++) {
          matrix_wait<1>();
          if (k == 1 && before) release_x<TAPS>(t, shared, before);
          load_matrices(a[k % 2], GATHER ? gather.place(notes, g.stage, k) : fragment + g.stage * G_STAGE + k * 2 * G_GROUP);
          matrix_fence();
#pragma unroll
          for (int j = 0; j < TAPS; j++) {
            // Columns 2 and 3 are those of the next stage.
            const int column = k / 2 + j;
            int stage = word >> X_STAGE_AT & 7;
            if (column >= 2) stage = stage + 1 == t.x_stages ? 0 : stage + 1;
            const uint32_t from = base + t.x_at + stage * X_STAGE<N> + column % 2 * COLUMN * 128 + k % 2 * 2048;
            const bool add = k > 0 || !(word & FIRST << group);
            MatrixProduct<T, N, true>::run(sums[j], a[k % 2], descriptor(from, X_PART, 1024), add);
          }
          matrix_commit();
        }
      } else {
        matrix_wait<0>();
        if (before) release_x<TAPS>(t, shared, before);
      }
      __syncwarp();
      if (elected()) barrier_arrive(at(GATHER ? shared.raw_empty : shared.g_empty, g.stage));
      g.next(GATHER ? t.raw_stages : t.g_stages);
      before = word;
      barrier_wait(at(shared.g_full, g.stage), g.parity);
      word = GATHER ? shared.steps[g.stage].word : shared.words[g.stage];
    } while (!(word & (FIRST_OF_ITEM | END)));
    matrix_wait<0>();
    // Not a number of the sums may be moved before the products are done.
#pragma unroll
    for (int i = 0; i < TAPS * N / 2; i++) asm volatile("" : "+f"(sums[i / (N / 2)][i % (N / 2)])::"memory");
    release_x<TAPS>(t, shared, before);
    const int stage = before >> ITEM_STAGE_AT;
    const Item& item = shared.items[stage];
    if (item.need[group]) write_block<N, TAPS>(t, item, sums, group);
    __syncwarp();
    if (elected()) barrier_arrive(at(shared.item_empty, stage));
  }
}

extern __shared__ __align__(1024) uint8_t shared_memory[];

template <typename T, int N, int TAPS, bool GATHER>
__global__ void __launch_bounds__(THREADS, 1)
    weight_grad_kernel(const __grid_constant__ Maps maps, const __grid_constant__ Task t) {
  const uint32_t base = shared_address(shared_memory);
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < MOST_STAGES; i++) {
      barrier_init(at(shared.x_full, i), 1);
      barrier_init(at(shared.x_empty, i), 8);
      barrier_init(at(shared.raw_full, i), 1);
      barrier_init(at(shared.raw_empty, i), GATHER ? 8 : 2);
      barrier_init(at(shared.g_full, i), 2);
      barrier_init(at(shared.g_empty, i), 8);
    }
    for (int i = 0; i < ITEMS; i++) {
      barrier_init(at(shared.item_full, i), 1);
      barrier_init(at(shared.item_empty, i), 9);
    }
    for (int i = 0; i < 16; i++) shared.zeros[i] = 0;
    barriers_visible();
  }
  __syncthreads();
  if (warp < 4) {
    fewer_registers<LOADING_REGISTERS>();
    if (warp == 0) {
      load_x<N>(t, maps.x, maps.x_column, shared, base + t.x_at, lane);
    } else if (warp == 1) {
      if (lane == 0) load_g<GATHER ? GATHER_STAGE : RAW_STAGE>(t, maps.g, maps.slots, shared, base + t.raw_at);
    } else if (GATHER) {
      switch (t.groups_log * 2 + (t.shape.F == 1)) {
        case 0: prepare<false, 0>(t, shared, base, warp - 2, lane); break;
        case 1: prepare<true, 0>(t, shared, base, warp - 2, lane); break;
        case 2: prepare<false, 1>(t, shared, base, warp - 2, lane); break;
        case 3: prepare<true, 1>(t, shared, base, warp - 2, lane); break;
        case 4: prepare<false, 2>(t, shared, base, warp - 2, lane); break;
        default: prepare<true, 2>(t, shared, base, warp - 2, lane);
      }
    } else if (t.slot_pitch == 0) {
      expand<ANY>(t, shared, base, warp - 2, lane);
    } else if (t.shape.F == 1) {
      expand<ONE_FILTER>(t, shared, base, warp - 2, lane);
    } else {
      expand<MORE_FILTERS>(t, shared, base, warp - 2, lane);
    }
  } else {
    more_registers<CONSUMING_REGISTERS>();
    consume<T, N, TAPS, GATHER>(t, shared, base, warp / 4 - 1);
  }
}

template <typename T, int N, int TAPS, bool GATHER>
int launch(const Maps& maps, Task t, int blocks, cudaStream_t stream) {
  const int most = 227 * 1024, fixed = (sizeof(Shared) + 1023) / 1024 * 1024, raw_stage = GATHER ? GATHER_STAGE : RAW_STAGE;
  // The longer the rings, the further one consumer may go on while the other adds its sums to the gradient.
  t.g_stages = GATHER ? 0 : 2;
  t.raw_stages = GATHER ? 5 : 3;
  t.x_at = fixed;
  t.x_stages = min(MOST_STAGES, (most - fixed - t.g_stages * G_STAGE - t.raw_stages * raw_stage) / X_STAGE<N>);
  t.g_at = t.x_at + t.x_stages * X_STAGE<N>;
  t.raw_at = t.g_at + t.g_stages * G_STAGE;
  if (t.parts > t.raw_stages) return UNSUPPORTED;
  const int bytes = t.raw_at + t.raw_stages * raw_stage;
  const auto kernel = weight_grad_kernel<T, N, TAPS, GATHER>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  kernel<<<blocks, THREADS, bytes, stream>>>(maps, t);
  return cudaGetLastError();
}

template <typename T, int N, int TAPS>
int launch(const Maps& maps, const Task& t, int blocks, cudaStream_t stream) {
  if (t.parts == 1 && t.slot_pitch) return launch<T, N, TAPS, true>(maps, t, blocks, stream);
  return launch<T, N, TAPS, false>(maps, t, blocks, stream);
}

template <typename T>
int launch_for(const Maps& maps, const Task& t, int blocks, cudaStream_t stream) {
  const bool wide = t.channel_block == 128;
  if (t.shape.ksize == 1) return wide ? launch<T, 128, 1>(maps, t, blocks, stream) : launch<T, 64, 1>(maps, t, blocks, stream);
  return wide ? launch<T, 128, 3>(maps, t, blocks, stream) : launch<T, 64, 3>(maps, t, blocks, stream);
}

int launch_for(const Maps& maps, const Task& t, int type, int blocks, cudaStream_t stream) {
  if (type == BFLOAT16) return launch_for<__nv_bfloat16>(maps, t, blocks, stream);
  return launch_for<__half>(maps, t, blocks, stream);
}

}  // namespace smoe::weight_grad

// dw [N F, taps, C] float32 from x [B, Hi, Wi, C] and g [B, Ho, Wo, K F]; all of it is written. There must be room for 4
// numbers behind it. `windows` are those of the weight gradient and `tile` their sub-windows. With a workspace the result is
// the same in every run: see ordered.cuh, whose Ordered says how large it has to be.
extern "C" int smoe_weight_grad_hopper(const void* x, const void* g, float* dw, void* workspace, int64_t workspace_bytes,
                                       const smoe::Shape* shape, const smoe::Windows* windows, const smoe::Tile* tile,
                                       int choices, int type, int processors, cudaStream_t stream) {
  using namespace smoe;
  using namespace smoe::weight_grad;
  const Shape& s = *shape;
  if (!supported(s, *windows, *tile, choices, type, x, g, dw)) return UNSUPPORTED;
  const int quads = s.ksize * s.ksize * s.C / 4;
  if (workspace == nullptr || s.B == 0) {
    const cudaError_t error = cudaMemsetAsync(dw, 0, ((size_t)s.N * s.F * quads + 1) * 16, stream);
    if (error != cudaSuccess || s.B == 0) return error;
  }
  Task t = make_task(s, *windows, *tile, choices);
  Maps maps;
  int status = make_maps(maps, x, g, type, t);
  if (status) return status;
  if (workspace == nullptr) {
    t.out = dw;
    t.taken = reinterpret_cast<int*>(dw + (int64_t)s.N * s.F * quads * 4);
    return launch_for(maps, t, type, processors, stream);
  }
  Ordered ordered;
  if (!ordered.lay_out(workspace, workspace_bytes, s, *windows, choices)) return cudaErrorInvalidValue;
  status = cudaMemsetAsync(ordered.taken, 0xff, (size_t)ordered.regions * 4 + (size_t)s.N * ordered.regions * 2, stream);
  if (status) return status;
  place_blocks<<<1, PLACING_THREADS, 0, stream>>>(windows->counts, s.F, ordered);
  status = cudaGetLastError();
  if (status) return status;
  place_experts<<<ordered.regions, 256, 0, stream>>>(*windows, ordered);
  status = cudaGetLastError();
  t.out = ordered.blocks;
  t.first_row = ordered.first_row;
  t.taken_before = -1;
  const int share = (s.F * quads + 511) / 512, threads = ((s.F * quads + share - 1) / share + 31) / 32 * 32;
  for (int round = 0; round < ordered.rounds && status == 0; round++) {
    t.regions = ordered.round_regions + round;
    t.taken = ordered.taken + round;
    status = launch_for(maps, t, type, processors, stream);
    if (status) return status;
    add_blocks<<<dim3(s.N, share), threads, threads * 8, stream>>>(reinterpret_cast<float4*>(dw), s.F, quads, round, ordered);
    status = cudaGetLastError();
  }
  return status;
}
