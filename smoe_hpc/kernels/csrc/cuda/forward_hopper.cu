// Forward of the per-pixel expert convolution on Hopper: y[b, p, k F + f] = sum over taps and channels of x around p times
// the filters of the expert that pixel p selects in place k.
//
// A tile of pixels, times a few samples, is 128 rows of a matrix; the filters of all experts that any pixel of the tile
// selects are its columns, of which each row keeps its own. Rows: a patch of the input in shared memory, read shifted for
// every tap (so it is loaded once for all taps). Columns: blocks of at most 256, as narrow as the tile allows.
// Order of addition: block of 64 channels, tap, channel.
#include <algorithm>
#include "forward_epilogue.cuh"
#include "forward_product.cuh"

namespace smoe::forward {
namespace {

struct Item {
  int tile_y, tile_x, window, first_sample;
};

// The tiles of this block, one after the other; the length of the next one's list is read ahead.
struct Walk {
  const Task& p;
  int number, experts = 0, ahead;
  __device__ explicit Walk(const Task& task) : p(task), number((int)(blockIdx.x - gridDim.x)), ahead(read(blockIdx.x)) { next(); }
  __device__ bool more() const { return number < p.items; }
  __device__ void next() {
    number += gridDim.x;
    experts = __shfl_sync(~0u, ahead, 0);  // tells the compiler that it is the same in a warp
    ahead = read(number + gridDim.x);
  }
  __device__ Item item() const { return find(number); }
  __device__ bool another() const { return number + (int)gridDim.x < p.items; }
  __device__ Item next_item() const { return find(number + gridDim.x); }

 private:
  __device__ int read(int number) const { return number < p.items ? p.windows.counts[find(number).window] : 0; }
  __device__ Item find(int number) const {
    const int tile = p.by_chunks.quotient(number), chunk = number - tile * p.chunks, tile_y = p.by_tiles_x.quotient(tile);
    const int tiles_x = p.windows.tiles_x, first = p.choices > 1 ? chunk * (p.windows.tiles_y * tiles_x) : 0;
    return {tile_y, tile - tile_y * tiles_x, first + tile, chunk * p.tile.batch};
  }
};

// The first `count`, up to four, of copies of 16 bytes to rows 16 apart; `bytes` as in copy16, offsets in pieces of 16 bytes.
// Together, so that each has a register of its own for its address: one that a copy reads is not free until the copy has
// gone through its queue.
__device__ __forceinline__ void copy_four(uint32_t to, const char* from, const uint4& offset, const int4& bytes, int count) {
  asm volatile(
      "{\n.reg .b64 a, b, c, d;\n.reg .pred p, q, r;\nmad.wide.u32 a, %2, 16, %1;\nmad.wide.u32 b, %3, 16, %1;\n"
      "mad.wide.u32 c, %4, 16, %1;\nmad.wide.u32 d, %5, 16, %1;\nsetp.gt.s32 p, %10, 1;\nsetp.gt.s32 q, %10, 2;\n"
      "setp.gt.s32 r, %10, 3;\ncp.async.cg.shared.global [%0], [a], 16, %6;\n"
      "@p cp.async.cg.shared.global [%0 + 2048], [b], 16, %7;\n@q cp.async.cg.shared.global [%0 + 4096], [c], 16, %8;\n"
      "@r cp.async.cg.shared.global [%0 + 6144], [d], 16, %9;\n}\n" ::"r"(to),
      "l"(from), "r"(offset.x), "r"(offset.y), "r"(offset.z), "r"(offset.w), "r"(bytes.x), "r"(bytes.y), "r"(bytes.z),
      "r"(bytes.w), "r"(count));
}

// Loads the patches, one after the other, each after the one before the last has been used.
struct PatchLoader {
  const Task& p;
  Fixed* fixed;
  uint32_t patches, count = 0;

  __device__ __forceinline__ void load(const Item& item, int channel_block, Unfinished& unfinished) {
    const Shape& s = p.shape;
    const int thread = threadIdx.x % LOADERS, piece = thread % 8, first_row = thread / 8, channel = channel_block * 64 + piece * 8;
    const int buffer = count & 1;
    if (channel_block == 0) find_pixels(item, thread);
    if (count > 1) unfinished.wait(shared_address(&fixed->patch_empty[buffer]), (count / 2 - 1) & 1);
    const uint32_t to = patches + buffer * p.patch_bytes + ((piece ^ (first_row & 7)) << 4), sample_pieces = s.Hi * s.Wi * (s.C / 8);
    const char* from = (const char*)p.x + (channel < s.C ? channel * 2 : 0);
    auto pixel = [&](int row) { return fixed->patch_pixels[min(row, p.patch_rows - 1) >> p.batch_log]; };
    auto four = [&](int row) { return uint4{pixel(row), pixel(row + 16), pixel(row + 32), pixel(row + 48)}; };
    auto place = [&](uint32_t pixel, int row, uint32_t& offset, int& bytes) {
      const int b = item.first_sample + (row & (p.tile.batch - 1));
      bytes = pixel != OUTSIDE && b < s.B && channel < s.C ? 16 : 0;
      offset = bytes ? pixel + b * sample_pieces : 0;
    };
    uint4 next = four(first_row);
    for (int row = first_row; row < p.patch_rows; row += 64) {
      uint4 offset;
      int4 bytes;
      place(next.x, row, offset.x, bytes.x);
      place(next.y, row + 16, offset.y, bytes.y);
      place(next.z, row + 32, offset.z, bytes.z);
      place(next.w, row + 48, offset.w, bytes.w);
      next = four(row + 64);  // before the copies: it would wait in the same queue
      copy_four(to + row * 128, from, offset, bytes, (p.patch_rows - row + 15) / 16);
    }
    barrier_arrive_after_copies(shared_address(&fixed->patch_full[buffer]));
    count++;
  }

 private:
  __device__ __forceinline__ void find_pixels(const Item& item, int thread) {
    const Shape& s = p.shape;
    const int top = item.tile_y * p.windows.step_h - s.off, left = item.tile_x * p.windows.step_w - s.off;
    barrier_among<LOADERS>(1);
    for (int i = thread; i < p.patch_rows >> p.batch_log; i += LOADERS) {
      const int line = p.by_patch_columns.quotient(i), h = top + line;
      int w = left + i - line * p.patch_columns;
      if (s.wrap) w += w < 0 ? s.Wi : w >= s.Wi ? -s.Wi : 0;
      fixed->patch_pixels[i] = h >= 0 && h < s.Hi && w >= 0 && w < s.Wi ? (h * s.Wi + w) * (s.C / 8) : OUTSIDE;
    }
    barrier_among<LOADERS>(1);
  }
};

// Weights, and after those of 64 channels the patch that is needed next: as the multipliers are at most SLOTS stages behind,
// its place is free by then.
__device__ __forceinline__ void load_all(const Task& p, Fixed* fixed, uint32_t patches, uint32_t ring_start) {
  const int thread = threadIdx.x % LOADERS, piece = thread % 8, first_row = thread / 8, taps = p.shape.ksize * p.shape.ksize;
  const uint32_t full = shared_address(fixed->full), mine = first_row * 128 + ((piece ^ (first_row & 7)) << 4);
  const uint32_t row_pieces = taps * p.shape.C / 8;
  const bool resident = p.channel_blocks <= 2;  // both patches stay for all blocks of columns
  Reservations stages{{ring_start, (uint32_t)p.ring_bytes}, shared_address(fixed->empty)};
  Unfinished unfinished;
  PatchLoader patch{p, fixed, patches};
  uint32_t ahead[WIDEST / LOADERS];  // where this thread's share of the next block's rows begin
  auto look_up = [&](const Item& item, const Columns& columns, int block) {
    const int* ids = p.windows.ids + (int64_t)item.window * p.windows.cap;
#pragma unroll
    for (int j = 0; j < WIDEST / LOADERS; j++) {
      const int column = min(block * columns.width + thread + LOADERS * j, columns.used - 1), slot = p.by_filters.quotient(column);
      ahead[j] = (ids[slot] * p.shape.F + column - slot * p.shape.F) * row_pieces;  // beyond the last: again, never stored
    }
  };
  Walk walk(p);
  if (walk.more()) {
    look_up(walk.item(), Columns(walk.experts, p.shape.F), 0);
    patch.load(walk.item(), 0, unfinished);
  }
  for (; walk.more(); walk.next()) {
    const Item item = walk.item();
    const Columns columns(walk.experts, p.shape.F);
    for (int block = 0; block < columns.blocks; block++) {
      barrier_among<LOADERS>(1);
#pragma unroll
      for (int j = 0; j < WIDEST / LOADERS; j++) fixed->weight_rows[thread % 16][thread / 16 + LOADERS / 16 * j] = ahead[j];
      barrier_among<LOADERS>(1);
      uint4 rows[WIDEST / 64];  // every 16th row is this thread's
#pragma unroll
      for (int i = 0; i < WIDEST / 64; i++) rows[i] = *(const uint4*)&fixed->weight_rows[first_row][4 * i];
      for (int channel_block = 0; channel_block < p.channel_blocks; channel_block++) {
        const int bytes = channel_block * 64 + piece * 8 < p.shape.C ? 16 : 0;
        const char* from = (const char*)p.weights + (bytes ? channel_block * 128 + piece * 16 : 0);
        for (int tap = 0; tap < taps; tap++, from += p.shape.C * 2) {
          const uint32_t arrived = full + 8 * stages.ring.slot(), to = stages.reserve(columns.width * 128, unfinished) + mine;
#pragma unroll
          for (int i = 0; i < WIDEST / 64; i++)
            if (64 * i < columns.width)
              copy_four(to + i * 8192, from, rows[i], {bytes, bytes, bytes, bytes}, columns.width / 16 - 4 * i);
          unfinished.add(arrived);
        }
        const bool last_channels = channel_block == p.channel_blocks - 1, next_item = last_channels && block == columns.blocks - 1;
        if (last_channels) {
          const uint32_t arrived = full + 8 * stages.ring.slot();
          stages.reserve(columns.width * 128, unfinished);
          if (threadIdx.x % 32 == 0) barrier_arrive(arrived);
          if (!next_item)
            look_up(item, columns, block + 1);
          else if (walk.another())
            look_up(walk.next_item(), Columns(walk.ahead, p.shape.F), 0);
        }
        if (next_item ? walk.another() : !resident || (block == 0 && !last_channels))
          patch.load(next_item ? walk.next_item() : item, last_channels ? 0 : channel_block + 1, unfinished);
      }
    }
  }
  while (unfinished.count > 0) unfinished.finish_oldest();
}

// A warp that has got so far as one.
__device__ __forceinline__ void warp_arrives(uint32_t barrier) {
  if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}

// What a multiplying warpgroup carries from block to block.
struct Multiplier {
  Ring ring;
  uint32_t full, empty, patch_full, patch_empty, turn, patches;
  uint32_t patch_number = 0, blocks = 0;  // number of the patch with the first channels, and of the block of columns
  uint32_t row, places[4];  // of this thread's row of the tile and tap (0, 0) in a patch: row, and places of its 4 x 16 channels
};

// The products of one block of columns, left in shared memory; returns the stage they lie in.
template <typename T, bool BY_SAMPLES>
__device__ __forceinline__ uint32_t multiply(const Task& p, Multiplier& m, Store<T, BY_SAMPLES>& store, bool last_block) {
  const int width = store.width;
  float sum[WIDEST / 2];
#pragma unroll
  for (int n = 0; n < WIDEST / 2; n++) sum[n] = 0.0f;
  const int ksize = p.shape.ksize, next_column = p.tile.batch * 128;
  const int next_line = (p.patch_columns - ksize) * next_column, chunks = p.channel_blocks * ksize * ksize;
  const bool release = last_block || p.channel_blocks > 2;
  uint32_t a[2][4][4], patch_number = m.patch_number, patch, shift = 0;  // the tap's, in bytes
  int i = 0, j = 0, left = chunks;
  auto wait_for_patch = [&]() {
    patch = m.patches + (patch_number & 1) * p.patch_bytes;
    barrier_wait(m.patch_full + 8 * (patch_number & 1), patch_number / 2 & 1);
  };
  auto load = [&](uint32_t (&to)[4][4]) {
    if constexpr (BY_SAMPLES) {  // the tap moves whole groups of 8 rows: pieces keep their places
#pragma unroll
      for (int k = 0; k < 4; k++) load_matrices(to[k], patch + shift + m.places[k]);
    } else {
      const uint32_t row = m.row + shift / 128, from = patch + row * 128 + ((threadIdx.x / 16 % 2 ^ (row & 7)) << 4);
#pragma unroll
      for (int k = 0; k < 4; k++) load_matrices(to[k], from ^ (k << 5));
    }
  };
  auto step = [&](uint32_t (&now)[4][4], uint32_t (&next)[4][4]) {
    const bool first = left == chunks;
    const uint32_t previous = m.empty + 8 * ((m.ring.number - 1) % SLOTS), arrived = m.full + 8 * m.ring.slot();
    const uint32_t parity = m.ring.parity();
    const uint64_t b = descriptor(m.ring.next(width * 128), 16, 1024);
    barrier_wait(arrived, parity);
    multiply_chunk<T>(sum, now, b, width);
    matrix_wait<1>();
    if (!first) warp_arrives(previous);
    shift += next_column;
    if (++j == ksize) {
      j = 0;
      shift += next_line;
      if (++i == ksize) {
        i = 0;
        shift = 0;
        if (left > 1) {
          if (release) warp_arrives(m.patch_empty + 8 * (patch_number & 1));
          patch_number++;
          wait_for_patch();
        }
      }
    }
    load(next);  // after the last chunk: of no use, and harmless
  };
  store.prepare();
  wait_for_patch();
  load(a[0]);
#pragma unroll 1
  while (true) {
    step(a[0], a[1]);
    if (--left == 0) break;
    step(a[1], a[0]);
    if (--left == 0) break;
  }
  matrix_wait<0>();
  warp_arrives(m.empty + 8 * ((m.ring.number - 1) % SLOTS));
  if (release) {
    warp_arrives(m.patch_empty + 8 * (patch_number & 1));
    m.patch_number = patch_number + 1;
  }
  const uint32_t slot = m.ring.slot(), parity = m.ring.parity(), stage = m.ring.next(width * 128);
  barrier_wait(m.full + 8 * slot, parity);
  if (threadIdx.x >= MULTIPLIERS / 2)
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
  const int pixel = min(tile_row >> p.batch_log, pixels - 1), line = p.by_tile_columns.quotient(pixel);
  m.row = (line * p.patch_columns + pixel - line * p.tile.columns) * p.tile.batch + (tile_row & (p.tile.batch - 1));
#pragma unroll
  for (int k = 0; k < 4; k++) m.places[k] = m.row * 128 + ((2 * k + thread / 16 % 2 ^ (m.row & 7)) << 4);
  for (Walk walk(p); walk.more(); walk.next()) {
    const Item item = walk.item();
    const Columns columns(walk.experts, p.shape.F);
    for (int block = 0; block < columns.blocks; block++, m.blocks++) {
      Store<T, BY_SAMPLES> store{p, item.window, item.tile_y, item.tile_x, item.first_sample, block * columns.width, columns.width};
      store.run(multiply<T, BY_SAMPLES>(p, m, store, block == columns.blocks - 1));
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
      barrier_init(shared_address(&fixed->full[i]), LOADERS / 32);
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
  p.by_filters = Divisor(s.F);
  p.by_patch_columns = Divisor(p.patch_columns);
  p.by_tile_columns = Divisor(tile.columns);
  p.by_tiles_x = Divisor(p.windows.tiles_x);
  p.by_chunks = Divisor(p.chunks);
  p.by_octets = Divisor(s.K * s.F / 8);
  const int64_t pieces = std::max((int64_t)s.B * s.Hi * s.Wi, (int64_t)s.N * s.F * s.ksize * s.ksize) * (s.C / 8);
  return pieces < OUTSIDE && pixels <= MOST_PIXELS && p.ring_bytes >= 2 * widest * 128 && items < 1 << 30;
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
