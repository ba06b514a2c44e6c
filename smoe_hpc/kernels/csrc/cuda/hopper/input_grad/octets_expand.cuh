// The expanding warps where eight samples are one piece: g of a tile's window is held in registers, and for each block of
// columns the warps fill a patch with zeros and then with what their pixels selected of that block.
#pragma once
#include "octets.cuh"

namespace smoe::input_grad::octets {

// What a lane holds of a pixel: four channels of eight samples, and the columns of the window's union that they belong to.
struct Pixel {
  uint4 piece[LANE_CHANNELS];
  uint32_t columns[LANE_CHANNELS / 2];
};

// A warp has a quarter of a window of the largest size. Its pixels lie at fixed distances from its first.
struct Spot {
  int row, column;
  __device__ __forceinline__ Spot(int warp, int number)
      : row(warp / 2 * SIDE + number / SIDE), column(warp % 2 * SIDE + number % SIDE) {}
};
__device__ __forceinline__ uint32_t offset_of(int warp) { return (warp / 2 * DOWN + warp % 2 * RIGHT) * SIDE * PIECE; }
__device__ constexpr uint32_t distance_of(int number) { return (number / SIDE * DOWN + number % SIDE * RIGHT) * PIECE; }

// The columns of a lane's four channels of each pixel, two in a word; NONE for those that are not there.
__device__ __forceinline__ void load_columns(const Task& t, const Item& item, int warp, int lane, Pixel (&pixels)[PIXELS]) {
  const uint16_t* slots = t.windows.slots + item.window * t.pixels * t.shape.K;
  int channel = lane * LANE_CHANNELS;
  asm volatile("" : "+r"(channel), "+r"(warp));  // nothing of this is worth a register from one tile to the next
  const int rows = channel < t.channels ? t.windows.rows : 0, columns = t.windows.columns;
  auto each_pixel = [&](auto load) {
#pragma unroll
    for (int i = 0; i < PIXELS; i++) {
      const Spot spot(warp, i);
      pixels[i].columns[0] = pixels[i].columns[1] = NONE << 16 | NONE;
      if (spot.row < rows && spot.column < columns)
        load(slots + (spot.row * columns + spot.column) * t.shape.K, pixels[i].columns);
    }
  };
  if (t.shape.F == 1) {
    each_pixel([&](const uint16_t* from, uint32_t (&two)[2]) {
      const uint2 four = __ldg((const uint2*)(from + channel));
      two[0] = four.x;
      two[1] = four.y;
    });
  } else if (t.shape.F % LANE_CHANNELS == 0) {
    const int selection = divide_by_filters(t, channel), filter = channel - selection * t.shape.F;
    each_pixel([&](const uint16_t* from, uint32_t (&two)[2]) {
      const uint32_t slot = __ldg(from + selection), column = slot * t.shape.F + filter;
      two[0] = slot == NONE ? NONE << 16 | NONE : column + 1 << 16 | column;
      two[1] = slot == NONE ? NONE << 16 | NONE : column + 3 << 16 | column + 2;
    });
  } else {
#pragma unroll
    for (int k = 0; k < LANE_CHANNELS; k++) {
      const int selection = divide_by_filters(t, channel + k), filter = channel + k - selection * t.shape.F;
#pragma unroll
      for (int i = 0; i < PIXELS; i++) {
        const Spot spot(warp, i);
        uint32_t slot = NONE;
        if (spot.row < rows && spot.column < columns)
          slot = __ldg(slots + (spot.row * columns + spot.column) * t.shape.K + selection);
        const uint32_t column = slot == NONE ? NONE : slot * t.shape.F + filter;
        pixels[i].columns[k / 2] = k % 2 ? pixels[i].columns[k / 2] | column << 16 : column;
      }
    }
  }
}

// This warp's pixels of a window. Pixels outside have no columns, and samples that do not exist are not stored at the
// end: something else is read in their places.
__device__ __forceinline__ void load_pixels(const Task& t, const Item& item, int warp, int lane, Pixel (&pixels)[PIXELS]) {
  const int channel = lane * LANE_CHANNELS < t.channels ? lane * LANE_CHANNELS : 0;
  const int there = min(SAMPLES, t.shape.B - item.chunk * SAMPLES);
  const int64_t sample = (int64_t)t.shape.Ho * t.shape.Wo * t.channels;
  // Places in a sample of the warp's rows and columns of pixels.
  uint32_t down[SIDE], right[SIDE];
#pragma unroll
  for (int i = 0; i < SIDE; i++) {
    const Spot spot(warp, i * SIDE + i);
    const int h = item.y * t.windows.step_h + t.windows.first + spot.row;
    int w = item.x * t.windows.step_w + t.windows.first + spot.column;
    if (t.shape.wrap) {
      w %= t.shape.Wo;
      if (w < 0) w += t.shape.Wo;
    }
    down[i] = min(max(h, 0), t.shape.Ho - 1) * t.shape.Wo * t.channels + channel;
    right[i] = min(max(w, 0), t.shape.Wo - 1) * t.channels;
  }
  const uint16_t* from = t.g + item.chunk * SAMPLES * sample;
  uint2 value[SAMPLES][PIXELS];
#pragma unroll
  for (int b = 0; b < SAMPLES; b++) {
#pragma unroll
    for (int i = 0; i < PIXELS; i++) value[b][i] = __ldg((const uint2*)(from + (down[i / SIDE] + right[i % SIDE])));
    if (b + 1 < there) from += sample;
  }
  load_columns(t, item, warp, lane, pixels);
#pragma unroll
  for (int i = 0; i < PIXELS; i++)
#pragma unroll
    for (int k = 0; k < LANE_CHANNELS; k++) {
      uint32_t two[SAMPLES / 2];
#pragma unroll
      for (int b = 0; b < SAMPLES; b += 2) {
        const uint2 low = value[b][i], high = value[b + 1][i];
        two[b / 2] = __byte_perm(k < 2 ? low.x : low.y, k < 2 ? high.x : high.y, k % 2 ? 0x7632 : 0x5410);
      }
      pixels[i].piece[k] = make_uint4(two[0], two[1], two[2], two[3]);
    }
}

// Fills this warp's pixels of a patch, the first of which is at `patch`.
__device__ __forceinline__ void fill_pixels(Pixel (&pixels)[PIXELS], uint32_t first_column, int columns, char* patch,
                                            int lane) {
#pragma unroll
  for (int i = 0; i < PIXELS; i++)
#pragma unroll
    for (int part = 0; part < WIDTH; part += LANES)
      if (part + lane < columns) *(uint4*)(patch + (part + lane) * PIECE + distance_of(i)) = make_uint4(0, 0, 0, 0);
  __syncwarp();
#pragma unroll
  for (int i = 0; i < PIXELS; i++) {
    // Or they would be taken apart once for all blocks, in more registers than there are.
    asm volatile("" : "+r"(pixels[i].columns[0]), "+r"(pixels[i].columns[1]));
#pragma unroll
    for (int k = 0; k < LANE_CHANNELS; k++) {
      const uint32_t two = pixels[i].columns[k / 2], column = (k % 2 ? two >> 16 : two & NONE) - first_column;
      if (column < columns) *(uint4*)(patch + column * PIECE + distance_of(i)) = pixels[i].piece[k];
    }
  }
  __syncwarp();
}

__device__ __forceinline__ void expand(const Task& t, char* shared, Control* control, int warp, int lane) {
  const uint32_t full = shared_address(control->patch_full), empty = shared_address(control->patch_empty);
  Place place;
  for (int number = blockIdx.x; number < t.items; number += gridDim.x) {
    const Item item = item_of(t, number);
    const Blocks blocks(t, __ldg(t.windows.counts + item.window), WIDTH / STEP_ROWS);
    Pixel pixels[PIXELS];
    load_pixels(t, item, warp, lane, pixels);
#pragma unroll 1
    for (int block = 0; block < blocks.number; block++) {
      barrier_wait(empty + 8 * place.index, place.round ^ 1);
      const int first = blocks.first_column(block), columns = blocks.first_column(block + 1) - first;
      fill_pixels(pixels, first, columns, shared + place.index * PATCH_BYTES + offset_of(warp), lane);
      if (lane == 0) barrier_arrive(full + 8 * place.index);
      place.advance(PATCHES);
    }
  }
}

}  // namespace smoe::input_grad::octets
