// The K largest of N values at every pixel, ties to the lower number, in one read of the values.
//
// Here: up to 1024 values, all of which a warp holds in registers. Lane by lane they are runs of neighbouring experts, so that
// what is selected is written by number without a sort.
#include "select.cuh"

namespace smoe {
namespace {

constexpr int PIXELS = 8, THREADS = 32 * PIXELS;  // of a CTA
using Place = PlaceAmong<PIXELS>;
constexpr int FEW_VALUES = 64;  // up to which the single best one is looked for by a thread per pixel

// Shared memory of a pixel whose lanes have R values each, the runs one word apart from a multiple of the banks.
template <int R>
struct Tile {
  static constexpr int STRIDE = 32 * (R + 1) + APART;
};

constexpr int blocks_at_once(int R, bool by_rank) { return by_rank ? (R == 32 ? 3 : 4) : R == 32 ? 4 : R == 16 ? 5 : 6; }

template <int R, bool BY_RANK>
__global__ void __launch_bounds__(THREADS, blocks_at_once(R, BY_RANK)) select_kernel(const Selection s) {
  constexpr int STRIDE = Tile<R>::STRIDE;
  extern __shared__ __align__(16) uint32_t tile[];
  const Place at(s);
  wait_for_earlier();
  const float* from = values_of(s, at, at.row);
  const int64_t sweep = (int64_t)ROWS * s.P;
  for (int base = at.row; base < s.N; base += ROWS * SWEEPS, from += SWEEPS * sweep) {
    float value[SWEEPS][VEC];
#pragma unroll
    for (int u = 0; u < SWEEPS; u++)
      if (at.column < at.here && base + u * ROWS < s.N) load_values(value[u], s, at, from + u * sweep);
#pragma unroll
    for (int u = 0; u < SWEEPS; u++) {
      const int expert = base + u * ROWS;
      if (at.column < at.here && expert < s.N)
#pragma unroll
        for (int i = 0; i < VEC; i++) tile[(at.column + i) * STRIDE + expert + expert / R] = key_of(value[u][i]);
    }
  }
  __syncthreads();

  uint32_t* own = tile + at.pixel * STRIDE;
  if (at.pixel < at.here) {
    uint32_t key[R];
#pragma unroll
    for (int r = 0; r < R; r++) key[r] = at.lane * R + r < s.N ? own[at.lane * (R + 1) + r] : 0;
    __syncwarp();  // all have read before any writes
    int kept = s.N;
    const uint32_t least = s.N > s.K ? find_bound(key, s.deviations, s.N, s.K, s.K, &kept) : 1;
    uint16_t* ids = reinterpret_cast<uint16_t*>(tile + PIXELS * STRIDE) + at.pixel * 32 * R;  // there if by rank
    if (kept == s.K) {
      int to = sum_before(count_keys(key, least) - TALLY);
#pragma unroll
      for (int r = 0; r < R; r++)
        if (key[r] >= least) {
          if (BY_RANK) ids[to] = at.lane * R + r;
          own[to++] = BY_RANK ? key[r] : at.lane * R + r;
        }
    } else {  // equal keys: those of the lowest numbers
      uint32_t both = 0;  // how many are larger, and in the upper half how many are equal
#pragma unroll
      for (int r = 0; r < R; r++) both += (key[r] > least) + (key[r] == least) * 0x10000;
      const uint32_t before = sum_before(both), all = __shfl_sync(~0u, before + both, 31);
      const int wanted = min(s.K - (all & 0xffff), all >> 16);  // of those equal
      const int ties_before = before >> 16;
      int ties_left = max(wanted - ties_before, 0), to = (before & 0xffff) + min(ties_before, wanted);
#pragma unroll
      for (int r = 0; r < R; r++) {
        const bool tie = key[r] == least && ties_left > 0;
        if (key[r] > least || tie) {
          if (BY_RANK) ids[to] = at.lane * R + r;
          own[to] = BY_RANK ? key[r] : at.lane * R + r;
          to++;
          ties_left -= tie;
        }
      }
    }
    __syncwarp();
    if (BY_RANK) sort_list<uint64_t>(own, ids, s.K);
  }
  write_selection(s, at, tile, STRIDE);
}

// The single best of few values, a thread a pixel.
__global__ void __launch_bounds__(THREADS) best_kernel(const Selection s, int64_t all) {
  const int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  wait_for_earlier();
  if (at >= all) return;
  const float* values = s.values + at / s.P * s.N * s.P + at % s.P;
  uint32_t best = 0;
  int number = 0;
#pragma unroll 4
  for (int expert = 0; expert < s.N; expert++) {
    const uint32_t key = key_of(__ldg(values + (int64_t)expert * s.P));
    if (key > best) best = key, number = expert;
  }
  s.index[at] = number;
}

template <int R, bool BY_RANK>
int launch_select(const Selection& s, cudaStream_t stream) {
  const int bytes = PIXELS * (Tile<R>::STRIDE * 4 + (BY_RANK ? 32 * R * 2 : 0));
  const cudaError_t status =
      cudaFuncSetAttribute(select_kernel<R, BY_RANK>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  const unsigned blocks = s.choices * ((s.P + PIXELS - 1) / PIXELS);
  return launch_early(select_kernel<R, BY_RANK>, blocks, THREADS, bytes, stream, s);
}

template <bool BY_RANK>
int select_direct(const Selection& s, cudaStream_t stream) {
  if (s.N <= 128) return launch_select<4, BY_RANK>(s, stream);
  if (s.N <= 256) return launch_select<8, BY_RANK>(s, stream);
  if (s.N <= 512) return launch_select<16, BY_RANK>(s, stream);
  return launch_select<32, BY_RANK>(s, stream);
}

}  // namespace
}  // namespace smoe

// Selects K of N at every pixel: values [choices, N, P] float32 to index [choices, P, K]. by_rank: best first, else by number.
// NaN is the largest value. UNSUPPORTED: more than 65535 experts, or more than 16384 best first.
extern "C" int smoe_select(const float* values, int choices, int N, int P, int K, int by_rank, int* index,
                           cudaStream_t stream) {
  using namespace smoe;
  if (N > 65535 || K < 1 || K > N) return UNSUPPORTED;
  const int64_t all = (int64_t)choices * P;
  if ((int64_t)choices * ((P + PIXELS - 1) / PIXELS) > INT32_MAX) return UNSUPPORTED;
  if (all == 0) return 0;
  const int aligned = P % VEC == 0 && reinterpret_cast<uintptr_t>(values) % 16 == 0;
  const int wide = K % 4 == 0 && reinterpret_cast<uintptr_t>(index) % 16 == 0;
  const float deviations = deviations_of(static_cast<double>(K) / N);
  const Selection s{values, index, choices, N, P, K, by_rank, aligned, wide, deviations};
  if (K == 1 && N <= FEW_VALUES)
    return launch_early(best_kernel, static_cast<unsigned>((all + THREADS - 1) / THREADS), THREADS, 0, stream, s, all);
  if (N <= 1024) return by_rank ? select_direct<true>(s, stream) : select_direct<false>(s, stream);
  return K <= 1024 ? select_streaming(s, stream) : select_wide(s, stream);
}
