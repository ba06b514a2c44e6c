// What the kernel of the weight gradient has in shared memory, and the two warps that bring it there by bulk copies.
//
//   x ring:   a stage is two columns of pixels, [N / 64 parts][2][32 rows][64 channels], swizzled; the copies also make the
//             zeros around the map. A tap row of three reads two stages a step, so each is loaded once a run.
//   raw ring: 128 channels of g of a step, [2 parts][2 columns][32 rows][64 channels], swizzled, and the slots of its pixels,
//             [strip rows][2 columns]; more where g is gathered, see gather.cuh
//   g ring:   [2 blocks][8 groups of 8 rows][64 columns][8 rows], zero where a row does not select a column; only where g is
//             spread, see spread.cuh
#pragma once
#include <cuda.h>

#include "hopper/hopper.cuh"
#include "walk.cuh"

namespace smoe::weight_grad {

constexpr int ITEMS = 4, MOST_STAGES = 8;
constexpr int RAW_HALF = STEP * 128, RAW_BYTES = 2 * RAW_HALF, SLOT_BYTES = 2048, RAW_STAGE = RAW_BYTES + SLOT_BYTES;
constexpr int G_GROUP = 8 * BLOCK * 2, G_BLOCK = STEP * BLOCK * 2, G_STAGE = 2 * G_BLOCK;
constexpr int X_PART = STEP * 128;
template <int N>
constexpr int X_STAGE = N / 64 * X_PART;

// What the consumers are told of a step, beside its numbers: a word in shared memory.
// FIRST and NEEDED have a bit for each consumer warpgroup: the item's first step that it needs, a step that it needs. The rest
// are numbers: the stage of the step's first columns in the ring of x and its parity, the place of the item.
enum Word : uint32_t {
  FIRST_OF_RUN = 1 << 0,
  LAST_OF_RUN = 1 << 1,
  FIRST_OF_ITEM = 1 << 2,
  END = 1 << 3,
  NEEDED = 1 << 4,
  FIRST = 1 << 6,
  X_PARITY_AT = 8,
  X_STAGE_AT = 9,
  ITEM_STAGE_AT = 16
};

// What the two warps that spread g or make it ready are told of a step: the pair's first column; pixel rows of the step's
// columns, 0 for one that does not exist; number of the first pixel in the slots.
struct Step {
  uint32_t word;
  int first_column;
  int16_t rows[2];
  int pixel;
};

struct Shared {
  uint64_t x_full[MOST_STAGES], x_empty[MOST_STAGES], g_full[MOST_STAGES], g_empty[MOST_STAGES];
  uint64_t raw_full[MOST_STAGES], raw_empty[MOST_STAGES], item_full[ITEMS], item_empty[ITEMS];
  Step steps[MOST_STAGES];
  Item items[ITEMS];
  uint32_t words[MOST_STAGES];
  alignas(16) uint8_t nowhere[2][16];  // for what an expander drops
  alignas(16) uint8_t zeros[16];       // rows of a column that none of them selects
};

// A place in a ring, and the parity of its round.
struct Place {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next(int stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

__device__ __forceinline__ uint32_t at(const uint64_t* barriers, int stage) { return shared_address(barriers + stage); }

// Starts a bulk copy of a box: of pixels [2 columns, rows, samples, channels], of slots [1 region, rows, 2 columns, slots].
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap& map, int a, int b, int c, int d, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(to),
      "l"(&map), "r"(a), "r"(b), "r"(c), "r"(d), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ void arrive_expecting(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// The warp that finds items and starts the copies of x.
template <int N>
__device__ __forceinline__ void load_x(const Task& t, const CUtensorMap& map, const CUtensorMap& column_map, Shared& shared,
                                       uint32_t ring, int lane) {
  Schedule schedule(t);
  Place items, next;
  int number = blockIdx.x;
  for (;;) {
    barrier_wait(at(shared.item_empty, items.stage), items.parity ^ 1);
    const Item item = schedule.find(t, number, lane);
    if (lane == 0) {
      shared.items[items.stage] = item;
      barrier_arrive(at(shared.item_full, items.stage));
    }
    if (item.region < 0) return;
    items.next(ITEMS);
    const int below = item.tap_row - t.shape.off, right = item.x - t.shape.off, Wi = t.shape.Wi;
    Runs runs(t, item);
    while (runs.next(t)) {
      const int sample = t.choices > 1 ? item.sample : runs.chunk * t.batch, y = runs.y + below;
      for (int i = runs.column; i < runs.stop + t.shape.ksize - 1; i += 2) {
        const int column = right + i;
        barrier_wait(at(shared.x_empty, next.stage), next.parity ^ 1);
        if (lane == 0) {
          const uint32_t barrier = at(shared.x_full, next.stage), to = ring + next.stage * X_STAGE<N>;
          arrive_expecting(barrier, X_STAGE<N>);
          if (t.shape.wrap && (column < 0 || column + 2 > Wi)) {
#pragma unroll 1
            for (int part = 0; part < N / 32; part++) {
              const int wrapped = (column + part % 2 + Wi) % Wi;
              copy_box(to + part * COLUMN * 128, column_map, item.first_channel + part / 2 * 64, sample, y, wrapped, barrier);
            }
          } else {
#pragma unroll
            for (int part = 0; part < N / 64; part++)
              copy_box(to + part * X_PART, map, item.first_channel + part * 64, sample, y, column, barrier);
          }
        }
        __syncwarp();
        next.next(t.x_stages);
      }
    }
    // Items differ in length: who is done takes the next one.
    if (lane == 0) number = gridDim.x + atomicAdd(t.taken, 1) - t.taken_before;
    number = __shfl_sync(~0u, number, 0);
  }
}

// The first slot that is loaded with a part of g, that of its first channel or up to 7 before: unless a box begins at a
// multiple of 16 bytes, its copy is an illegal instruction.
__device__ __forceinline__ int first_slot(const Task& t, int part) { return divide_by_filters(t, part * 128) & ~7; }

// The lane that starts the copies of g and of the slots and says what is to be done with them, step by step.
template <int STAGE>
__device__ __forceinline__ void load_g(const Task& t, const CUtensorMap& map, const CUtensorMap& slot_map, Shared& shared,
                                       uint32_t ring) {
  const int bytes = RAW_BYTES + t.strip_rows * 2 * t.slot_pitch;
  Place items, x, raw;
  for (;;) {
    barrier_wait(at(shared.item_full, items.stage), items.parity);
    const Item item = shared.items[items.stage];
    barrier_arrive(at(shared.item_empty, items.stage));
    if (item.region < 0) break;
    uint32_t flags = FIRST_OF_ITEM | items.stage << ITEM_STAGE_AT;
    items.next(ITEMS);
    uint32_t unstarted = 3;  // consumers that have needed no step of the item yet
    Runs runs(t, item);
    while (runs.next(t)) {
      const int sample = t.choices > 1 ? item.sample : runs.chunk * t.batch;
      const int rows = min(t.strip_rows, t.shape.Ho - runs.y), row = runs.y - item.y;
      int left = 0, bit = runs.bit;
      uint32_t needed = 0;
      flags |= FIRST_OF_RUN;
#pragma unroll 1
      for (int column = runs.column; column < runs.stop; column += 2) {
        if (left == 0) {
          left = t.sub_columns;
          needed = (item.need[0] >> bit & 1) | (item.need[1] >> bit & 1) << 1;
          bit++;
        }
        left -= 2;
        const uint32_t word = flags | needed * NEEDED | (needed & unstarted) * FIRST | x.stage << X_STAGE_AT |
                              x.parity << X_PARITY_AT | (column + 2 >= runs.stop ? LAST_OF_RUN : 0);
        flags &= ~(FIRST_OF_ITEM | FIRST_OF_RUN);
        unstarted &= ~needed;
        x.next(t.x_stages);
#pragma unroll 1
        for (int part = 0; part < t.parts; part++) {
          barrier_wait(at(shared.raw_empty, raw.stage), raw.parity ^ 1);
          const uint32_t barrier = at(shared.raw_full, raw.stage), to = ring + raw.stage * STAGE;
          shared.steps[raw.stage] = {word,
                                     item.first_column,
                                     {(int16_t)rows, (int16_t)(column + 1 < runs.stop ? rows : 0)},
                                     (item.region * t.windows.rows + row) * t.windows.columns + column};
          arrive_expecting(barrier, bytes);
          for (int half = 0; half < 2; half++)
            copy_box(to + half * RAW_HALF, map, part * 128 + half * 64, sample, runs.y, item.x + column, barrier);
          if (t.slot_pitch)
            copy_box(to + RAW_BYTES, slot_map, first_slot(t, part), column, row, item.region, barrier);
          raw.next(t.raw_stages);
        }
      }
      if (t.shape.ksize > 1) x.next(t.x_stages);
    }
  }
  barrier_wait(at(shared.raw_empty, raw.stage), raw.parity ^ 1);
  shared.steps[raw.stage].word = END;
  barrier_arrive(at(shared.raw_full, raw.stage));
}

}  // namespace smoe::weight_grad
