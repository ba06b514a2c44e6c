// What the kernel of the weight gradient works on, and the way through it, which both of its loading warps go alike.
//
// An item is a region of pixels, a pair of blocks of 64 columns (experts of the region's list, times their filters), a row of
// taps and a block of channels. It is walked in steps of 64 rows: two columns of pixels of a strip `strip_rows` high, times
// `batch` samples. Sub-windows that no column of the pair selects are left out.
#pragma once
#include "common.cuh"

namespace smoe::weight_grad {

constexpr int COLUMN = 32;        // rows of a column of pixels
constexpr int STEP = 2 * COLUMN;  // rows of a step
constexpr int BLOCK = 64;         // columns of a consumer warpgroup
constexpr int PAIR = 2 * BLOCK;

struct Task {
  Shape shape;
  Windows windows;
  float* out;
  const int64_t* first_row;  // of each region in `out`, where each has rows of its own; null: they are added to their experts'
  const int* regions;        // the first region and the one behind the last; null: all
  int* taken;                // items that blocks have taken beyond their first ones
  int taken_before;          // what it counts from
  int choices;
  int batch, chunks, strip_rows;            // samples of a step, chunks of the batch, pixel rows of a strip
  int strips_per_sub, subs_x, sub_columns;  // strips of a sub-window, sub-windows beside each other, their pixel columns
  int channel_block, channel_blocks;
  int slot_pitch;         // bytes of a pixel's slots in shared memory; 0: they are read from the plan
  int parts, groups_log;  // parts of 128 channels of g; 2^groups_log groups of 8 rows are one pixel, if batch is 8 or more
  int x_stages, g_stages, raw_stages, x_at, g_at, raw_at;  // sizes and places of the rings in shared memory
  uint32_t filter_magic;                                   // ceil(2^32 / F)
};

// i / F for i < 2^32 / F.
__device__ __forceinline__ int divide_by_filters(const Task& t, int i) {
  return t.shape.F == 1 ? i : (int)__umulhi(i, t.filter_magic);
}

struct Item {
  int region;  // of all choices; -1: no more items
  int sample;  // of the choice, where each sample has its own
  int first_column, columns;
  int tap_row, first_channel;
  int y, x;        // the region's first pixel
  uint32_t need[2];  // sub-windows that select any column of each block
};

// Finds the items of a block one after the other; one warp does it. Regions have as many items as their lists are long.
class Schedule {
 public:
  __device__ explicit Schedule(const Task& t)
      : group_((t.regions ? t.regions[0] : 0) - 32),
        end_(t.regions ? t.regions[1] : t.choices * t.windows.tiles_y * t.windows.tiles_x) {}

  // The item number `number`; numbers must ascend.
  __device__ Item find(const Task& t, int number, int lane) {
    Item item;
    while (number >= before_ + total_) {
      before_ += total_;
      group_ += 32;
      if (group_ >= end_) {
        item.region = -1;
        return item;
      }
      const int region = group_ + lane;
      columns_ = region < end_ ? t.windows.counts[region] * t.shape.F : 0;
      up_to_ = (columns_ + PAIR - 1) / PAIR * t.shape.ksize * t.channel_blocks;
      for (int d = 1; d < 32; d *= 2) {
        const int left = __shfl_up_sync(~0u, up_to_, d);
        if (lane >= d) up_to_ += left;
      }
      total_ = __shfl_sync(~0u, up_to_, 31);
    }
    const int holder = __popc(__ballot_sync(~0u, up_to_ <= number - before_));
    const int left = __shfl_sync(~0u, up_to_, max(holder - 1, 0));
    int place = number - before_ - (holder ? left : 0);
    item.region = group_ + holder;
    item.columns = __shfl_sync(~0u, columns_, holder);
    item.tap_row = place % t.shape.ksize;
    place /= t.shape.ksize;
    item.first_channel = place % t.channel_blocks * t.channel_block;
    item.first_column = place / t.channel_blocks * PAIR;
    const int windows = t.windows.tiles_y * t.windows.tiles_x, window = item.region % windows;
    item.sample = item.region / windows;
    item.y = window / t.windows.tiles_x * t.windows.step_h;
    item.x = window % t.windows.tiles_x * t.windows.step_w;
    const uint16_t* masks = t.windows.masks + (int64_t)item.region * t.windows.cap;
    for (int block = 0; block < 2; block++) {
      const int first = item.first_column + block * BLOCK, last = min(first + BLOCK, item.columns) - 1;
      uint32_t need = 0;
      if (first <= last)
        for (int slot = divide_by_filters(t, first) + lane; slot <= divide_by_filters(t, last); slot += 32) need |= masks[slot];
      item.need[block] = __reduce_or_sync(~0u, need);
    }
    return item;
  }

 private:
  int group_;                    // the first of the 32 regions at hand, one a lane
  const int end_;                // behind the last region
  int before_ = 0, total_ = 0;   // items of the regions before those at hand, of those at hand
  int columns_ = 0, up_to_ = 0;  // of the lane's region: columns, items up to and with it
};

// The steps of an item: strip by strip, a chunk of samples at a time, in runs of neighbouring columns of pixels.
class Runs {
 public:
  int y, chunk = 0, column = 0, stop = 0;  // first pixel row, samples, pixel columns within the region
  int bit = 0;                             // of masks, of the first column's sub-window

  __device__ Runs(const Task& t, const Item& item)
      : y(item.y), need_(item.need[0] | item.need[1]),
        strips_left_((min(t.windows.rows, t.shape.Ho - item.y) + t.strip_rows - 1) / t.strip_rows),
        width_(min(t.windows.columns, t.shape.Wo - item.x)), in_sub_(t.strips_per_sub) {}

  // To the next run; false behind the last.
  __device__ bool next(const Task& t) {
    for (;;) {
      const uint32_t bits = (need_ & ((1u << t.subs_x) - 1)) >> after_ << after_;
      if (bits) {
        const int sub = __ffs(bits) - 1;
        after_ = sub + __ffs(~(bits >> sub)) - 1;
        column = sub * t.sub_columns;
        stop = min(after_ * t.sub_columns, width_);
        bit = shift_ + sub;
        if (column < stop) return true;
        continue;
      }
      after_ = 0;
      if (++chunk < t.chunks) continue;
      chunk = 0;
      y += t.strip_rows;
      if (--strips_left_ == 0) return false;
      if (--in_sub_ == 0) {
        in_sub_ = t.strips_per_sub;
        need_ >>= t.subs_x;
        shift_ += t.subs_x;
      }
    }
  }

 private:
  uint32_t need_;  // by the sub-windows of this row of them and of those below
  int strips_left_;
  const int width_;
  int in_sub_, shift_ = 0, after_ = 0;  // strips left in the sub-window, its row's first bit, first sub-window behind the run
};

}  // namespace smoe::weight_grad
