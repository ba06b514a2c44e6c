// What the weight gradient's kernel needs to be told, worked out on the host: its task and its maps for bulk copies.
#pragma once
#include <cuda.h>

#include "walk.cuh"

namespace smoe::weight_grad {

struct Maps {
  CUtensorMap x, x_column, g, slots;
};

// Samples of a step: as few rows as possible that do not exist.
inline int choose_batch(int B, int choices, int tile_rows) {
  if (choices > 1) return 1;
  int best = 0;
  int64_t least = 0;
  for (int batch = 32; batch >= 1; batch /= 2) {
    const int rows = min(COLUMN / batch, tile_rows);
    if (tile_rows % rows) continue;
    const int64_t work = (int64_t)((B + batch - 1) / batch) * (tile_rows / rows);
    if (best == 0 || work < least) best = batch, least = work;
  }
  return best;
}

using Sizes = cuuint64_t[4];
using Box = cuuint32_t[4];

// A tensor of 16-bit numbers without gaps as bulk copies see it. Sizes, strides (numbers) and box from the fastest dimension.
inline int make_map(CUtensorMap& map, const void* tensor, int type, const Sizes& sizes, const Sizes& strides, const Box& box,
                    bool swizzled) {
  static decltype(&cuTensorMapEncodeTiled) encode = nullptr;
  if (encode == nullptr) {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    if (error != cudaSuccess) return error;
    if (result != cudaDriverEntryPointSuccess) return UNSUPPORTED;
    encode = reinterpret_cast<decltype(encode)>(found);
  }
  const CUtensorMapDataType types[] = {CU_TENSOR_MAP_DATA_TYPE_UINT16, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                                       CU_TENSOR_MAP_DATA_TYPE_FLOAT16};
  const cuuint64_t bytes[3] = {strides[1] * 2, strides[2] * 2, strides[3] * 2};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const CUtensorMapSwizzle swizzle = swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE;
  const CUresult result = encode(&map, types[type], 4, const_cast<void*>(tensor), sizes, bytes, box, steps,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                 CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? 0 : UNSUPPORTED;
}

// A map [B, H, W, channels] in boxes of columns, rows, samples, channels.
inline int make_pixel_map(CUtensorMap& map, const void* pixels, int B, int H, int W, int channels, int type, const Task& t,
                          int columns, int box_channels) {
  const cuuint64_t pixel = channels, row = pixel * W;
  return make_map(map, pixels, type, {pixel, (cuuint64_t)B, (cuuint64_t)H, (cuuint64_t)W}, {1, row * H, row, pixel},
                  {(cuuint32_t)box_channels, (cuuint32_t)t.batch, (cuuint32_t)(COLUMN / t.batch), (cuuint32_t)columns},
                  box_channels == 64);
}

inline int make_maps(Maps& maps, const void* x, const void* g, int type, Task& t) {
  const Shape& s = t.shape;
  const Windows& w = t.windows;
  int status = make_pixel_map(maps.x, x, s.B, s.Hi, s.Wi, s.C, type, t, 2, 64);
  if (status == 0) status = make_pixel_map(maps.x_column, x, s.B, s.Hi, s.Wi, s.C, type, t, 1, 64);
  if (status == 0) status = make_pixel_map(maps.g, g, s.B, s.Ho, s.Wo, s.K * s.F, type, t, 2, 64);
  t.slot_pitch = 0;
  if (status || t.batch < 8 || s.K % 8) return status;
  // 128 channels are of at most 126 / F + 2 slots, and up to 7 come before the first.
  const int slots = s.F == 1 ? 128 : (126 / s.F + 16) / 8 * 8;
  t.slot_pitch = slots * 2;
  const cuuint64_t column = s.K, row = column * w.columns, region = row * w.rows;
  return make_map(maps.slots, w.slots, FLOAT32,
                  {(cuuint64_t)s.K, (cuuint64_t)w.columns, (cuuint64_t)w.rows, (cuuint64_t)t.choices * w.tiles_y * w.tiles_x},
                  {1, column, row, region}, {(cuuint32_t)slots, 2, (cuuint32_t)t.strip_rows, 1}, false);
}

inline bool supported(const Shape& s, const Windows& w, const Tile& tile, int choices, int type, const void* x, const void* g,
                      const void* dw) {
  if ((type != BFLOAT16 && type != FLOAT16) || (s.ksize != 1 && s.ksize != 3) || s.C % 8 || s.K * s.F % 8) return false;
  if (((uintptr_t)x | (uintptr_t)g | (uintptr_t)dw) % 16 || w.masks == nullptr || w.first) return false;
  if (w.cap > 65000 || s.K * s.F > 65535) return false;
  if (w.rows % tile.rows || w.columns % tile.columns || tile.columns % 2) return false;
  const int64_t regions = (int64_t)choices * w.tiles_y * w.tiles_x;
  const int64_t items = regions * ((int64_t)w.cap * s.F / PAIR + 1) * s.ksize * (s.C / 64 + 1);
  return (w.rows / tile.rows) * (w.columns / tile.columns) <= 16 && regions * w.rows * w.columns < 1 << 30 && items < 1 << 30;
}

inline Task make_task(const Shape& s, const Windows& w, const Tile& tile, int choices) {
  Task t = {};
  t.shape = s;
  t.windows = w;
  t.choices = choices;
  t.batch = choose_batch(s.B, choices, tile.rows);
  t.chunks = choices > 1 ? 1 : (s.B + t.batch - 1) / t.batch;
  t.strip_rows = min(COLUMN / t.batch, tile.rows);
  t.strips_per_sub = tile.rows / t.strip_rows;
  t.subs_x = w.columns / tile.columns;
  t.sub_columns = tile.columns;
  t.channel_block = s.C <= 64 ? 64 : 128;
  t.channel_blocks = (s.C + t.channel_block - 1) / t.channel_block;
  while (8 << t.groups_log < t.batch) t.groups_log++;
  t.parts = (s.K * s.F + 127) / 128;
  t.filter_magic = s.F == 1 ? 0 : (uint32_t)(((1ull << 32) + s.F - 1) / s.F);
  return t;
}

}  // namespace smoe::weight_grad
