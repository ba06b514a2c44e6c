// How the forward kernel stores: of all columns of a row, those that the row's pixel selected, in its order.
//
// Results lie in shared memory column by column, 64 rows of 2 bytes each, so that the samples of a pixel (neighbouring rows)
// move as one: a thread reads 8 samples of 8 columns, turns them round and writes 8 channels of each sample.
#pragma once
#include "forward_ring.cuh"

namespace smoe::forward {

// Division by a number that the host knows, for any dividend that is not negative.
struct Divisor {
  uint32_t by, inverse;
  Divisor() = default;
  explicit Divisor(int number) : by(number), inverse(number <= 1 ? ~0u : (uint32_t)(((uint64_t)1 << 32) / number)) {}
  __device__ __forceinline__ int quotient(uint32_t dividend) const {
    const uint32_t low = __umulhi(dividend, inverse);  // right, or one too small
    return dividend - low * by >= by ? low + 1 : low;
  }
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
  uint4 slots;  // of the experts, 16 bits for each channel

  __device__ __forceinline__ void find(const Task& p, int window, int pixel, int octet) {
    const uint16_t* from = p.windows.slots + ((int64_t)window * (p.tile.rows * p.tile.columns) + pixel) * p.shape.K;
    if (p.shape.F == 1) {
      slots = *(const uint4*)(from + 8 * octet);
    } else {
      int k = p.by_filters.quotient(8 * octet), f = 8 * octet - k * p.shape.F;
      uint32_t slot = from[k], words[4] = {};
#pragma unroll
      for (int q = 0; q < 8; q++) {
        words[q / 2] |= slot << 16 * (q & 1);
        if (++f == p.shape.F && q < 7) {
          f = 0;
          slot = from[++k];
        }
      }
      slots = {words[0], words[1], words[2], words[3]};
    }
  }
};

// What a warp does with the results of its 16 rows for one block of columns. `prepare` goes long before: what it reads comes
// from far.
template <typename T, bool BY_SAMPLES>
struct Store {
  const Task& p;
  int window, tile_y, tile_x, first_sample, first_column, width;
  Octet ahead;              // of the first round, then of each
  int columns[8];           // of its channels, within the block; outside [0, width) if another block has it
  uint32_t left_out;        // channels of no expert, for the first block to write; a bit each

  __device__ __forceinline__ void prepare() { look_up(threadIdx.x % 32, ahead); }
  __device__ __forceinline__ void run(uint32_t stage) {
    const int rounds = rows() * octets();
    for (int i = threadIdx.x % 32; i < rounds; i += 32) {
      if (i >= 32) look_up(i, ahead);
      T* to = place(i);
      if (!to) continue;
      find_columns(i);
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
  __device__ int row(int i) const { return threadIdx.x / 32 % 4 * 16 + p.by_octets.quotient(i) * (16 / rows()); }  // of the warpgroup's 64
  __device__ int tile_row(int i) const { return threadIdx.x / 128 * 64 + row(i); }
  __device__ int sample(int i) const { return first_sample + (tile_row(i) & (p.tile.batch - 1)); }
  __device__ __forceinline__ void look_up(int i, Octet& octet) const {
    const int pixel = tile_row(i) >> p.batch_log;
    if (i < rows() * octets() && pixel < p.tile.rows * p.tile.columns)
      octet.find(p, window, pixel, i - p.by_octets.quotient(i) * octets());
  }

  __device__ __forceinline__ void find_columns(int i) {
    const uint32_t words[4] = {ahead.slots.x, ahead.slots.y, ahead.slots.z, ahead.slots.w};
    const int filters = p.shape.F, channel = (i - p.by_octets.quotient(i) * octets()) * 8;
    int f = filters == 1 ? 0 : channel - p.by_filters.quotient(channel) * filters;
    left_out = 0;
#pragma unroll
    for (int q = 0; q < 8; q++) {
      const int slot = words[q / 2] >> 16 * (q & 1) & 0xffff;
      columns[q] = slot == LEFT_OUT ? -1 : slot * filters + f - first_column;
      if (slot == LEFT_OUT && first_column == 0) left_out |= 1 << q;
      if (++f == filters) f = 0;
    }
  }

  // Address in y, or null outside the map or the batch.
  __device__ T* place(int i) const {
    const Shape& s = p.shape;
    const int pixel = tile_row(i) >> p.batch_log, line = p.by_tile_columns.quotient(pixel);
    const int h = tile_y * p.windows.step_h + line, w = tile_x * p.windows.step_w + pixel - line * p.tile.columns;
    if (line >= p.tile.rows || h >= s.Ho || w >= s.Wo || sample(i) >= s.B) return nullptr;
    return (T*)p.y + ((int64_t)(sample(i) * s.Ho + h) * s.Wo + w) * (s.K * s.F) + (i - p.by_octets.quotient(i) * octets()) * 8;
  }

  __device__ __forceinline__ void store_samples(uint32_t stage, int i, T* to) const {
    const int group = row(i) / 8, samples = p.shape.B - sample(i);
    const int64_t next_sample = (int64_t)p.shape.Ho * p.shape.Wo * p.shape.K * p.shape.F;
    uint32_t inside = 0, turned[8][4];
#pragma unroll
    for (int q = 0; q < 8; q += 2) {
      uint32_t even[4], odd[4];
      read_piece(stage, group, q, inside, even);
      read_piece(stage, group, q + 1, inside, odd);
#pragma unroll
      for (int b = 0; b < 4; b++) {
        turned[2 * b][q / 2] = __byte_perm(even[b], odd[b], 0x5410);
        turned[2 * b + 1][q / 2] = __byte_perm(even[b], odd[b], 0x7632);
      }
    }
#pragma unroll
    for (int b = 0; b < 8; b++, to += next_sample)
      if (b < samples) write_octet(to, turned[b], inside);
  }

  __device__ __forceinline__ void read_piece(uint32_t stage, int group, int q, uint32_t& inside, uint32_t (&to)[4]) const {
    const bool here = (unsigned)columns[q] < (unsigned)width;
    inside |= (uint32_t)here << q;
    asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(piece(stage, here ? columns[q] : 0, group)));
  }

  __device__ __forceinline__ void store_row(uint32_t stage, int i, T* to) const {
    uint32_t inside = 0, words[4] = {};
#pragma unroll
    for (int q = 0; q < 8; q++) {
      const bool here = (unsigned)columns[q] < (unsigned)width;
      inside |= (uint32_t)here << q;
      uint16_t value;
      const uint32_t from = piece(stage, here ? columns[q] : 0, row(i) / 8) + row(i) % 8 * 2;
      asm volatile("ld.shared.u16 %0, [%1];" : "=h"(value) : "r"(from));
      words[q / 2] |= (uint32_t)value << 16 * (q & 1);
    }
    write_octet(to, words, inside);
  }

  __device__ __forceinline__ void write_octet(T* to, const uint32_t (&words)[4], uint32_t inside) const {
    if (inside == 0xff) {
      *(uint4*)to = {words[0], words[1], words[2], words[3]};
    } else if (inside | left_out) {
#pragma unroll
      for (int q = 0; q < 8; q++)
        if ((inside | left_out) >> q & 1) ((uint16_t*)to)[q] = inside >> q & 1 ? words[q / 2] >> 16 * (q & 1) : 0;
    }
  }
};

}  // namespace smoe::forward
