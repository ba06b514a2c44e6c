// How the forward kernel stores: of all columns of a row, those that the row's pixel selected, in its order.
//
// Results lie in shared memory column by column, 64 rows of 2 bytes each, so that the samples of a pixel (neighbouring rows)
// move as one: a thread reads 8 samples of 8 columns, turns them round and writes 8 channels of each sample. The first block of
// columns writes all channels, zeros for those that a later one fills in.
#pragma once
#include "task.cuh"

namespace smoe::forward {

__device__ __forceinline__ uint32_t pack(float a, float b, __nv_bfloat16) {
  __nv_bfloat162 both = __floats2bfloat162_rn(a, b);
  return *(uint32_t*)&both;
}
__device__ __forceinline__ uint32_t pack(float a, float b, __half) {
  __half2 both = __floats2half2_rn(a, b);
  return *(uint32_t*)&both;
}

// Address of rows 8 g .. 8 g + 7 of a column. The order of these pieces changes from column to column, or else threads that
// read 8 columns apart would all use the same banks.
__device__ __forceinline__ uint32_t piece(uint32_t stage, int column, int group) {
  return stage + column * 128 + ((group ^ (column & 7) ^ (column >> 3 & 7)) << 4);
}

// The results of a warp, 16 rows, into its part of the stage.
template <typename T, int LENGTH>
__device__ __forceinline__ void put_columns(uint32_t stage, const float (&sum)[LENGTH], int width) {
  const int lane = threadIdx.x % 32, group = threadIdx.x / 32 % 4 * 2 + (lane >> 3 & 1), column = lane / 16 * 8 + lane % 8;
#pragma unroll
  for (int n = 0; n < LENGTH / 8; n++) {
    if (n * 16 >= width) break;
    const float* d = sum + 8 * n;
    store_matrices_transposed(piece(stage, n * 16 + column, group), pack(d[0], d[1], T()), pack(d[2], d[3], T()),
                              pack(d[4], d[5], T()), pack(d[6], d[7], T()));
  }
  __syncwarp();  // a warp reads what it wrote itself
}

constexpr int LEFT_OUT = 0xffff;  // slot of a selection of no expert; such a channel is zero

// Where channels 8 octet .. 8 octet + 7 of a pixel come from.
struct Octet {
  int columns[8];  // within the block; outside [0, width) if another block has it, or none

  __device__ __forceinline__ void find(const Task& p, int window, int pixel, int octet, int first_column) {
    const int selected = p.shape.K, filters = p.shape.F;
    const uint16_t* slots = p.windows.slots + ((int64_t)window * (p.tile.rows * p.tile.columns) + pixel) * selected;
    if (filters == 1) {
      const uint4 all = *(const uint4*)(slots + 8 * octet);
      const uint32_t words[4] = {all.x, all.y, all.z, all.w};
#pragma unroll
      for (int q = 0; q < 8; q++) set(q, words[q / 2] >> 16 * (q & 1) & 0xffff, 1, 0, first_column);
    } else if (filters % 8 == 0) {  // all of one expert
      const int k = p.by_filters.quotient(8 * octet), slot = slots[k];
#pragma unroll
      for (int q = 0; q < 8; q++) set(q, slot, filters, 8 * octet - k * filters + q, first_column);
    } else {
      int k = p.by_filters.quotient(8 * octet), f = 8 * octet - k * filters, slot = slots[k];
#pragma unroll
      for (int q = 0; q < 8; q++) {
        set(q, slot, filters, f, first_column);
        if (++f == filters && q < 7) {
          f = 0;
          slot = slots[++k];
        }
      }
    }
  }

  // A bit for each that is in this block.
  __device__ __forceinline__ uint32_t inside(int width) const {
    uint32_t bits = 0;
#pragma unroll
    for (int q = 0; q < 8; q++) bits |= (uint32_t)((unsigned)columns[q] < (unsigned)width) << q;
    return bits;
  }

 private:
  __device__ __forceinline__ void set(int q, int slot, int filters, int filter, int first_column) {
    columns[q] = slot * filters + filter - first_column;
    if (slot == LEFT_OUT) columns[q] = -1;
  }
};

// What a warp does with the results of its 16 rows for one block of columns: `prepare` may go before they are there.
template <typename T, bool BY_SAMPLES>
struct Store {
  const Task& p;
  int window, tile_y, tile_x, first_sample, first_column, width;
  Octet ahead;  // of the first round

  __device__ __forceinline__ void prepare() { look_up(threadIdx.x % 32, ahead); }
  __device__ __forceinline__ void run(uint32_t stage) {
    const int rounds = rows() * octets();
    for (int i = threadIdx.x % 32; i < rounds; i += 32) {
      if (i >= 32) look_up(i, ahead);
      T* to = place(i);
      if (!to) continue;
      if constexpr (BY_SAMPLES)
        store_samples(stage, i, to);
      else
        store_row(stage, i, to);
    }
  }

 private:
  // A round stores 8 channels of what makes a pixel: of 8 rows, samples of one pixel, if the batch is 8 or more; else of 1 row.
  __device__ int rows() const { return BY_SAMPLES ? 2 : 16; }
  __device__ int octets() const { return p.shape.K * p.shape.F / 8; }
  __device__ int unit(int i) const { return p.by_octets.quotient(i); }
  __device__ int octet(int i) const { return i - unit(i) * octets(); }
  __device__ int row(int i) const { return threadIdx.x / 32 % 4 * 16 + unit(i) * (16 / rows()); }  // of the warpgroup's 64
  __device__ int tile_row(int i) const { return threadIdx.x / 128 * 64 + row(i); }
  __device__ int sample(int i) const { return first_sample + (tile_row(i) & (p.tile.batch - 1)); }
  __device__ __forceinline__ void look_up(int i, Octet& to) const {
    const int pixel = tile_row(i) >> p.batch_log;
    if (i < rows() * octets() && pixel < p.tile.rows * p.tile.columns)
      to.find(p, window, pixel, octet(i), first_column);
  }

  // Address in y, or null outside the map or the batch.
  __device__ T* place(int i) const {
    const Shape& s = p.shape;
    const int pixel = tile_row(i) >> p.batch_log, line = p.by_tile_columns.quotient(pixel);
    const int h = tile_y * p.windows.step_h + line, w = tile_x * p.windows.step_w + pixel - line * p.tile.columns;
    if (line >= p.tile.rows || h >= s.Ho || w >= s.Wo || sample(i) >= s.B) return nullptr;
    return (T*)p.y + ((int64_t)(sample(i) * s.Ho + h) * s.Wo + w) * (s.K * s.F) + octet(i) * 8;
  }

  __device__ __forceinline__ void store_samples(uint32_t stage, int i, T* to) const {
    const int group = row(i) / 8, samples = p.shape.B - sample(i);
    const int64_t next_sample = (int64_t)p.shape.Ho * p.shape.Wo * p.shape.K * p.shape.F;
    const uint32_t inside = ahead.inside(width);
    if (!inside && first_column > 0) return;
    const bool fill = inside != 0xff && first_column > 0;
    uint32_t turned[8][4];
#pragma unroll
    for (int q = 0; q < 8; q += 2) {
      uint32_t even[4], odd[4];
      read_piece(stage, group, q, even);
      read_piece(stage, group, q + 1, odd);
#pragma unroll
      for (int b = 0; b < 4; b++) {
        turned[2 * b][q / 2] = __byte_perm(even[b], odd[b], 0x5410);
        turned[2 * b + 1][q / 2] = __byte_perm(even[b], odd[b], 0x7632);
      }
    }
    if (inside != 0xff) {
#pragma unroll
      for (int from = 0; from < 8; from += 4) {
        uint4 old[4] = {};
#pragma unroll
        for (int b = 0; b < 4; b++)
          if (fill && from + b < samples) old[b] = *(const uint4*)(to + (from + b) * next_sample);
#pragma unroll
        for (int b = 0; b < 4; b++) choose(turned[from + b], old[b], inside);
      }
    }
#pragma unroll
    for (int b = 0; b < 8; b++, to += next_sample)
      if (b < samples) *(uint4*)to = {turned[b][0], turned[b][1], turned[b][2], turned[b][3]};
  }

  __device__ __forceinline__ void read_piece(uint32_t stage, int group, int q, uint32_t (&to)[4]) const {
    const bool here = (unsigned)ahead.columns[q] < (unsigned)width;
    asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(piece(stage, here ? ahead.columns[q] : 0, group)));
  }

  __device__ __forceinline__ void store_row(uint32_t stage, int i, T* to) const {
    const uint32_t inside = ahead.inside(width);
    if (!inside && first_column > 0) return;
    uint4 old = {};
    if (inside != 0xff && first_column > 0) old = *(const uint4*)to;
    uint32_t words[4] = {};
#pragma unroll
    for (int q = 0; q < 8; q++) {
      uint16_t value;
      const uint32_t from = piece(stage, inside >> q & 1 ? ahead.columns[q] : 0, row(i) / 8) + row(i) % 8 * 2;
      asm volatile("ld.shared.u16 %0, [%1];" : "=h"(value) : "r"(from));
      words[q / 2] |= (uint32_t)value << 16 * (q & 1);
    }
    if (inside != 0xff) choose(words, old, inside);
    *(uint4*)to = {words[0], words[1], words[2], words[3]};
  }

  // Channels outside this block of columns: as earlier blocks left them.
  static __device__ __forceinline__ void choose(uint32_t (&words)[4], const uint4& old, uint32_t inside) {
    const uint32_t before[4] = {old.x, old.y, old.z, old.w};
#pragma unroll
    for (int q = 0; q < 4; q++) {
      const uint32_t mask = (inside >> 2 * q & 1 ? 0xffffu : 0u) | (inside >> 2 * q & 2 ? 0xffff0000u : 0u);
      words[q] = (words[q] & mask) | (before[q] & ~mask);
    }
  }
};

}  // namespace smoe::forward
