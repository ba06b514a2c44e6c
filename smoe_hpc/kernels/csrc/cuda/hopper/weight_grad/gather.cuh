// How g reaches the consumers with at least 8 samples a step and at most 128 channels of g: nothing is spread.
//
// The 8 rows of each channel (8 samples of one pixel) are made neighbours where they lie, and for each pixel and column of the
// pair it is noted which channel has it, if any. The consumers then load the columns' rows through these notes: a lane of
// ldmatrix may take its 16 bytes from anywhere. So a stage serves any columns, nothing is zeroed, and stores do not collide.
//
//   raw ring: after the copies [2 parts][8 groups of 8 rows][64 channels][8 rows], the slots, the notes
//   notes:    [2 columns of pixels][128 columns of the pair][4 groups of 8 rows, in the order 0 2 1 3], a byte each
#pragma once
#include "spread.cuh"

namespace smoe::weight_grad {

constexpr int NOTES = PAIR * 4, NOTES_AT = RAW_STAGE, GATHER_STAGE = NOTES_AT + 2 * NOTES;
constexpr uint32_t NO_CHANNEL = 0x80;

__device__ __forceinline__ void store_byte(uint32_t to, uint32_t a) {
  asm volatile("st.shared.u8 [%0], %1;" ::"r"(to), "r"(a) : "memory");
}

// Notes which channel of a pixel has which column. A lane sees to the same channels of every pixel: 4 neighbouring ones, whose
// slots it loads at once, if each expert has one filter, else every 32nd.
template <bool ONE_FILTER, int GROUPS_LOG>
class ChannelNotes {
 public:
  __device__ __forceinline__ ChannelNotes(const Task& t, int lane) : lane_(lane), filters_(t.shape.F) {
    const int channels = t.shape.K * t.shape.F;
    if constexpr (ONE_FILTER) {
      some_ = lane * 4 < channels;  // K is a multiple of 8
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int channel = lane + i * 32, number = divide_by_filters(t, channel);
        slots_[i] = channel < channels ? number * 2 : 0;
        filter_[i] = channel < channels ? channel - number * t.shape.F : PAIR << 16;
      }
    }
  }

  // `slots` are the pixel's; `notes` the place of its first group, of which it has 2^GROUPS_LOG.
  __device__ __forceinline__ void write(int first_column, uint32_t slots, uint32_t notes) const {
    uint32_t places[4];
    if (ONE_FILTER) {
      uint32_t pairs[2];
      asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(pairs[0]), "=r"(pairs[1]) : "r"(slots + lane_ * 8) : "memory");
#pragma unroll
      for (int i = 0; i < 4; i++) places[i] = some_ ? (pairs[i / 2] >> i % 2 * 16 & 0xffff) - first_column : PAIR;
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++) places[i] = load_2_bytes(slots + slots_[i]) * filters_ + filter_[i] - first_column;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (places[i] >= PAIR) continue;
      const uint32_t to = notes + places[i] * 4, channel = ONE_FILTER ? lane_ * 4 + i : lane_ + i * 32;
      if (GROUPS_LOG == 2) {
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(channel * 0x01010101) : "memory");
      } else {
        store_byte(to, channel);
        if (GROUPS_LOG == 1) store_byte(to + 2, channel);
      }
    }
  }

 private:
  const int lane_, filters_;
  bool some_;  // of the lane's channels exist
  uint32_t slots_[4];  // where the channels' slots lie
  int filter_[4];      // of the expert; far beyond all columns for a channel that does not exist
};

// A warp that makes one of the two columns of pixels of each step ready.
template <bool ONE_FILTER, int GROUPS_LOG>
__device__ __forceinline__ void prepare(const Task& t, Shared& shared, uint32_t base, int number, int lane) {
  // What would otherwise be worked out anew, slowly, in every step.
  asm volatile("" : "+r"(lane), "+r"(number));
  const ChannelNotes<ONE_FILTER, GROUPS_LOG> channel_notes(t, lane);
  const uint32_t rows = number * COLUMN * 128, load_at = rows + raw_place(lane % 8, lane / 8 * 8), store_at = rows + lane * 16;
  Place raw;
  for (;;) {
    barrier_wait(at(shared.raw_full, raw.stage), raw.parity);
    const Step& step = shared.steps[raw.stage];
    const int first_column = step.first_column, pixel_rows = step.rows[number];
    if (step.word & END) break;
    const uint32_t stage = base + t.raw_at + raw.stage * GATHER_STAGE;
    const uint32_t notes = stage + NOTES_AT + number * NOTES, slots = stage + RAW_BYTES + number * t.slot_pitch;
    const uint32_t none = NO_CHANNEL * 0x01010101;
    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(notes + lane * 16), "r"(none) : "memory");
    __syncwarp();
#pragma unroll
    for (int row = 0; row < 4 >> GROUPS_LOG; row++)
      if (row < pixel_rows)
        channel_notes.write(first_column, slots + row * 2 * t.slot_pitch,
                            notes + (GROUPS_LOG == 0 ? row % 2 * 2 + row / 2 : row));
    // A unit is 8 rows of 64 channels. The next one is on its way while one is stored.
    const uint32_t from[2] = {stage + load_at, stage + (load_at ^ 64)}, to = stage + store_at;
    uint32_t r[2][2][4];
#pragma unroll
    for (int i = 0; i < 2; i++) load_matrices_transposed(r[0][i], from[i]);
#pragma unroll
    for (int unit = 0; unit < 8; unit++) {
      if (unit < 7)
#pragma unroll
        for (int i = 0; i < 2; i++)
          load_matrices_transposed(r[(unit + 1) % 2][i], from[i] + (unit + 1) / 2 * 1024 + (unit + 1) % 2 * RAW_HALF);
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 2; i++) store_matrices(to + unit / 2 * 1024 + unit % 2 * RAW_HALF + i * 512, r[unit % 2][i]);
    }
    fence_for_matrix_unit();  // the next copies overwrite what was stored
    __syncwarp();
    if (lane == 0) barrier_arrive(at(shared.g_full, raw.stage));
    raw.next(t.raw_stages);
  }
  __syncwarp();
  if (lane == 0) barrier_arrive(at(shared.g_full, raw.stage));
}

// Where a consumer's lane finds its 16 bytes of a fragment: 8 rows of a column of its block.
class Gather {
 public:
  __device__ __forceinline__ Gather(const Task& t, const Shared& shared, uint32_t base, int group)
      : rows_(base + t.raw_at + threadIdx.x % 32 / 16 * 1024),
        notes_(base + t.raw_at + NOTES_AT + (group * BLOCK + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 16) * 4 +
               threadIdx.x % 32 / 16 * 2),
        zeros_(shared_address(shared.zeros)) {}

  // The lane's notes of a step, a byte for each 16 rows.
  __device__ __forceinline__ uint32_t notes(int stage) const {
    return load_2_bytes(notes_ + stage * GATHER_STAGE) | load_2_bytes(notes_ + stage * GATHER_STAGE + NOTES) << 16;
  }
  // Of rows 16 k and on.
  __device__ __forceinline__ uint32_t place(uint32_t notes, int stage, int k) const {
    const uint32_t channel = notes >> k * 8 & 0xff;
    const uint32_t place = rows_ + stage * GATHER_STAGE + k * 2048 + (channel % 64) * 16 + channel / 64 * RAW_HALF;
    return channel & NO_CHANNEL ? zeros_ : place;
  }

 private:
  const uint32_t rows_, notes_, zeros_;
};

}  // namespace smoe::weight_grad
