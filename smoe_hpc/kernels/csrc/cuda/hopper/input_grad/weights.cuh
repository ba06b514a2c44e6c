// The input gradient's loading warpgroup: the weights that each block of columns needs, tap by tap, into the ring.
#pragma once
#include "task.cuh"

namespace smoe::input_grad {

// A lane's two columns of a block of 64, as they come from memory.
struct Columns {
  int filter[2], id[2];
  uint32_t mask[2];
};

// Those from `first` on, before `end`.
__device__ __forceinline__ void fetch_columns(const Task& t, int64_t window, int count, int first, int end, int lane,
                                              Columns& c) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int column = first + half * LANES + lane, slot = divide_by_filters(t, column);
    c.filter[half] = column - slot * t.shape.F;
    c.id[half] = -1;
    c.mask[half] = 0;
    if (slot < count && column < end) {
      int64_t place = window * t.windows.cap + slot;
      c.id[half] = __ldg(t.windows.ids + place);
      c.mask[half] = t.windows.masks ? __ldg(t.windows.masks + place) : NONE;
    }
  }
}

// Those of a block.
__device__ __forceinline__ void fetch_columns(const Task& t, int64_t window, int count, int block, int lane, Columns& c) {
  const Blocks blocks(t, count);
  fetch_columns(t, window, count, blocks.first_column(block), blocks.first_column(block + 1), lane, c);
}

// Lists the steps that a block of columns needs, by tap, then by sixteen; returns how many.
__device__ __forceinline__ int list_steps(const Task& t, const Columns& c, Control* control, int warp, int lane) {
  // Bit STEPS * tap + sixteen of a number of 64 bits; lane `tap` knows the four of its tap.
  uint32_t needed = 0;
#pragma unroll
  for (int sixteen = 0; sixteen < STEPS; sixteen++) {
    bool mine = lane / STEP_ROWS == sixteen % 2;
    uint32_t taps = __reduce_or_sync(EVERY_LANE, mine ? c.mask[sixteen / 2] : 0);
    needed |= (taps >> lane & 1) << sixteen;
  }
  if (lane >= t.taps) needed = 0;
  uint32_t low = __reduce_or_sync(EVERY_LANE, lane < 8 ? needed << lane * STEPS : 0);
  uint32_t high = __reduce_or_sync(EVERY_LANE, lane >= 8 ? needed : 0);
  __syncwarp();  // the list before this one has been read
#pragma unroll
  for (int part = 0; part < 2; part++) {
    int step = part * LANES + lane;
    uint32_t bits = part ? high : low;
    if (bits >> lane & 1) {
      int place = __popc(bits & ((1u << lane) - 1)) + (part ? __popc(low) : 0);
      control->steps[warp][place] = (uint8_t)step;
    }
  }
  __syncwarp();
  return __popc(low) + __popc(high);
}

// A step as StageNote has it.
__device__ __forceinline__ uint16_t step_note(const Task& t, int step) {
  const int tap = step / STEPS, i = t.shape.ksize == 3 ? tap / 3 : 0, j = tap - 3 * i, last = t.shape.ksize - 1;
  const int shift = ((last - i) * t.windows.columns + last - j) * t.tile.batch;
  return (uint16_t)(shift * STEPS + step % STEPS);
}

// Sixteen rows of weights, 16 bytes a lane and turn; zeros if `step` is negative. `rows`: where the weights of a lane's
// columns begin, in pieces of 16 bytes.
template <int N>
__device__ __forceinline__ void load_step(const Task& t, const uint32_t (&rows)[2], int step, int channel0, uint32_t to,
                                          int lane) {
  constexpr int PIECES = N / 8, AT_ONCE = LANES / PIECES;
  const int tap = step >> 2, sixteen = step & 3, piece = lane % PIECES;
  static_assert(STEPS == 4, "steps are numbered in fours");
  const uint32_t source = sixteen < 2 ? rows[0] : rows[1], place = (tap * t.shape.C + channel0) / 8 + piece;
  const bool wanted = step >= 0 && channel0 + piece * 8 < t.shape.C;
  to += piece / 8 * STEP_GROUP_BYTES;
#pragma unroll
  for (int i = 0; i < STEP_ROWS / AT_ONCE; i++) {
    int row = lane / PIECES + i * AT_ONCE;
    uint32_t begin = __shfl_sync(EVERY_LANE, source, sixteen % 2 * STEP_ROWS + row);
    bool there = begin != EVERY_LANE && wanted;
    const char* from = (const char*)t.weights + (there ? (uint64_t)(begin + place) * 16 : 0);
    copy16(to + row * ROW_BYTES + ((piece % 8 ^ row % 8) << 4), from, there ? 16 : 0);
  }
}

template <int N>
__device__ __forceinline__ void load_weights(const Task& t, char* shared, Control* control, int warp, int lane) {
  const uint32_t stages = shared_address(shared) + t.stage_offset;
  const uint32_t full = shared_address(control->stage_full), empty = shared_address(control->stage_empty);
  Place next;
  // Warps fill stages by turns. No more of them than stages: a wait tells one round of the ring from the next, no further.
  const int fillers = min(WARPS, t.stages);
  int turn = 0;
  Item item = item_of(t, blockIdx.x);
  int count = __ldg(t.windows.counts + item.window);
  Columns coming;
  fetch_columns(t, item.window, count, 0, lane, coming);
  for (int number = blockIdx.x; number < t.items; number += gridDim.x) {
    const bool more = number + (int)gridDim.x < t.items;
    const Item next_item = item_of(t, more ? number + gridDim.x : number);
    const int next_count = __ldg(t.windows.counts + next_item.window);
    const int blocks = Blocks(t, count).number;
    for (int block = 0; block < blocks; block++) {
      const bool last_block = block + 1 == blocks;
      const int steps = list_steps(t, coming, control, warp, lane);
      uint32_t rows[2];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        uint32_t row = coming.id[half] * t.shape.F + coming.filter[half];
        rows[half] = coming.id[half] < 0 ? EVERY_LANE : row * (t.taps * t.shape.C / 8);
      }
      // The next block's columns come while this one's weights do.
      if (!last_block)
        fetch_columns(t, item.window, count, block + 1, lane, coming);
      else if (more)
        fetch_columns(t, next_item.window, next_count, 0, lane, coming);
      for (int first = 0; first == 0 || first < steps; first += STEPS) {
        if (turn == warp) {
          barrier_wait(empty + 8 * next.index, next.round ^ 1);
          StageNote& note = control->notes[next.index];
          if (lane < STEPS) note.steps[lane] = first + lane < steps ? step_note(t, control->steps[warp][first + lane]) : 0;
          if (lane == 0) {
            note.flags = min(STEPS, steps - first) | (first == 0 ? FIRST : 0);
            if (first + STEPS >= steps) note.flags |= END_OF_PATCH | (last_block ? END_OF_TILE : 0);
          }
          __syncwarp();
          // One arrival for the note, one of each lane once its copies are there.
          if (lane == 0) barrier_arrive(full + 8 * next.index);
#pragma unroll 1
          for (int k = 0; k < STEPS; k++) {
            const int step = first + k < steps ? control->steps[warp][first + k] : -1;
            load_step<N>(t, rows, step, item.channel_block * N, stages + (next.index * STEPS + k) * STEP_BYTES<N>, lane);
          }
          barrier_arrive_after_copies(full + 8 * next.index);
        }
        if (++turn == fillers) turn = 0;
        next.advance(t.stages);
      }
    }
    item = next_item;
    count = next_count;
  }
  wait_copies<0>();
}

}  // namespace smoe::input_grad
