// What the warpgroups of the input gradient share: sizes, how shared memory is divided, and what passes between them.
#pragma once
#include "hopper/hopper.cuh"

namespace smoe::input_grad {

constexpr int WARPS = 4, LANES = 32;          // of a warpgroup
constexpr int TILE_ROWS = 128, COLUMNS = 64;  // of a tile; of a patch
constexpr int STEP_ROWS = 16;                 // columns of the union that one product reduces over
constexpr int STEPS = COLUMNS / STEP_ROWS;    // of a stage of the ring
constexpr int MAX_STAGES = 6, PATCHES = 2, MAX_TAPS = 9;
constexpr int TURNS = 4;               // pixels whose slots a warp inverts together
constexpr int MAX_PIXELS = 2 * WARPS * LANES;  // of a window
constexpr size_t SHARED_LIMIT = 227 * 1024;
constexpr int MAX_CHANNELS = 1 << 15;  // of g, so that offsets in a row fit 16 bits
constexpr uint32_t EVERY_LANE = 0xffffffff, NONE = 0xffff;
constexpr uint32_t FIRST = 1 << 8, END_OF_PATCH = 1 << 9, END_OF_TILE = 1 << 10;  // marks of a stage
constexpr uint32_t ROW_BYTES = 128, PATCH_ROW_BYTES = COLUMNS * 2;

// Weights of a step: [N / 64][STEP_ROWS][64 channels], rows of 128 bytes.
constexpr uint32_t STEP_GROUP_BYTES = STEP_ROWS * ROW_BYTES;
template <int N>
constexpr uint32_t STEP_BYTES = N / 64 * STEP_GROUP_BYTES;

// What to do with a stage of the ring: how many steps it holds and the marks above; for each step the shift in rows of the
// patch times STEPS, plus which sixteen of the patch's columns.
struct StageNote {
  uint16_t steps[STEPS];
  uint32_t flags, unused;
};

struct Control {
  uint64_t stage_full[MAX_STAGES], stage_empty[MAX_STAGES], patch_full[PATCHES], patch_empty[PATCHES];
  alignas(16) StageNote notes[MAX_STAGES];
  uint32_t inverse[WARPS][TURNS][COLUMNS / 2];  // for each column of a patch its place in a row of g, in bytes, or NONE
  uint8_t steps[WARPS][MAX_TAPS * STEPS];       // needed by the block of columns at hand: STEPS * tap + sixteen
};

struct Task {
  const uint16_t *g, *weights;
  uint16_t* dx;
  Shape shape;
  Windows windows;
  Tile tile;
  int items, tiles, channel_blocks, per_sample, channels, taps, pixels, stages;
  uint32_t filter_magic;  // of a division by F
  // Shared memory: patches at 0, then stages, rows of g, slots, Control.
  uint32_t patch_bytes, stage_offset, raw_offset, slot_offset, control_offset;
};

// How g comes into the patch, and how a patch lies in shared memory.
//   DIRECT  gathered from g itself; rows of the patch along columns, 16-byte piece p of row r at piece p ^ (r % 8)
//   STAGED  the same by way of a copy of the tile's rows of g in shared memory
enum Mode { DIRECT, STAGED };

// One tile of one chunk of samples and one block of channels.
struct Item {
  int y, x, chunk, channel_block;
  int64_t window;
};

__device__ __forceinline__ Item item_of(const Task& t, int number) {
  Item item;
  item.channel_block = number % t.channel_blocks;
  number /= t.channel_blocks;
  int tile = number % t.tiles;
  item.chunk = number / t.tiles;
  item.y = tile / t.windows.tiles_x;
  item.x = tile % t.windows.tiles_x;
  item.window = (t.per_sample ? (int64_t)item.chunk * t.tiles : 0) + tile;
  return item;
}

// A window's columns, divided into blocks as even as sixteens allow: at the end of a tile the multipliers' last blocks cover
// the start of the next tile. A window that selects nothing has one block, of nothing.
struct Blocks {
  int sixteens, number;
  __device__ __forceinline__ Blocks(const Task& t, int count, int most = STEPS) {
    sixteens = (count * t.shape.F + STEP_ROWS - 1) / STEP_ROWS;
    number = max(1, (sixteens + most - 1) / most);
  }
  __device__ __forceinline__ int first_column(int block) const { return (unsigned)(block * sixteens) / number * STEP_ROWS; }
};

__device__ __forceinline__ int divide_by_filters(const Task& t, int channel) {
  return t.shape.F == 1 ? channel : (int)__umulhi(channel, t.filter_magic);
}

// Sixteen rows of weights as the matrix unit takes them, the reduction along the rows: the leading stride leads from 64
// channels to the next 64, the group stride from 8 rows to the next 8.
__device__ __forceinline__ uint64_t step_operand(uint32_t address) {
  return descriptor(address, STEP_GROUP_BYTES, 8 * ROW_BYTES);
}

// A place in a ring, and whether it has gone round an odd number of times.
struct Place {
  int index = 0;
  uint32_t round = 0;
  __device__ __forceinline__ void advance(int size) {
    if (++index == size) {
      index = 0;
      round ^= 1;
    }
  }
};

}  // namespace smoe::input_grad
