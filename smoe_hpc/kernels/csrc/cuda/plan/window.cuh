// One window of a plan, by a team of threads.
#pragma once
#include "early_launch.cuh"
#include "walk.cuh"

namespace smoe {
namespace {

enum Kind { FORWARD, INPUT_GRAD, WEIGHT_GRAD };

struct Family {
  int* counts;
  int* ids;
  uint16_t* masks;
  uint16_t* slots;
  int tiles_y, tiles_x, step_h, step_w, first, rows, columns, cap, bits;
  Divider by_tiles, by_tiles_x, by_columns;
  int windows, blocks, team;
  // Places in the team's shared memory, which begins with a number for each expert; 0 for what is not there.
  int centre_table_at, list_at, second_list_at, tally_at, pixels_at, staged_at, team_bytes;
};

struct PlanTask {
  Family family[3];
  const int* index;
  Shape shape;  // of a convolution; B and C are not used
  Divider by_sub_rows, by_sub_columns, by_groups;  // groups of a pixel's selections that are loaded at once
  int choices, subs_across;
  int together;  // the forward's windows are made with the input gradient's, in whose middles they lie
};

// The taps of a row (or column) of the kernel that lead from one of `inside` input pixels to window pixel `at`, a bit each.
__device__ __forceinline__ uint32_t taps_reaching(int at, int inside, int reach) {
  const int first = max(reach - at, 0), last = min(reach - at + inside - 1, reach);
  return last < first ? 0 : (2u << last) - (1u << first);
}

// The sub-windows that window pixel (u, v) lies in, a bit each; 0: nobody reads it.
template <int KIND>
__device__ __forceinline__ uint32_t bits_of_pixel(const Family& f, const PlanTask& task, int ty, int tx, int u, int v) {
  if (KIND == FORWARD) return 1;
  if (KIND == WEIGHT_GRAD) return 1u << (task.by_sub_rows(u) * task.subs_across + task.by_sub_columns(v));
  const int size = task.shape.ksize;
  const uint32_t down = taps_reaching(u, min(f.step_h, task.shape.Hi - ty * f.step_h), size - 1);
  const uint32_t across = taps_reaching(v, min(f.step_w, task.shape.Wi - tx * f.step_w), size - 1);
  if (f.bits == 0) return down && across ? 0xffff : 0;
  uint32_t mask = 0;
  for (int i = 0; i < size; i++) mask |= (down >> i & 1) * across << (i * size);
  return mask;
}

// Number of the output pixel at place (u, v) of the window, or -1 outside the map.
template <int KIND>
__device__ __forceinline__ int pixel_at(const Family& f, const Shape& s, int ty, int tx, int u, int v) {
  const int h = ty * f.step_h + f.first + u;
  int w = tx * f.step_w + f.first + v;
  if (h < 0 || h >= s.Ho) return -1;
  if (w < 0 || w >= s.Wo) {
    if (KIND != INPUT_GRAD || !s.wrap) return -1;
    w = (w % s.Wo + s.Wo) % s.Wo;
  }
  return h * s.Wo + w;
}

template <int T, int VEC, int KIND>
__device__ __forceinline__ void make_window(const PlanTask& task, int window) {
  extern __shared__ __align__(16) char shared[];
  const Family& f = task.family[KIND];
  const Family& forward = task.family[FORWARD];
  const int N = task.shape.N, K = task.shape.K, thread = Team<T>::thread();
  const int tiles = f.tiles_y * f.tiles_x, pixels = f.rows * f.columns, halo = (task.shape.ksize - 1) / 2;
  const int choice = f.by_tiles(window), tile = window - choice * tiles, ty = f.by_tiles_x(tile), tx = tile - ty * f.tiles_x;
  const int* index = task.index + (int64_t)choice * task.shape.Ho * task.shape.Wo * K;
  const bool together = KIND == INPUT_GRAD && task.together, sorted = KIND != FORWARD && f.bits;

  char* memory = shared + Team<T>::number() * f.team_bytes;
  uint16_t* table = reinterpret_cast<uint16_t*>(memory);  // mask of each expert, later its place in the list; N: none
  uint16_t* centre_table = reinterpret_cast<uint16_t*>(memory + f.centre_table_at);  // place in the forward's list
  Tally<T>& tally = *reinterpret_cast<Tally<T>*>(memory + f.tally_at);
  PixelOfWindow* of_pixels = reinterpret_cast<PixelOfWindow*>(memory + f.pixels_at);
  uint16_t* staged = f.staged_at ? reinterpret_cast<uint16_t*>(memory + f.staged_at) : nullptr;

  for (int i = thread; i < (N + 8) / 8; i += T) reinterpret_cast<uint4*>(table)[i] = make_uint4(0, 0, 0, 0);
  if (sorted) clear_counts<T>(tally);
  for (int i = thread; i < pixels; i += T) {
    const int u = f.by_columns(i), v = i - u * f.columns;
    const uint32_t bits = bits_of_pixel<KIND>(f, task, ty, tx, u, v);
    const int r = u - halo, c = v - halo;
    const bool centre = together && r >= 0 && r < f.step_h && c >= 0 && c < f.step_w;
    of_pixels[i] = {bits ? pixel_at<KIND>(f, task.shape, ty, tx, u, v) : -1, static_cast<uint16_t>(bits),
                    static_cast<uint16_t>(centre ? r * f.step_w + c : LEFT_OUT)};
  }
  wait_for_earlier();
  Team<T>::sync();

  for (Walk<T, VEC> walk(K, task.by_groups); walk.pixel < pixels;) {
    Selections<T, VEC> s;
    s.follow(walk, pixels);
    s.load(of_pixels, index, N, K);
    uint32_t marked[AT_ONCE][VEC];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      if (staged && s.entries[i] >= 0) store_places<VEC>(staged + s.entries[i], s.experts[i]);
#pragma unroll
      for (int v = 0; v < VEC; v++)
        if constexpr (KIND == FORWARD)
          table[s.experts[i][v]] = 1;
        else
          marked[i][v] = table[s.experts[i][v]];
    }
#pragma unroll
    for (int i = 0; KIND != FORWARD && i < AT_ONCE; i++) {
      const uint32_t bits = s.entries[i] >= 0 ? of_pixels[s.pixels[i]].bits : 0;
#pragma unroll
      for (int v = 0; v < VEC; v++) {
        const int expert = s.experts[i][v];
        if (expert < N && (marked[i][v] & bits) != bits)
          atomicOr(reinterpret_cast<uint32_t*>(table) + expert / 2, bits << (expert % 2 * 16));
      }
    }
  }
  Team<T>::sync();

  int* ids = f.ids + (int64_t)window * f.cap;
  uint16_t* masks = KIND != FORWARD && f.masks ? f.masks + (int64_t)window * f.cap : nullptr;
  uint16_t* slots = f.slots + (int64_t)window * pixels * K;
  const auto any = [](uint32_t mask) { return mask != 0; };
  const auto settle = [&](int place, int expert, uint32_t mask) {
    ids[place] = expert;
    if (masks) masks[place] = mask;
    table[expert] = place;
  };
  const int centre_tap = halo * (task.shape.ksize + 1);  // which reads the pixel itself
  int* centre_ids = forward.ids + (int64_t)window * forward.cap;
  if (together) {
    const auto there = [&](uint32_t mask) { return (mask >> centre_tap & 1) != 0; };
    const int count = list_marked<T>(table, N, tally, there, [&](int place, int expert, uint32_t) {
      centre_ids[place] = expert;
      centre_table[expert] = place;
    });
    if (thread == 0) forward.counts[window] = count, centre_table[N] = LEFT_OUT;
    for (int i = count + thread; i < forward.cap; i += T) centre_ids[i] = 0;
    Team<T>::sync();
  }
  int count;
  if (!sorted) {
    count = list_marked<T>(table, N, tally, any, settle);
  } else {
    uint16_t* list = f.list_at ? reinterpret_cast<uint16_t*>(memory + f.list_at) : slots;  // which are written last
    count = list_marked<T>(table, N, tally, any, [&](int place, int expert, uint32_t) { list[place] = expert; });
    Team<T>::sync();
    if (KIND == INPUT_GRAD) {
      sort_pass<T>(table, tally, list, count, [](uint32_t mask) { return ORDERS.tap_mask[mask]; }, settle);
    } else if (f.bits <= SHORT_MASK) {
      sort_pass<T>(table, tally, list, count, [](uint32_t mask) { return gray_rank(mask); }, settle);
    } else {
      uint16_t* second = f.second_list_at ? reinterpret_cast<uint16_t*>(memory + f.second_list_at) : slots;
      sort_pass<T>(table, tally, list, count, [](uint32_t mask) { return gray_rank(mask) & 255; },
                   [&](int place, int expert, uint32_t) { second[place] = expert; });
      clear_counts<T>(tally);
      Team<T>::sync();
      sort_pass<T>(table, tally, second, count, [](uint32_t mask) { return gray_rank(mask) >> 8; }, settle);
    }
  }
  if (thread == 0) f.counts[window] = count, table[N] = LEFT_OUT;
  for (int i = count + thread; i < f.cap; i += T) {
    ids[i] = 0;
    if (masks) masks[i] = 0;
  }
  Team<T>::sync();

  for (Walk<T, VEC> walk(K, task.by_groups); walk.pixel < pixels;) {
    Selections<T, VEC> s;
    s.follow(walk, pixels);
    if (staged)
      s.load(staged);
    else
      s.load(of_pixels, index, N, K);
    int places[AT_ONCE][VEC];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++)
#pragma unroll
      for (int v = 0; v < VEC; v++) places[i][v] = table[s.experts[i][v]];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++)
      if (s.entries[i] >= 0) store_places<VEC>(slots + s.entries[i], places[i]);
    if (!together) continue;
    uint16_t* centre_slots = forward.slots + (int64_t)window * f.step_h * f.step_w * K;
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      const uint32_t centre = s.entries[i] >= 0 ? of_pixels[s.pixels[i]].centre : LEFT_OUT;
      if (centre == LEFT_OUT) continue;
#pragma unroll
      for (int v = 0; v < VEC; v++)
        places[i][v] = of_pixels[s.pixels[i]].bits >> centre_tap & 1 ? centre_table[s.experts[i][v]] : LEFT_OUT;
      store_places<VEC>(centre_slots + (int64_t)centre * K + s.groups[i] * VEC, places[i]);
    }
  }
}

}  // namespace
}  // namespace smoe
