// The two warps of the weight gradient's kernel that spread g, as it was loaded, over the columns of the pair of blocks.
#pragma once
#include "load.cuh"

namespace smoe::weight_grad {

constexpr uint32_t NO_SLOT = 0xffff;

__device__ __forceinline__ void store_zeros(uint32_t to) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(to), "r"(0) : "memory");
}
// Four 8x8 matrices of 16-bit numbers; each lane gives the address of one 16-byte row.
__device__ __forceinline__ void store_matrices(uint32_t to, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};"
               ::"r"(to), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}
__device__ __forceinline__ void store_2_bytes(uint32_t to, uint32_t a) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(to), "h"((uint16_t)a) : "memory");
}
__device__ __forceinline__ uint32_t load_2_bytes(uint32_t from) {
  uint16_t value;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(value) : "r"(from) : "memory");
  return value;
}

__device__ __forceinline__ uint32_t address_of(uint32_t place) { return place / BLOCK * G_BLOCK + place % BLOCK * 16; }

// Where channel `channel` of row `row` of a column of pixels lies, as it was loaded.
__device__ __forceinline__ uint32_t raw_place(int row, int channel) {
  return channel / 64 * RAW_HALF + row * 128 + (channel % 64 / 8 ^ row % 8) * 16 + channel % 8 * 2;
}

// 8 rows of one pixel and 128 channels, turned round by the way they are loaded: each lane then says where 8 rows of one
// channel go. A column of the pair is F times the slot plus the filter; for what is not there that is far beyond, and such
// rows go to `nowhere`.
template <bool ONE_FILTER>
__device__ __forceinline__ void spread(const Task& t, int first_column, int part, bool inside, uint32_t rows, uint32_t slots,
                                       uint32_t block, uint32_t nowhere, int lane) {
  uint32_t to[4], r[4][4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int channel = part * 128 + i * 32 + lane;
    uint32_t place;
    if (ONE_FILTER) {
      place = load_2_bytes(slots + (i * 32 + lane) * 2) - first_column;
    } else {
      const int number = divide_by_filters(t, channel);
      const uint32_t slot = load_2_bytes(slots + (number - first_slot(t, part)) * 2);
      place = slot * t.shape.F + channel - number * t.shape.F - first_column;
    }
    to[i] = inside && channel < t.shape.K * t.shape.F && place < PAIR ? block + address_of(place) : nowhere;
  }
#pragma unroll
  for (int i = 0; i < 4; i++) load_matrices_transposed(r[i], rows + raw_place(lane % 8, i * 32 + lane / 8 * 8));
#pragma unroll
  for (int i = 0; i < 4; i++) store_matrices(to[i], r[i]);
}

// 8 rows of any pixels and samples and 128 channels, a number at a time; `pixel` is the number of the column's first one.
__device__ __forceinline__ void spread_any(const Task& t, int first_column, int part, int group, int pixel_rows, int pixel,
                                           uint32_t rows, uint32_t block, int lane) {
  const int channels = min(128, t.shape.K * t.shape.F - part * 128);
#pragma unroll 1
  for (int row = 0; row < 8; row++) {
    const int pixel_row = (group * 8 + row) / t.batch;
    if (pixel_row >= pixel_rows) break;
    const uint16_t* slots = t.windows.slots + (int64_t)(pixel + pixel_row * t.windows.columns) * t.shape.K;
#pragma unroll 1
    for (int channel = lane; channel < channels; channel += 32) {
      const int number = divide_by_filters(t, part * 128 + channel), slot = slots[number];
      const uint32_t place = slot * t.shape.F + part * 128 + channel - number * t.shape.F - first_column;
      if (slot != NO_SLOT && place < PAIR)
        store_2_bytes(block + address_of(place) + row * 2, load_2_bytes(rows + raw_place(row, channel)));
    }
  }
}

enum Spreading { ONE_FILTER, MORE_FILTERS, ANY };  // the last for less than 8 samples a step too

// A warp that spreads g over the columns of the pair of blocks: one of the two columns of pixels of each step.
template <Spreading HOW>
__device__ __forceinline__ void expand(const Task& t, Shared& shared, uint32_t base, int number, int lane) {
  Place raw, g;
  const uint32_t nowhere = shared_address(shared.nowhere[number]);
  for (;;) {
    barrier_wait(at(shared.raw_full, raw.stage), raw.parity);
    const Step& step = shared.steps[raw.stage];
    const uint32_t word = step.word;
    const int first_column = step.first_column, pixel_rows = step.rows[number], pixel = step.pixel + number;
    barrier_wait(at(shared.g_empty, g.stage), g.parity ^ 1);
    if (number == 0 && lane == 0) shared.words[g.stage] = word;
    if (word & END) break;
    const uint32_t stage = base + t.g_at + g.stage * G_STAGE + number * 4 * G_GROUP;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      store_zeros(stage + i * 512 + lane * 16);
      store_zeros(stage + G_BLOCK + i * 512 + lane * 16);
    }
    __syncwarp();
#pragma unroll 1
    for (int part = 0; part < t.parts; part++) {
      if (part > 0) barrier_wait(at(shared.raw_full, raw.stage), raw.parity);
      const uint32_t from = base + t.raw_at + raw.stage * RAW_STAGE;
#pragma unroll 1
      for (int group = 0; group < 4; group++) {
        const int row = group >> t.groups_log;
        const uint32_t rows = from + number * COLUMN * 128 + group * 8 * 128, block = stage + group * G_GROUP;
        if (HOW == ANY)
          spread_any(t, first_column, part, group, pixel_rows, pixel, rows, block, lane);
        else
          spread<HOW == ONE_FILTER>(t, first_column, part, row < pixel_rows, rows,
                                    from + RAW_BYTES + (row * 2 + number) * t.slot_pitch, block, nowhere, lane);
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(at(shared.raw_empty, raw.stage));
      raw.next(t.raw_stages);
    }
    if (lane == 0) barrier_arrive(at(shared.g_full, g.stage));
    g.next(t.g_stages);
  }
  __syncwarp();
  if (lane == 0) barrier_arrive(at(shared.g_full, g.stage));
}

}  // namespace smoe::weight_grad
