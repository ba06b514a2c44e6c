// What the forward kernel is given, where it keeps things in shared memory, and who waits for whom.
//
// Two warpgroups multiply, one loads. Weights go through a ring of *stages*, each as long as the work at hand needs; what is
// multiplied with them comes from two *patches* (a tile of the input and its halo, 64 channels). After the last product of
// a block of columns one more stage is reserved, into which the two warpgroups put their results one after the other:
// that keeps them apart, so that one multiplies while the other stores.
#pragma once
#include "hopper/hopper.cuh"

namespace smoe::forward {

constexpr int SLOTS = 8;           // stages that can be under way
constexpr int MULTIPLIERS = 256;  // threads of the first two warpgroups
constexpr int LOADERS = 128;      // threads of the third
constexpr int THREADS = MULTIPLIERS + LOADERS;
constexpr int WIDEST = 256;     // columns of a block
constexpr int MOST_PIXELS = 256;  // of a patch
constexpr uint32_t OUTSIDE = ~0u;
constexpr int FIXED_BYTES = 4096, SHARED_BYTES = 227 * 1024;

// What lies in the first FIXED_BYTES of shared memory.
struct Fixed {
  uint64_t full[SLOTS], empty[SLOTS], patch_full[2], patch_empty[2], turn[2];
  // Where rows begin, in pieces of 16 bytes: of the patch being loaded, in a sample of x (or OUTSIDE); of the block of columns
  // being loaded, in the weights: [row % 16][row / 16], free of bank conflicts.
  uint32_t patch_pixels[MOST_PIXELS];
  alignas(16) uint32_t weight_rows[16][WIDEST / 16 + 4];
};
static_assert(sizeof(Fixed) <= FIXED_BYTES);

// Places of successive stages; both sides count alike.
struct Ring {
  uint32_t start, bytes, offset = 0, number = 0;
  __device__ uint32_t next(uint32_t length) {  // address of the next stage
    uint32_t at = offset + length > bytes ? 0 : offset;
    offset = at + length;
    number++;
    return start + at;
  }
  __device__ uint32_t slot() const { return number % SLOTS; }
  __device__ uint32_t parity() const { return number / SLOTS & 1; }
};

// The loader's side: a stage may be filled once those that lay there have been used by everybody. Lane s remembers where the
// stage in slot s ends, counted on and on.
struct Reservations {
  Ring ring;
  uint32_t empty, oldest = 0, head = 0, tail = 0, end = 0;
  __device__ uint32_t reserve(uint32_t length) {
    uint32_t skipped = ring.offset + length > ring.bytes ? ring.bytes - ring.offset : 0;
    uint32_t number = ring.number;
    while (oldest != number && (number - oldest == SLOTS || head + skipped + length - tail > ring.bytes)) {
      uint32_t slot = oldest % SLOTS;
      barrier_wait(empty + 8 * slot, oldest / SLOTS & 1);
      tail = __shfl_sync(~0u, end, slot);
      oldest++;
    }
    head += skipped + length;
    if (oldest == number) tail = head - length;
    if (threadIdx.x % 32 == number % SLOTS) end = head;
    return ring.next(length);
  }
};

// Division of n by d where n d < 2^32: multiplying warps have no time for the general one.
struct Divisor {
  uint32_t inverse = 0;  // the first whole number above 2^32 / d; 0 for 1
  // Whether it is exact for all n up to `most`.
  __host__ bool set(int64_t most, int64_t d) {
    inverse = d <= 1 ? 0 : (uint32_t)(((uint64_t)1 << 32) / d) + 1;
    return (uint64_t)most * d >> 32 == 0;
  }
  __device__ int quotient(int n) const { return inverse ? __umulhi(n, inverse) : n; }
};

struct Task {
  const void *x, *weights;
  void* y;
  Shape shape;
  Windows windows;
  Tile tile;
  int choices, batch_log, patch_columns, patch_rows, patch_bytes, ring_bytes, channel_blocks, chunks, items;
  Divisor by_filters, by_patch_columns, by_tile_columns, by_tiles_x, by_chunks, by_octets;
};

// How the columns of a tile are divided into blocks of equal width.
struct Columns {
  int used, blocks, width;
  __device__ Columns(int experts, int filters) {
    used = max(experts, 1) * filters;
    blocks = (used + WIDEST - 1) / WIDEST;
    width = ((used + blocks - 1) / blocks + 15) / 16 * 16;
  }
};

}  // namespace smoe::forward
