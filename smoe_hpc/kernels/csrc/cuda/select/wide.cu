// The K largest of N values where K is large: the K-th largest is found digit by digit, from counts of 8 bits of the keys, and
// one more read writes what lies above it, by number. Best first takes a sort of each pixel's selection in shared memory.
#include "select.cuh"

namespace smoe {
namespace {

constexpr int PIXELS = 8, THREADS = 32 * PIXELS;  // of a CTA
constexpr int BINS = 256;
constexpr int MOST_SORTED = 16384;  // selections of a pixel whose sort fits into shared memory

__global__ void __launch_bounds__(THREADS) select_wide_kernel(const Selection s) {
  extern __shared__ __align__(16) uint64_t sorted[];
  __shared__ int tally[PIXELS * BINS];
  __shared__ uint32_t prefixes[PIXELS];
  const int groups = (s.P + PIXELS - 1) / PIXELS;
  const int choice = blockIdx.x / groups, first = blockIdx.x % groups * PIXELS;
  const int here = min(PIXELS, s.P - first);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, column = threadIdx.x % PIXELS;
  const float* values = s.values + (int64_t)choice * s.N * s.P + first;
  int* index = s.index + ((int64_t)choice * s.P + first) * s.K;

  wait_for_earlier();
  uint32_t prefix = 0;  // of the K-th largest key of the pixel `warp`
  int wanted = s.K;     // how many of the keys with this prefix are selected
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < PIXELS * BINS; i += THREADS) tally[i] = 0;
    if (lane == 0) prefixes[warp] = prefix;
    __syncthreads();
    const uint32_t known = shift == 24 ? 0 : ~0u << (shift + 8);
    if (column < here)
      for (int expert = threadIdx.x / PIXELS; expert < s.N; expert += THREADS / PIXELS) {
        const uint32_t key = key_of(__ldg(values + (int64_t)expert * s.P + column));
        if ((key & known) == prefixes[column]) atomicAdd(&tally[column * BINS + (key >> shift & 255)], 1);
      }
    __syncthreads();
    if (warp < here) {  // from the highest bin down, 32 at a time, to the one that holds the K-th
      for (int high = BINS - 1; high > 0; high -= 32) {
        const int count = tally[warp * BINS + high - lane];
        int sum = count;
        for (int step = 1; step < 32; step *= 2) {
          const int other = __shfl_up_sync(~0u, sum, step);
          if (lane >= step) sum += other;
        }
        const uint32_t enough = __ballot_sync(~0u, sum >= wanted);
        if (enough) {
          const int at = __ffs(enough) - 1;
          prefix |= static_cast<uint32_t>(high - at) << shift;
          wanted -= __shfl_sync(~0u, sum - count, at);
          break;
        }
        wanted -= __shfl_sync(~0u, sum, 31);
      }
    }
    __syncthreads();
  }

  if (warp < here) {
    int* to = index + (int64_t)warp * s.K;
    int filled = 0;
    for (int base = 0; base < s.N; base += 32) {
      const int expert = base + lane;
      const uint32_t key = expert < s.N ? key_of(__ldg(values + (int64_t)expert * s.P + warp)) : 0;
      const uint32_t before = (1u << lane) - 1, ties = __ballot_sync(~0u, key == prefix);
      const bool keep = key > prefix || (key == prefix && __popc(ties & before) < wanted);
      const uint32_t others = __ballot_sync(~0u, keep);
      if (keep) to[filled + __popc(others & before)] = expert;
      filled += __popc(others);
      wanted -= min(wanted, __popc(ties));
    }
  }
  __syncthreads();

  if (s.by_rank) {
    int size = 2;
    while (size < s.K) size *= 2;
    for (int pixel = 0; pixel < here; pixel++) {
      int* own = index + (int64_t)pixel * s.K;
      for (int i = threadIdx.x; i < size; i += THREADS)
        sorted[i] = i < s.K ? entry_of<uint64_t>(key_of(__ldg(values + (int64_t)own[i] * s.P + pixel)), own[i]) : 0;
      __syncthreads();
      for (int run = 2; run <= size; run *= 2)
        for (int stride = run / 2; stride > 0; stride /= 2) {
          for (int i = threadIdx.x; i < size / 2; i += THREADS) {
            const int a = i / stride * stride * 2 + i % stride, b = a + stride;
            const uint64_t x = sorted[a], y = sorted[b];
            if ((x < y) == ((a & run) == 0)) sorted[a] = y, sorted[b] = x;
          }
          __syncthreads();
        }
      for (int i = threadIdx.x; i < s.K; i += THREADS) own[i] = number_of(sorted[i]);
      __syncthreads();
    }
  }
}

}  // namespace

int select_wide(const Selection& s, cudaStream_t stream) {
  int bytes = 0;
  if (s.by_rank) {
    if (s.K > MOST_SORTED) return UNSUPPORTED;
    bytes = 16;
    while (bytes < s.K * 8) bytes *= 2;
  }
  const cudaError_t status = cudaFuncSetAttribute(select_wide_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  const unsigned blocks = s.choices * ((s.P + PIXELS - 1) / PIXELS);
  return launch_early(select_wide_kernel, blocks, THREADS, bytes, stream, s);
}

}  // namespace smoe
