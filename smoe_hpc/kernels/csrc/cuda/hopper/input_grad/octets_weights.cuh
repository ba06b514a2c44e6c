// The warp that lists the entries of each block of columns, and those that copy the entries' weights into the ring of stages.
#pragma once
#include "octets.cuh"
#include "weights.cuh"

namespace smoe::input_grad::octets {

// Stores without a branch: lanes differ in what they store, and a branch for each would cost more than all the stores.
__device__ __forceinline__ void store_if(bool wanted, uint32_t* to, uint32_t value) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %0, 0;\n@p st.shared.u32 [%1], %2;\n}" ::"r"((uint32_t)wanted),
               "r"(shared_address(to)), "r"(value)
               : "memory");
}
__device__ __forceinline__ void store_if(bool wanted, uint16_t* to, uint32_t value) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %0, 0;\n@p st.shared.u16 [%1], %2;\n}" ::"r"((uint32_t)wanted),
               "r"(shared_address(to)), "h"((uint16_t)value)
               : "memory");
}

// Orders are given in turn; entry `place` of all is in order place / ENTRIES. Places may wrap around.
struct Lister {
  Control* control;
  int lane;
  uint32_t end = 0, free = 0;     // the next entry's place; the first that may still be in use
  uint32_t start = 0;             // of the next order
  uint32_t begun = 0, ended = 0;  // blocks that begin and end in it
  int channels = 0;

  __device__ __forceinline__ Lister(Control* control, int lane) : control(control), lane(lane) {}

  __device__ __forceinline__ void write_if(bool wanted, uint32_t place, uint32_t source, uint32_t piece) const {
    store_if(wanted, control->orders.source + place % (ORDERS * ENTRIES), source);
    store_if(wanted, control->orders.piece + place % (ORDERS * ENTRIES), piece);
  }

  // Waits until entries may be written up to `place`.
  __device__ __forceinline__ void reserve(uint32_t place) {
    for (; (int)(place - free) > 0; free += ENTRIES)
      barrier_wait(shared_address(control->order_empty + free / ENTRIES % ORDERS), free / (ENTRIES * ORDERS) & 1 ^ 1);
  }

  // Appends the entries of 64 columns, column after column. `rows`: where the weights of a lane's two columns begin, in 16
  // bytes; `first_piece`: where the columns begin in the patches. The taps of a column go from the last to the first: pieces
  // then ascend, and neighbours in the list lie in different banks.
  __device__ __forceinline__ void append(const Task& t, const Columns& c, const uint32_t (&rows)[2], uint32_t first_piece) {
    const uint32_t every_tap = (1u << t.taps) - 1, counts = __popc(c.mask[0] & every_tap) | __popc(c.mask[1] & every_tap) << 16;
    uint32_t sum = counts;
#pragma unroll
    for (int step = 1; step < LANES; step *= 2) {
      const uint32_t other = __shfl_up_sync(EVERY_LANE, sum, step);
      if (lane >= step) sum += other;
    }
    const uint32_t total = __shfl_sync(EVERY_LANE, sum, LANES - 1), before = sum - counts;
    reserve(end + (total & NONE) + (total >> 16));
#pragma unroll
    for (int half = 0; half < 2; half++) {
      uint32_t place = end + (half ? (total & NONE) + (before >> 16) : before & NONE);
      uint32_t piece = first_piece + half * LANES + lane;
      if (t.shape.ksize == 1) piece -= 2 * DOWN + 2 * RIGHT;
#pragma unroll
      for (int tap = MAX_TAPS - 1; tap >= 0; tap--) {
        const uint32_t taken = c.mask[half] & every_tap & 1 << tap;
        write_if(taken, place, rows[half] + tap * (t.shape.C / 8), piece + (2 - tap / 3) * DOWN + (2 - tap % 3) * RIGHT);
        place += taken >> tap;
      }
    }
    end += (total & NONE) + (total >> 16);
  }

  // Gives the next order.
  __device__ __forceinline__ void give(uint32_t last) {
    __syncwarp();
    if (lane == 0) {
      control->orders.marks[start / ENTRIES % ORDERS] = make_uint4(begun, ended, last, channels);
      barrier_arrive(shared_address(control->order_full + start / ENTRIES % ORDERS));
    }
    begun = ended = 0;
    start += ENTRIES;
  }

  // Gives what is left; entries that lack are the last one's weights times zeros.
  __device__ __forceinline__ void give_rest(bool last) {
    reserve(start + ENTRIES);
    __syncwarp();
    const uint32_t source = end != start ? control->orders.source[(end - 1) % (ORDERS * ENTRIES)] : 0;
    for (uint32_t place = end + lane; (int)(start + ENTRIES - place) > 0; place += LANES)
      write_if(true, place, source, WIDTH);
    give(last);
    end = start;
  }
};

template <int N>
__device__ __forceinline__ void list_entries(const Task& t, Control* control, int lane) {
  Lister lister(control, lane);
  int patch = 0;
  Item item = item_of(t, blockIdx.x);
  int count = __ldg(t.windows.counts + item.window);
  Columns coming;
  fetch_columns(t, item.window, count, 0, Blocks(t, count, WIDTH / STEP_ROWS).first_column(1), lane, coming);
  for (int number = blockIdx.x; number < t.items; number += gridDim.x) {
    const bool more = number + (int)gridDim.x < t.items;
    const Item next_item = item_of(t, more ? number + gridDim.x : number);
    const int next_count = __ldg(t.windows.counts + next_item.window);
    const Blocks blocks(t, count, WIDTH / STEP_ROWS), next_blocks(t, next_count, WIDTH / STEP_ROWS);
    const int channel = item.channel_block * N;
    lister.channels = count > 0 ? t.shape.C - channel : 0;
    for (int block = 0; block < blocks.number; block++) {
      const bool last_block = block + 1 == blocks.number;
      const int first = blocks.first_column(block), end = blocks.first_column(block + 1);
      lister.begun++;
      for (int column = first; column == first || column < end; column += COLUMNS) {
        const Columns c = coming;
        uint32_t rows[2];
#pragma unroll
        for (int half = 0; half < 2; half++)
          rows[half] = (c.id[half] * t.shape.F + c.filter[half]) * (t.taps * t.shape.C / 8) + channel / 8;
        if (column + COLUMNS < end)
          fetch_columns(t, item.window, count, column + COLUMNS, end, lane, coming);
        else if (!last_block)
          fetch_columns(t, item.window, count, end, blocks.first_column(block + 2), lane, coming);
        else if (more)
          fetch_columns(t, next_item.window, next_count, 0, next_blocks.first_column(1), lane, coming);
        lister.append(t, c, rows, patch * (PATCH_BYTES / PIECE) + column - first);
#pragma unroll 1
        while (lister.end - lister.start > ENTRIES) lister.give(false);
      }
      patch = patch + 1 == PATCHES ? 0 : patch + 1;
      lister.ended++;
      // What is left waits for the next block's entries, but no stage uses more than two blocks.
      if (last_block || lister.ended > 1 || lister.end - lister.start == ENTRIES) lister.give_rest(last_block);
    }
    item = next_item;
    count = next_count;
  }
  for (int i = 0; i < LOADERS; i++) {
    lister.reserve(lister.start + ENTRIES);
    lister.give(NO_MORE);
  }
}

// Copies an order's weights into a stage.
template <int N>
__device__ __forceinline__ void fill_stage(const Task& t, const uint32_t* source, int channels, uint32_t stage, int lane) {
  constexpr int PIECES = N / 8, GROUPS = LANES / PIECES, ROWS = ENTRIES / GROUPS;  // a group of lanes copies a row at a time
  const int group = lane / PIECES, piece = lane % PIECES, bytes = piece * 8 < channels ? 16 : 0;
  const char* weights = (const char*)t.weights + (bytes ? piece * 16 : 0);
  asm volatile("" : "+l"(weights));  // one sum, not two, for each copy
  const uint32_t to = stage + group * ROWS / STEP_ROWS * STEP_BYTES<N> + piece / 8 * STEP_GROUP_BYTES + (piece % 8 << 4);
#pragma unroll
  for (int row = 0; row < ROWS; row += 4) {
    const uint4 four = *(const uint4*)(source + group * ROWS + row);
    const uint32_t from[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint32_t at = (row + i) / STEP_ROWS * STEP_BYTES<N> + (row + i) % STEP_ROWS * ROW_BYTES;
      copy16((to ^ (row + i) % 8 << 4) + at, weights + (uint64_t)from[i] * 16, bytes);
    }
  }
}

// Loading warp number `warp`: every LOADERS-th stage. There are no more of them than stages: a wait tells one round of the ring
// from the next, no further.
template <int N>
__device__ __forceinline__ void load_entries(const Task& t, char* shared, Control* control, int warp, int lane) {
  const uint32_t stages = shared_address(shared) + t.stage_offset;
  int stage = warp, order = warp;
  uint32_t stage_round = 0, order_round = 0;
  while (true) {
    barrier_wait(shared_address(control->order_full + order), order_round);
    const uint4 marks = control->orders.marks[order];
    if (marks.z == NO_MORE) break;
    barrier_wait(shared_address(control->stage_empty + stage), stage_round ^ 1);
    const uint32_t full = shared_address(control->stage_full + stage);
    Note& note = control->notes[stage];
    const int row = lane % STEP_ROWS, step = lane / STEP_ROWS * 2;
    const uint16_t* pieces = control->orders.piece + order * ENTRIES + step * STEP_ROWS + row;
    *(uint32_t*)&note.piece[row][step] = pieces[0] | pieces[STEP_ROWS] << 16;
    if (lane == 0) note.marks = marks;
    __syncwarp();
    if (lane == 0) barrier_arrive(full);
    fill_stage<N>(t, control->orders.source + order * ENTRIES, (int)marks.w, stages + stage * STEPS * STEP_BYTES<N>, lane);
    barrier_arrive_after_copies(full);
    __syncwarp();
    if (lane == 0) barrier_arrive(shared_address(control->order_empty + order));
    stage += LOADERS;
    if (stage >= t.stages) {
      stage -= t.stages;
      stage_round ^= 1;
    }
    order += LOADERS;
    if (order >= ORDERS) {
      order -= ORDERS;
      order_round ^= 1;
    }
  }
  wait_copies<0>();
}

}  // namespace smoe::input_grad::octets
