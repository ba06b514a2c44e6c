// What the warps of the input gradient for eight samples share: sizes, the division of shared memory, what passes between.
//
// Eight samples of a pixel and a column are a *piece* of 16 bytes. A patch holds, for each pixel of the window, a piece for
// each of a block of columns and a piece of zeros. What is multiplied is a list of *entries*: pairs of a column and a tap that
// some pixel of the tap's sub-window selects, and no others. An entry is a row of weights and, for each pixel of the tile, a
// piece of a patch at a fixed distance from the pixel's own.
#pragma once
#include "task.cuh"

namespace smoe::input_grad::octets {

constexpr int SAMPLES = 8;
constexpr int EXPANDERS = WARPS, LOADERS = 3;  // warps; with one that lists they are two warpgroups
constexpr int WINDOW = 6, SIDE = WINDOW / 2, PIXELS = SIDE * SIDE;  // sides of the largest window and a warp's part of it
constexpr int LANE_CHANNELS = 4;                 // of g that a lane holds
constexpr int CHANNELS = LANE_CHANNELS * LANES;  // most
constexpr int WIDTH = 64;                        // columns of a block, at most
constexpr int PATCHES = 3, MOST_STAGES = 10;
constexpr int ENTRIES = STEPS * STEP_ROWS;  // of a stage
constexpr int ORDERS = 16;                  // 64 columns with all taps are nine of them
constexpr int PIECE = 16;                   // bytes
// Pieces from a pixel to the next, to the right and down: eight pixels, eight columns, and nearly all taps of a pixel lie in
// banks of their own.
constexpr int RIGHT = WIDTH + 1, DOWN = WINDOW * RIGHT + 5;
constexpr uint32_t PATCH_BYTES = WINDOW * DOWN * PIECE;
static_assert(RIGHT % 8 == 1 && DOWN % 8 == 3);

// What to do with a stage: for each step and row of weights the entry's distance in pieces, then four marks: how many patches
// begin to be used with it and end with it, whether it is the tile's last, and channels of the weights.
struct Note {
  uint16_t piece[STEP_ROWS][STEPS];
  uint4 marks;
};
constexpr uint32_t NO_MORE = 2;  // in place of `last`, after all tiles

// What is to be loaded, in a ring: where each entry's weights begin, in 16 bytes, its distance, and what a note says besides.
struct Orders {
  alignas(16) uint32_t source[ORDERS * ENTRIES];
  uint16_t piece[ORDERS * ENTRIES];
  uint4 marks[ORDERS];
};

struct Control {
  uint64_t stage_full[MOST_STAGES], stage_empty[MOST_STAGES], patch_full[PATCHES], patch_empty[PATCHES];
  uint64_t order_full[ORDERS], order_empty[ORDERS];
  alignas(16) Note notes[MOST_STAGES];
  Orders orders;
};

// Whether this kernel can do a task.
bool fits(const Task& t);

// Launches it, T being __nv_bfloat16 or __half and N 64 or 128 channels at a time. 0 or a cudaError_t.
template <class T, int N>
int run(Task& t, int blocks, cudaStream_t stream);

}  // namespace smoe::input_grad::octets
