// Forward of the per-pixel expert convolution on Hopper: y[b, p, k F + f] = sum over taps and channels of x around p times
// the filters of the expert that pixel p selects in place k.
//
// A tile of pixels, times a few samples, is 128 rows of a matrix; the filters of all experts that any pixel of the tile
// selects are its columns, of which each row keeps its own. Rows: a patch of the input in shared memory, read shifted for
// every tap (so it is loaded once for all taps). Columns: blocks of at most 256, as narrow as the tile allows.
// Order of addition: block of 64 channels, tap, channel.
#include <algorithm>
#include "epilogue.cuh"
#include "load.cuh"
#include "product.cuh"

namespace smoe::forward {
namespace {

// A warp that has got so far as one.
__device__ __forceinline__ void warp_arrives(uint32_t barrier) {
  if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}

// What a multiplying warpgroup carries from block to block.
struct Multiplier {
  Ring ring;
  uint32_t full, empty, patch_full, patch_empty, turn, patches;
  uint32_t patch_number = 0, blocks = 0;  // number of the patch with the first channels, and of the block of columns
  int row;                    // of the patch, for this thread's row of the tile and tap (0, 0)
};

// The products of one block of columns, left in shared memory; returns the stage they lie in.
template <typename T, typename S>
__device__ __forceinline__ uint32_t multiply(const Task& p, Multiplier& m, S& store, bool last_block) {
  const int width = store.width;
  float sum[WIDEST / 2];
#pragma unroll
  for (int n = 0; n < WIDEST / 2; n++) sum[n] = 0.0f;
  const int ksize = p.shape.ksize, batch = p.tile.batch, next_line = (p.patch_columns - ksize + 1) * batch;
  const int chunks = p.channel_blocks * ksize * ksize;
  const uint32_t half = threadIdx.x % 32 / 16;
  const bool release = last_block || p.channel_blocks > 2;
  uint32_t a[2][2][2][4], patch_number = m.patch_number, from;  // of two chunks, each in two halves
  int row = m.row, i = 0, j = 0, left = chunks;
  auto wait_for_patch = [&]() { barrier_wait(m.patch_full + 8 * (patch_number & 1), patch_number / 2 & 1); };
  auto find = [&]() { from = m.patches + (patch_number & 1) * p.patch_bytes + row * 128 + ((half ^ (row & 7)) << 4); };
  auto load = [&](uint32_t (&to)[2][4], int k) {
    load_matrices(to[0], from ^ (k << 5));
    load_matrices(to[1], from ^ ((k + 1) << 5));
  };
  // Two halves of a chunk are under way while the next but one is read.
  auto step = [&](uint32_t (&now)[2][2][4], uint32_t (&next)[2][2][4]) {
    const bool first = left == chunks;
    const uint32_t previous = m.empty + 8 * ((m.ring.number - 1) % SLOTS), arrived = m.full + 8 * m.ring.slot();
    const uint32_t parity = m.ring.parity();
    const uint64_t b = descriptor(m.ring.next(width * 128), 16, 1024);
    barrier_wait(arrived, parity);
    fence_for_matrix_unit();
    multiply_half<T>(sum, now[0], b, width);
    row += batch;
    if (++j == ksize) {
      j = 0;
      row += next_line - batch;
      if (++i == ksize) {
        i = 0;
        row = m.row;
        if (left > 1) {
          if (release) warp_arrives(m.patch_empty + 8 * (patch_number & 1));
          patch_number++;
          wait_for_patch();
        }
      }
    }
    find();
    matrix_wait<2>();
    load(next[0], 0);  // after the last chunk: of no use, and harmless
    multiply_half<T>(sum, now[1], b + 4, width);
    matrix_wait<2>();
    if (!first) warp_arrives(previous);
    load(next[1], 2);
  };
  wait_for_patch();
  find();
  load(a[0][0], 0);
  load(a[0][1], 2);
#pragma unroll 1
  while (true) {
    step(a[0], a[1]);
    if (--left == 0) break;
    step(a[1], a[0]);
    if (--left == 0) break;
  }
  store.prepare();
  matrix_wait<0>();
  warp_arrives(m.empty + 8 * ((m.ring.number - 1) % SLOTS));
  if (release) {
    warp_arrives(m.patch_empty + 8 * (patch_number & 1));
    m.patch_number = patch_number + 1;
  }
  const uint32_t slot = m.ring.slot(), parity = m.ring.parity(), stage = m.ring.next(width * 128);
  barrier_wait(m.full + 8 * slot, parity);
  if (threadIdx.x >= MULTIPLIERS / 2)  // the second warpgroup, once the first has stored; that one, once the second has
    barrier_wait(m.turn, m.blocks & 1);
  else if (m.blocks > 0)
    barrier_wait(m.turn + 8, (m.blocks - 1) & 1);
  put_columns<T>(stage, sum, width);
  return stage;
}

template <typename T, bool BY_SAMPLES>
__device__ __forceinline__ void multiply_and_store(const Task& p, Fixed* fixed, uint32_t patches, uint32_t ring_start) {
  const int thread = threadIdx.x;
  Multiplier m{{ring_start, (uint32_t)p.ring_bytes}, shared_address(fixed->full), shared_address(fixed->empty),
               shared_address(fixed->patch_full), shared_address(fixed->patch_empty), shared_address(fixed->turn), patches};
  const int tile_row = thread / 32 * 16 + thread % 16, pixels = p.tile.rows * p.tile.columns;
  const int pixel = min(tile_row >> p.batch_log, pixels - 1);
  m.row = (pixel / p.tile.columns * p.patch_columns + pixel % p.tile.columns) * p.tile.batch + (tile_row & (p.tile.batch - 1));
  for (Walk walk(p); walk.more(); walk.next()) {
    const Item item = walk.item();
    const Columns columns(walk.experts, p.shape.F);
    for (int block = 0; block < columns.blocks; block++, m.blocks++) {
      Store<T, BY_SAMPLES> store{p,           item.window, item.tile_y, item.tile_x, item.first_sample, block * columns.width,
                                 columns.width};
      store.run(multiply<T>(p, m, store, block == columns.blocks - 1));
      __syncwarp();
      warp_arrives(m.turn + (thread < MULTIPLIERS / 2 ? 0 : 8));
      warp_arrives(m.empty + 8 * ((m.ring.number - 1) % SLOTS));
    }
  }
}

template <typename T, bool BY_SAMPLES>
__global__ void __launch_bounds__(THREADS, 1) run(const __grid_constant__ Task p) {
  extern __shared__ uint8_t shared[];
  const uint32_t base = (shared_address(shared) + 1023) / 1024 * 1024;
  Fixed* fixed = (Fixed*)(shared + (base - shared_address(shared)));
  const uint32_t patches = base + FIXED_BYTES, ring = patches + 2 * p.patch_bytes;
  if (threadIdx.x == 0) {
    for (int i = 0; i < SLOTS; i++) {
      barrier_init(shared_address(&fixed->full[i]), LOADERS);
      barrier_init(shared_address(&fixed->empty[i]), MULTIPLIERS / 32);
    }
    for (int i = 0; i < 2; i++) {
      barrier_init(shared_address(&fixed->patch_full[i]), LOADERS);
      barrier_init(shared_address(&fixed->patch_empty[i]), MULTIPLIERS / 32);
      barrier_init(shared_address(&fixed->turn[i]), MULTIPLIERS / 64);
    }
    barriers_visible();
  }
  __syncthreads();
  if (threadIdx.x < MULTIPLIERS) {
    more_registers<216>();
    multiply_and_store<T, BY_SAMPLES>(p, fixed, patches, ring);
  } else {
    fewer_registers<72>();
    load_all(p, fixed, patches, ring);
  }
}

// Fills in what follows from the sizes; false if the kernel cannot do them.
bool lay_out(Task& p) {
  const Shape& s = p.shape;
  const Tile& tile = p.tile;
  const uintptr_t addresses = (uintptr_t)p.x | (uintptr_t)p.weights | (uintptr_t)p.y;
  if (s.C % 8 || s.K * s.F % 8 || addresses % 16 || tile.rows * tile.columns * tile.batch > 128) return false;
  while (1 << p.batch_log < tile.batch) p.batch_log++;
  if (1 << p.batch_log != tile.batch || (p.choices > 1 && (tile.batch > 1 || p.choices != s.B))) return false;
  p.patch_columns = tile.columns + s.ksize - 1;
  const int pixels = (tile.rows + s.ksize - 1) * p.patch_columns;
  p.patch_rows = pixels * tile.batch;
  p.patch_bytes = (p.patch_rows * 128 + 1023) / 1024 * 1024;
  p.channel_blocks = (s.C + 63) / 64;
  p.chunks = (s.B + tile.batch - 1) / tile.batch;
  const int widest = std::min(WIDEST, (std::min(p.windows.cap, s.N) * s.F + 15) / 16 * 16);
  p.ring_bytes = SHARED_BYTES - 1024 - FIXED_BYTES - 2 * p.patch_bytes;
  const int64_t items = (int64_t)p.windows.tiles_y * p.windows.tiles_x * p.chunks;
  p.items = (int)items;
  const bool divides = p.by_filters.set((int64_t)p.windows.cap * s.F, s.F) && p.by_chunks.set(items, p.chunks) &&
                       p.by_tiles_x.set((int64_t)p.windows.tiles_y * p.windows.tiles_x, p.windows.tiles_x) &&
                       p.by_patch_columns.set(pixels, p.patch_columns) && p.by_tile_columns.set(128, tile.columns) &&
                       p.by_octets.set((int64_t)2 * s.K * s.F + 32, s.K * s.F / 8);  // 16 rows of octets
  const int64_t pieces = std::max((int64_t)s.B * s.Hi * s.Wi, (int64_t)s.N * s.F * s.ksize * s.ksize) * (s.C / 8);
  return divides && pieces < OUTSIDE && pixels <= MOST_PIXELS && p.ring_bytes >= 2 * widest * 128 && items < 1 << 30;
}

}  // namespace
}  // namespace smoe::forward

// x [B, Hi, Wi, C], weights [N F, taps, C], y [B, Ho, Wo, K F], all of `type` (16 bits), 16-byte aligned; `choices`: S.
extern "C" int smoe_forward_hopper(const void* x, const void* weights, void* y, const smoe::Shape* shape,
                                   const smoe::Windows* windows, const smoe::Tile* tile, int choices, int type, int processors,
                                   cudaStream_t stream) {
  using namespace smoe;
  using namespace smoe::forward;
  if (type != BFLOAT16 && type != FLOAT16) return UNSUPPORTED;
  Task p{x, weights, y, *shape, *windows, *tile, choices};
  if (!lay_out(p)) return UNSUPPORTED;
  if (p.items == 0) return 0;
  void (*kernel)(Task) = type == BFLOAT16 ? (tile->batch >= 8 ? run<__nv_bfloat16, true> : run<__nv_bfloat16, false>)
                                          : (tile->batch >= 8 ? run<__half, true> : run<__half, false>);
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES);
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    cudaGetLastError();  // another GPU: an answer, not an error to be found later
    return UNSUPPORTED;
  }
  if (error != cudaSuccess) return error;
  kernel<<<p.items < processors ? p.items : processors, THREADS, SHARED_BYTES, stream>>>(p);
  return cudaGetLastError();
}
