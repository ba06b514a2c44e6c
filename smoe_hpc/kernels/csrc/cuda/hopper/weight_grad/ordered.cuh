// Sums of a weight gradient in a fixed order: every region's block is stored apart, then added up expert by expert, region by
// region. So the result does not depend on which block finishes first, nor on how much workspace there is.
//
// Blocks lie close together: region r has count[r] * F rows of taps * C numbers, behind those of the regions before it. As
// many regions as fit are computed and added at a time (a round), so the number of launches is fixed by shapes alone and the
// last of them may find nothing to do.
#pragma once
#include "common.cuh"

namespace smoe::weight_grad {

constexpr int PLACING_THREADS = 1024;

// The workspace of the ordered sums and what lies in it.
struct Ordered {
  int64_t* first_row;   // [regions], in the round's blocks
  int* round_regions;   // [rounds + 1], the first region of each round
  int* taken;           // [regions] of which each round has one: see Task
  uint16_t* place;      // [N, regions], an expert's place in a region's list, or 0xffff
  float* blocks;
  int regions, rounds;
  int64_t rows;  // a round ends with the first region that starts beyond them

  // Whether the workspace is large enough.
  bool lay_out(void* workspace, int64_t bytes, const Shape& s, const Windows& w, int choices) {
    const int64_t row_bytes = (int64_t)s.ksize * s.ksize * s.C * 4, longest = (int64_t)w.cap * s.F;
    regions = choices * w.tiles_y * w.tiles_x;
    const int64_t firsts = (int64_t)regions * 8, begins = ((int64_t)regions + 2) * 4, places = (int64_t)s.N * regions * 2;
    const int64_t head = (firsts + begins + regions * 4 + places + 255) / 256 * 256;
    first_row = static_cast<int64_t*>(workspace);
    round_regions = reinterpret_cast<int*>(first_row + regions);
    taken = round_regions + regions + 2;
    place = reinterpret_cast<uint16_t*>(taken + regions);
    blocks = reinterpret_cast<float*>(static_cast<uint8_t*>(workspace) + head);
    rows = (bytes - head) / row_bytes - longest;
    if (workspace == nullptr || rows < longest) return false;
    rounds = (int)(((int64_t)regions * longest + rows - 1) / rows);
    return true;
  }
};

// Where each region's block lies, and which regions each round has; one block.
__global__ void __launch_bounds__(PLACING_THREADS) place_blocks(const int* counts, int filters, Ordered o) {
  __shared__ int64_t sums[32], total;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t before = 0;
  for (int first = 0; first < o.regions; first += PLACING_THREADS) {
    const int region = first + threadIdx.x;
    const int64_t rows = region < o.regions ? (int64_t)counts[region] * filters : 0;
    int64_t up_to = rows;
    for (int d = 1; d < 32; d *= 2) {
      const int64_t left = __shfl_up_sync(~0u, up_to, d);
      if (lane >= d) up_to += left;
    }
    if (lane == 31) sums[warp] = up_to;
    __syncthreads();
    if (warp == 0) {
      int64_t sum = sums[lane];
      for (int d = 1; d < 32; d *= 2) {
        const int64_t left = __shfl_up_sync(~0u, sum, d);
        if (lane >= d) sum += left;
      }
      if (lane == 31) total = sum;
      sums[lane] = sum;
    }
    __syncthreads();
    const int64_t begin = before + up_to - rows + (warp ? sums[warp - 1] : 0);
    if (region < o.regions) {
      const int round = (int)(begin / o.rows);
      o.first_row[region] = begin - round * o.rows;
      // The region before starts `its rows` earlier: all rounds that begin in between begin with this region.
      const int64_t its_begin = region ? begin - (int64_t)counts[region - 1] * filters : -1;
      for (int r = region ? (int)(its_begin / o.rows) + 1 : 0; r <= round; r++) o.round_regions[r] = region;
      if (region == o.regions - 1)
        for (int r = round + 1; r <= o.rounds; r++) o.round_regions[r] = o.regions;
    }
    before += total;
    __syncthreads();
  }
}

// The place of each listed expert; a block a region. All others are 0xffff already.
__global__ void place_experts(Windows w, Ordered o) {
  const int64_t region = blockIdx.x;
  for (int i = threadIdx.x; i < w.counts[region]; i += blockDim.x)
    o.place[w.ids[region * w.cap + i] * (int64_t)o.regions + region] = i;
}

// Adds the blocks of a round to the gradient: a block an expert, a thread 4 of its numbers, regions ascending.
__global__ void add_blocks(float4* out, int filters, int quads, int round, Ordered o) {
  extern __shared__ int64_t found[];  // rows of the regions of a stretch that list the expert
  __shared__ int per_warp[32];
  const int expert = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int begin = o.round_regions[round], end = o.round_regions[round + 1];
  if (round > 0 && begin == end) return;
  const int64_t length = (int64_t)filters * quads;  // of an expert
  const int64_t mine = (int64_t)blockIdx.y * blockDim.x + threadIdx.x;
  const float4* blocks = reinterpret_cast<const float4*>(o.blocks);
  float4 sum = make_float4(0, 0, 0, 0);
  if (round > 0 && mine < length) sum = out[expert * length + mine];
  for (int first = begin; first < end; first += blockDim.x) {
    const int region = first + threadIdx.x;
    const int place = region < end ? o.place[(int64_t)expert * o.regions + region] : 0xffff;
    const uint32_t which = __ballot_sync(~0u, place != 0xffff);
    if (lane == 0) per_warp[warp] = __popc(which);
    __syncthreads();
    int before = 0, count = 0;
    for (int i = 0; i < blockDim.x / 32; i++) {
      before += i < warp ? per_warp[i] : 0;
      count += per_warp[i];
    }
    if (place != 0xffff) found[before + __popc(which & ((1u << lane) - 1))] = o.first_row[region] + (int64_t)place * filters;
    __syncthreads();
    if (mine < length) {
#pragma unroll 8
      for (int i = 0; i < count; i++) {
        const float4 more = __ldcs(blocks + found[i] * quads + mine);
        sum.x += more.x;
        sum.y += more.y;
        sum.z += more.z;
        sum.w += more.w;
      }
    }
    __syncthreads();
  }
  if (mine < length) out[expert * length + mine] = sum;
}

}  // namespace smoe::weight_grad
