// What the third warpgroup of the forward kernel does: it brings weights and patches of the input to shared memory.
#pragma once
#include "task.cuh"

namespace smoe::forward {

struct Item {
  int tile_y, tile_x, window, first_sample;
};

// The tiles of this block, one after the other; the length of the next one's list is read ahead.
struct Walk {
  const Task& p;
  int number, experts = 0, ahead;
  __device__ explicit Walk(const Task& task) : p(task), number((int)(blockIdx.x - gridDim.x)), ahead(read(blockIdx.x)) {
    next();
  }
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
    const int first = p.choices > 1 ? chunk * (p.windows.tiles_y * p.windows.tiles_x) : 0;
    return {tile_y, tile - tile_y * p.windows.tiles_x, first + tile, chunk * p.tile.batch};
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

  __device__ __forceinline__ void load(const Item& item, int channel_block) {
    const Shape& s = p.shape;
    const int thread = threadIdx.x % LOADERS, piece = thread % 8, first_row = thread / 8, buffer = count & 1;
    const int channel = channel_block * 64 + piece * 8;
    if (channel_block == 0) find_pixels(item, thread);
    if (count > 1) barrier_wait(shared_address(&fixed->patch_empty[buffer]), (count / 2 - 1) & 1);
    const uint32_t to = patches + buffer * p.patch_bytes + ((piece ^ (first_row & 7)) << 4);
    const uint32_t sample_pieces = s.Hi * s.Wi * (s.C / 8);
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
  PatchLoader patch{p, fixed, patches};
  uint32_t ahead[WIDEST / LOADERS];  // where this thread's share of the next block's rows begin
  auto look_up = [&](const Item& item, const Columns& columns, int block) {
    const int* ids = p.windows.ids + (int64_t)item.window * p.windows.cap;
#pragma unroll
    for (int j = 0; j < WIDEST / LOADERS; j++) {
      const int column = min(block * columns.width + thread + LOADERS * j, columns.used - 1);
      const int slot = p.by_filters.quotient(column);
      ahead[j] = (ids[slot] * p.shape.F + column - slot * p.shape.F) * row_pieces;  // beyond the last: again, never stored
    }
  };
  Walk walk(p);
  if (walk.more()) {
    look_up(walk.item(), Columns(walk.experts, p.shape.F), 0);
    patch.load(walk.item(), 0);
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
          const uint32_t arrived = full + 8 * stages.ring.slot(), to = stages.reserve(columns.width * 128) + mine;
#pragma unroll
          for (int i = 0; i < WIDEST / 64; i++)
            if (64 * i < columns.width)
              copy_four(to + i * 8192, from, rows[i], {bytes, bytes, bytes, bytes}, columns.width / 16 - 4 * i);
          barrier_arrive_after_copies(arrived);
        }
        const bool last_channels = channel_block == p.channel_blocks - 1;
        const bool next_item = last_channels && block == columns.blocks - 1;
        if (last_channels) {
          const uint32_t arrived = full + 8 * stages.ring.slot();
          stages.reserve(columns.width * 128);
          barrier_arrive(arrived);
          if (!next_item)
            look_up(item, columns, block + 1);
          else if (walk.another())
            look_up(walk.next_item(), Columns(walk.ahead, p.shape.F), 0);
        }
        if (next_item ? walk.another() : !resident || (block == 0 && !last_channels))
          patch.load(next_item ? walk.next_item() : item, last_channels ? 0 : channel_block + 1);
      }
    }
  }
  wait_copies<0>();
}

}  // namespace smoe::forward
