// The input gradient's expanding warpgroup: g, which holds what each pixel selected, as columns of the window's union.
//
// Each warp has every fourth pixel of the window. For a block of 64 columns it inverts the pixel's slots (which place in a row
// of g has this column?) and then fills the rows of the patch, two neighbouring columns a lane, for all samples of the tile.
#pragma once
#include "task.cuh"

namespace smoe::input_grad {

// Where this warp's pixels lie in g, in pixels of a sample, or -1; lane i has those of its pixels i and LANES + i.
struct Pixels {
  int place[2];

  __device__ __forceinline__ Pixels(const Task& t, const Item& item, int warp, int lane) {
#pragma unroll
    for (int part = 0; part < 2; part++) {
      const unsigned pixel = warp + (part * LANES + lane) * WARPS, row = pixel / t.windows.columns;
      int h = item.y * t.windows.step_h + t.windows.first + row;
      int w = item.x * t.windows.step_w + t.windows.first + pixel - row * t.windows.columns;
      if (t.shape.wrap) {
        w %= t.shape.Wo;
        if (w < 0) w += t.shape.Wo;
      }
      bool inside = pixel < t.pixels && h >= 0 && h < t.shape.Ho && w >= 0 && w < t.shape.Wo;
      place[part] = inside ? h * t.shape.Wo + w : -1;
    }
  }

  __device__ __forceinline__ int of(int number) const {
    return __shfl_sync(EVERY_LANE, number < LANES ? place[0] : place[1], number % LANES);
  }
};

// The rows of g and the slots of one pixel of this warp, into shared memory.
__device__ __forceinline__ void load_pixel(const Task& t, const Item& item, const Pixels& pixels, int number, char* shared,
                                           int warp, int lane) {
  const int place = pixels.of(number), pixel = warp + number * WARPS;
  const int pieces = t.channels / 8, batch = t.tile.batch, selected = t.shape.K;
  if (pixel >= t.pixels) return;
  const uint16_t* slots = t.windows.slots + (item.window * t.pixels + pixel) * selected;
  char* to_slots = shared + t.slot_offset + pixel * selected * 2;
  if (selected % 8 == 0) {
    for (int i = lane * 8; i < selected; i += LANES * 8) copy16(shared_address(to_slots) + i * 2, slots + i);
  } else {
    for (int i = lane; i < selected; i += LANES) ((uint16_t*)to_slots)[i] = __ldg(slots + i);
  }
  if (place < 0) return;
  const int64_t sample = (int64_t)t.shape.Ho * t.shape.Wo * t.channels;
  const uint16_t* from = t.g + item.chunk * batch * sample + (int64_t)place * t.channels;
  const uint32_t to = shared_address(shared) + t.raw_offset + pixel * batch * pieces * 16;
  const int there = min(batch, t.shape.B - item.chunk * batch);
  int b = 0, piece = lane;
#pragma unroll 1
  while (true) {
    for (; piece >= pieces; piece -= pieces) b++;
    if (b >= batch) break;
    const bool real = b < there;
    copy16(to + (b * pieces + piece) * 16, real ? from + b * sample + piece * 8 : t.g, real ? 16 : 0);
    piece += LANES;
  }
}

// For TURNS pixels of this warp, which place in a row of g each of the block's 64 columns has.
template <Mode MODE>
__device__ __forceinline__ void invert_slots(const Task& t, const uint16_t* slots, int first_column, int first_pixel,
                                             uint32_t (&inverse)[TURNS][COLUMNS / 2], int lane) {
#pragma unroll
  for (int turn = 0; turn < TURNS; turn++) inverse[turn][lane] = NONE << 16 | NONE;
  __syncwarp();
  const int turns = min(TURNS, (t.pixels - first_pixel + WARPS - 1) / WARPS);
  if (MODE != DIRECT && t.shape.F == 1 && t.shape.K % 4 == 0) {
    for (int channel = lane * 4; channel < t.channels; channel += LANES * 4) {
      uint2 four[TURNS];
#pragma unroll
      for (int turn = 0; turn < TURNS; turn++)
        if (turn < turns) four[turn] = *(const uint2*)(slots + (first_pixel + turn * WARPS) * t.shape.K + channel);
#pragma unroll
      for (int turn = 0; turn < TURNS; turn++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          uint32_t two = i < 2 ? four[turn].x : four[turn].y, column = (i % 2 ? two >> 16 : two & 0xffff) - first_column;
          if (turn < turns && column < COLUMNS) ((uint16_t*)inverse[turn])[column] = (uint16_t)((channel + i) * 2);
        }
    }
  } else {
    for (int channel = lane; channel < t.channels; channel += LANES) {
      const int selection = divide_by_filters(t, channel), filter = channel - selection * t.shape.F;
      uint32_t slot[TURNS];
#pragma unroll
      for (int turn = 0; turn < TURNS; turn++) {
        const uint16_t* from = slots + (first_pixel + turn * WARPS) * t.shape.K + selection;
        slot[turn] = NONE;
        if (turn < turns) slot[turn] = MODE == DIRECT ? __ldg(from) : *from;
      }
#pragma unroll
      for (int turn = 0; turn < TURNS; turn++) {
        uint32_t column = slot[turn] * t.shape.F + filter - first_column;
        if (slot[turn] != NONE && column < COLUMNS) ((uint16_t*)inverse[turn])[column] = (uint16_t)(channel * 2);
      }
    }
  }
  __syncwarp();
}

// Two columns of all samples of one pixel, TOGETHER at a time. A column that the pixel did not select reads the row's first
// number and drops it: a branch would cost more. `from`: the first sample's row; `there`: samples that exist.
template <int TOGETHER, Mode MODE>
__device__ __forceinline__ void expand_pixel(const char* from, int64_t pitch, int batch, int there, uint32_t pair, char* patch,
                                             int first_row, int lane) {
  const bool has_low = (pair & 0xffff) != NONE, has_high = pair >> 16 != NONE;
  const uint32_t keep = (has_low ? 0xffff : 0) | (has_high ? 0xffff0000 : 0);
  const char *at_low = from + (has_low ? pair & 0xffff : 0), *at_high = from + (has_high ? pair >> 16 : 0);
  for (int b = 0; b < batch; b += TOGETHER) {
    uint32_t value[TOGETHER];
#pragma unroll
    for (int i = 0; i < TOGETHER; i++) {
      if constexpr (MODE == STAGED) {
        const uint32_t offset = (b + i) * (uint32_t)pitch;
        value[i] = __byte_perm(*(const uint16_t*)(at_low + offset), *(const uint16_t*)(at_high + offset), 0x5410) & keep;
      } else {
        const int64_t offset = min(b + i, there - 1) * pitch;
        value[i] = __byte_perm(__ldg((const uint16_t*)(at_low + offset)), __ldg((const uint16_t*)(at_high + offset)), 0x5410);
        value[i] &= b + i < there ? keep : 0;
      }
    }
#pragma unroll
    for (int i = 0; i < TOGETHER; i++) {
      const uint32_t row = first_row + b + i;
      *(uint32_t*)(patch + row * PATCH_ROW_BYTES + ((lane / 4 ^ row % 8) << 4) + lane % 4 * 4) = value[i];
    }
  }
}

// The rows of TURNS pixels of this warp, the first of them its number `first`.
template <int TOGETHER, Mode MODE>
__device__ __forceinline__ void expand_pixels(const Task& t, const Item& item, const Pixels& pixels, int first, char* shared,
                                              char* patch, const uint32_t (&inverse)[TURNS][COLUMNS / 2], int warp, int lane) {
  const int batch = t.tile.batch, first_sample = item.chunk * batch;
#pragma unroll 1
  for (int turn = 0; turn < TURNS; turn++) {
    const int pixel = warp + (first + turn) * WARPS, row = pixel * batch;
    if (pixel >= t.pixels) break;
    const uint32_t pair = inverse[turn][lane];
    if constexpr (MODE == STAGED) {
      const char* from = shared + t.raw_offset + row * t.channels * 2;
      expand_pixel<TOGETHER, STAGED>(from, t.channels * 2, batch, batch, pair, patch, row, lane);
    } else {
      const int64_t sample = (int64_t)t.shape.Ho * t.shape.Wo * t.channels, place = pixels.of(first + turn);
      const uint16_t* from = t.g + first_sample * sample + (place < 0 ? 0 : place) * t.channels;
      const int there = min(batch, t.shape.B - first_sample);
      expand_pixel<TOGETHER, DIRECT>((const char*)from, sample * 2, batch, there, pair, patch, row, lane);
    }
  }
}

template <int TOGETHER, Mode MODE>
__device__ __forceinline__ void expand_items(const Task& t, char* shared, Control* control, int warp, int lane) {
  const uint32_t full = shared_address(control->patch_full), empty = shared_address(control->patch_empty);
  auto& inverse = control->inverse[warp];
  Place place;
  Item item = item_of(t, blockIdx.x);
  Pixels pixels(t, item, warp, lane);
  int count = __ldg(t.windows.counts + item.window);
  if (MODE != DIRECT) {
#pragma unroll 1
    for (int i = 0; warp + i * WARPS < t.pixels; i++) load_pixel(t, item, pixels, i, shared, warp, lane);
    commit_copies();
  }
  for (int number = blockIdx.x; number < t.items; number += gridDim.x) {
    const bool more = number + (int)gridDim.x < t.items;
    const Item next = item_of(t, more ? number + gridDim.x : number);
    const Pixels next_pixels(t, next, warp, lane);
    const int next_count = __ldg(t.windows.counts + next.window);
    const Blocks blocks(t, count);
    const uint16_t* slots = (const uint16_t*)(shared + t.slot_offset);
    if (MODE == DIRECT) slots = t.windows.slots + item.window * t.pixels * t.shape.K;
    wait_copies<0>();
    __syncwarp();
    for (int block = 0; block < blocks.number; block++) {
      barrier_wait(empty + 8 * place.index, place.round ^ 1);
      char* patch = shared + place.index * t.patch_bytes;
      for (int first = 0; warp + first * WARPS < t.pixels; first += TURNS) {
        invert_slots<MODE>(t, slots, blocks.first_column(block), warp + first * WARPS, inverse, lane);
        expand_pixels<TOGETHER, MODE>(t, item, pixels, first, shared, patch, inverse, warp, lane);
        __syncwarp();
      }
      if (lane == 0) barrier_arrive(full + 8 * place.index);
      place.advance(PATCHES);
    }
    // The copies' place is free for the next tile's; the multipliers still have two blocks of this one to do.
    if (MODE != DIRECT && more) {
#pragma unroll 1
      for (int i = 0; warp + i * WARPS < t.pixels; i++) load_pixel(t, next, next_pixels, i, shared, warp, lane);
      commit_copies();
    }
    item = next;
    pixels = next_pixels;
    count = next_count;
  }
}

template <Mode MODE>
__device__ __forceinline__ void expand(const Task& t, char* shared, Control* control, int warp, int lane) {
  if (t.tile.batch >= 8)
    expand_items<8, MODE>(t, shared, control, warp, lane);
  else if (t.tile.batch > 1)
    expand_items<2, MODE>(t, shared, control, warp, lane);
  else
    expand_items<1, MODE>(t, shared, control, warp, lane);
}

}  // namespace smoe::input_grad
