// How a weight gradient is cut up into CTAs, and what adding up in one order needs.
#pragma once
#include "few.cuh"

namespace smoe::portable {

constexpr int MOST_TAPS = 3;  // that a CTA sums at a time

// How the work of a shape is cut up, and the workspace that the ordered additions need.
struct Cut {
  int64_t windows;
  int chunks, chunks_per_group, groups, shares, tap_groups, channel_blocks, parts, words;
  int64_t head, bytes;  // of the workspace: what must be zero at the start; all
  int64_t few;          // of the workspace of the form for few channels; 0: not for this shape

  Cut(const Shape& s, const Windows& v, const Tile& tile, int choices, int type, int processors, bool ordered) {
    const int depth = type == FLOAT32 ? 32 : 64;
    const int64_t rows = (int64_t)s.N * s.F, size = rows * s.ksize * s.ksize * s.C * 4;
    windows = (int64_t)choices * v.tiles_y * v.tiles_x;
    chunks = choices > 1 ? 1 : (s.B + tile.batch - 1) / tile.batch;
    tap_groups = (s.ksize + MOST_TAPS - 1) / MOST_TAPS, channel_blocks = (s.C + depth - 1) / depth;
    const int64_t columns = (int64_t)v.cap * s.F, all_blocks = (columns + MOST_COLUMNS - 1) / MOST_COLUMNS;
    const int64_t likely = (6 * (int64_t)s.K * s.F + MOST_COLUMNS - 1) / MOST_COLUMNS;  // more than a region's blocks
    shares = static_cast<int>(all_blocks < likely ? all_blocks : likely < 64 ? likely : 64);
    // Long sums in registers are fewer additions to dw, but no longer than float32 sums well, and enough CTAs are needed.
    const int64_t one = (int64_t)v.rows * v.columns * tile.batch;  // rows of a region and chunk
    const int64_t items = windows * s.ksize * tap_groups * channel_blocks * shares, wanted = 4 * (int64_t)processors;
    int64_t most = (type == FLOAT32 ? 1024 : 4096) / one;
    if (items > 0 && most * wanted > items * chunks) most = items * chunks / wanted;
    chunks_per_group = static_cast<int>(most < 1 ? 1 : most > chunks ? chunks : most);
    groups = chunks > 0 ? (chunks + chunks_per_group - 1) / chunks_per_group : 0;
    few = type == FLOAT32 ? few_weight_grad_bytes(s, v, windows) : 0;
    parts = 0, words = 0, head = 0, bytes = few;
    if (few > 0 || !ordered || size == 0) return;
    int64_t fit = (int64_t(64) << 20) / size;
    fit = fit < 1 ? 1 : fit > 32 ? 32 : fit;
    parts = static_cast<int>(fit > windows ? (windows > 0 ? windows : 1) : fit);
    words = static_cast<int>(((windows + parts - 1) / parts + 31) / 32);
    head = 16 + 4 * parts * (rows * s.ksize * tap_groups * channel_blocks + (int64_t)s.N * words);
    head = (head + 255) / 256 * 256;
    bytes = head + parts * size;
  }
};

__global__ void mark_presence(const int* counts, const int* ids, int cap, int N, int parts, int words, uint32_t* presence) {
  const int window = blockIdx.x, part = window % parts, number = window / parts;
  for (int slot = threadIdx.x; slot < counts[window]; slot += blockDim.x) {
    const int expert = ids[(int64_t)window * cap + slot];
    atomicOr(presence + ((int64_t)part * N + expert) * words + number / 32, 1u << number % 32);
  }
}

// A row of dw is the sum of those parts that have its expert.
__global__ void add_parts(const float* parts_of_dw, const uint32_t* presence, float* dw, int N, int F, int parts, int words,
                          int row_size) {
  __shared__ int has[32];
  const int64_t row = blockIdx.x, all = (int64_t)N * F * row_size;
  if ((int)threadIdx.x < parts) {
    const uint32_t* bits = presence + ((int64_t)threadIdx.x * N + row / F) * words;
    uint32_t any = 0;
    for (int word = 0; word < words; word++) any |= bits[word];
    has[threadIdx.x] = any != 0;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < row_size; i += blockDim.x) {
    float sum = 0.f;
    for (int part = 0; part < parts; part++)
      if (has[part]) sum += __ldcg(parts_of_dw + part * all + row * row_size + i);
    dw[row * row_size + i] = sum;
  }
}

}  // namespace smoe::portable
