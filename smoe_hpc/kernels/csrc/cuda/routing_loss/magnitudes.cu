// Quantiles of the rows of a matrix of 16-bit numbers' magnitudes, by one histogram of them all: exact, and one read.
//
// Each row is divided among several blocks, which count in shared memory and store what they counted; then a block for each
// row adds up and selects.
#include <type_traits>
#include "routing_loss.cuh"

namespace smoe {
namespace {

constexpr int MAGNITUDES = 1 << 15;
constexpr int GROUP = 128;  // magnitudes that are stored together, or not at all if there are none
constexpr int GROUPS = MAGNITUDES / GROUP;
constexpr int THREADS = 1024;  // one block on a multiprocessor: 128 KB of shared memory
constexpr int WARPS = THREADS / 32;
constexpr int OWN = GROUPS / WARPS;  // groups of a warp; a byte says which of them it stored
constexpr int WANTED = 4;
static_assert(OWN == 8, "a bit each");

template <typename T>
constexpr unsigned INFINITY_BITS = std::is_same<T, __half>::value ? 0x7c00 : 0x7f80;

template <typename T>
__device__ __forceinline__ unsigned magnitude_bits(T x) {
  unsigned short bits;
  memcpy(&bits, &x, 2);
  return bits & (MAGNITUDES - 1);
}
template <typename T>
__device__ __forceinline__ T from_bits(unsigned bits) {
  const unsigned short word = (unsigned short)bits;
  T x;
  memcpy(&x, &word, 2);
  return x;
}
__device__ __forceinline__ unsigned sum_of(uint4 four) { return four.x + four.y + four.z + four.w; }

// What a block is asked for, and where it leaves it.
struct Selection {
  Quantiles wanted;
  float factor;           // from magnitude to error; a negative one turns the order round
  unsigned last;          // M - 1
  float* quantiles;       // of the row
  long long stride;       // from one quantile to the next
};

// `four(group, lane)` gives four counts of a group, all of it to a warp; `stored(group)` says whether there are any.
template <typename T, typename Stored, typename Four>
__device__ __forceinline__ void select(const Selection& selection, Stored stored, Four four) {
  __shared__ unsigned totals[GROUPS], group_of[WANTED], rank_in[WANTED], found[WANTED];
  __shared__ int not_numbers, infinities, zeros;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int statistics = 2 * selection.wanted.count;
  constexpr int INFINITE = INFINITY_BITS<T> / GROUP;  // the group that infinity is the first of
  if (thread == 0) not_numbers = infinities = zeros = 0;
  __syncthreads();
  for (int group = warp; group < GROUPS; group += WARPS) {
    unsigned total = 0;
    if (stored(group)) {
      const uint4 counts = four(group, lane);
      total = __reduce_add_sync(~0u, sum_of(counts));
      if (lane == 0) {
        if (group == 0) zeros = counts.x != 0;
        if (group == INFINITE) infinities = counts.x != 0;
        if (group > INFINITE || (group == INFINITE && total > counts.x)) not_numbers = 1;
      }
    }
    if (lane == 0) totals[group] = total;
  }
  __syncthreads();
  if (warp == 0) {
    constexpr int EACH = GROUPS / 32;
    unsigned sum = 0;
    for (int g = 0; g < EACH; ++g) sum += totals[lane * EACH + g];
    unsigned before = sum;
    for (int step = 1; step < 32; step *= 2) {
      const unsigned other = __shfl_up_sync(~0u, before, step);
      if (lane >= step) before += other;
    }
    before -= sum;
#pragma unroll
    for (int w = 0; w < WANTED; ++w) {
      const unsigned place = w % 2 ? selection.wanted.above[w / 2] : selection.wanted.below[w / 2];
      const unsigned rank = selection.factor < 0.f ? selection.last - place : place;
      if (w >= statistics || rank < before || rank >= before + sum) continue;
      unsigned reached = before;
      int group = lane * EACH;
      while (rank - reached >= totals[group]) reached += totals[group++];
      group_of[w] = group;
      rank_in[w] = rank - reached;
    }
  }
  __syncthreads();
  if (warp < statistics) {
    const uint4 counts = four((int)group_of[warp], lane);
    const unsigned sum = sum_of(counts), rank = rank_in[warp];
    unsigned before = sum;
    for (int step = 1; step < 32; step *= 2) {
      const unsigned other = __shfl_up_sync(~0u, before, step);
      if (lane >= step) before += other;
    }
    before -= sum;
    if (rank >= before && rank < before + sum) {
      const unsigned rest = rank - before;
      const unsigned within = (rest >= counts.x) + (rest >= counts.x + counts.y) + (rest >= counts.x + counts.y + counts.z);
      found[warp] = group_of[warp] * GROUP + lane * 4 + within;
    }
  }
  __syncthreads();
  if (thread < selection.wanted.count) {
    const float factor = selection.factor;
    const float low = __fmul_rn(as_float(from_bits<T>(found[2 * thread])), factor);
    const float high = __fmul_rn(as_float(from_bits<T>(found[2 * thread + 1])), factor);
    const bool nan = not_numbers || isnan(factor) || (isinf(factor) && zeros) || (factor == 0.f && infinities);
    selection.quantiles[thread * selection.stride] =
        nan ? __int_as_float(0x7fffffff)
            : between(low, high, thread ? selection.wanted.share[1] : selection.wanted.share[0],
                      thread ? selection.wanted.rest[1] : selection.wanted.rest[0]);
  }
}

template <typename T>
__device__ __forceinline__ Selection selection_of(const Rows<T>& rows, const Quantiles& wanted, long long row,
                                                  long long batch, float* quantiles) {
  return {wanted, error_factor(rows.scale, rows.half_numel), (unsigned)rows.size - 1, quantiles + row, batch};
}

// counts [blocks, MAGNITUDES] of which only groups with any are written, stored [blocks, WARPS] a byte for OWN groups. A row
// that is a block's alone is selected from at once.
template <bool PLAIN, typename T, int V>
__global__ void __launch_bounds__(THREADS, 1) count_magnitudes(Rows<T> rows, Quantiles wanted, int parts, uint4* counts,
                                                                unsigned char* stored, float* quantiles) {
  extern __shared__ uint4 memory[];
  unsigned* bins = reinterpret_cast<unsigned*>(memory);
  __shared__ unsigned char any[WARPS];
  const long long row = blockIdx.x / parts;
  const int part = blockIdx.x % parts, thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  for (int i = thread; i < MAGNITUDES / 4; i += THREADS) memory[i] = make_uint4(0, 0, 0, 0);
  let_later_start();
  wait_for_earlier();
  __syncthreads();
  for_each_value<PLAIN, PLAIN ? 4 : 2, T, V>(rows, row, part, parts,
                                             [&](T x, Divisor) { atomicAdd(&bins[magnitude_bits(x)], 1u); });
  __syncthreads();
  unsigned char mask = 0;
#pragma unroll
  for (int g = 0; g < OWN; ++g) {
    const int at = (warp * OWN + g) * (GROUP / 4) + lane;
    const uint4 four = memory[at];
    if (!__any_sync(~0u, four.x | four.y | four.z | four.w)) continue;
    mask |= 1 << g;
    if (parts > 1) counts[(long long)blockIdx.x * (MAGNITUDES / 4) + at] = four;
  }
  if (parts > 1) {
    if (lane == 0) stored[(long long)blockIdx.x * WARPS + warp] = mask;
    return;
  }
  if (lane == 0) any[warp] = mask;
  __syncthreads();
  select<T>(
      selection_of(rows, wanted, row, gridDim.x, quantiles), [&](int group) { return any[group / OWN] >> (group % OWN) & 1; },
      [&](int group, int four) { return memory[group * (GROUP / 4) + four]; });
}

template <typename T>
__global__ void __launch_bounds__(THREADS) select_magnitudes(Rows<T> rows, Quantiles wanted, int parts, const uint4* counts,
                                                             const unsigned char* stored, float* quantiles) {
  extern __shared__ uint4 memory[];
  unsigned char* of_parts = reinterpret_cast<unsigned char*>(memory);  // [parts, WARPS]
  __shared__ unsigned any[WARPS];
  const long long row = blockIdx.x;
  if (threadIdx.x < WARPS) any[threadIdx.x] = 0;
  let_later_start();
  wait_for_earlier();
  __syncthreads();
  for (int i = threadIdx.x; i < parts * WARPS; i += THREADS) {
    const unsigned char mask = stored[row * parts * WARPS + i];
    of_parts[i] = mask;
    if (mask) atomicOr(&any[i % WARPS], (unsigned)mask);
  }
  __syncthreads();
  select<T>(
      selection_of(rows, wanted, row, gridDim.x, quantiles), [&](int group) { return any[group / OWN] >> (group % OWN) & 1; },
      [&](int group, int four) {
        uint4 sum = make_uint4(0, 0, 0, 0);
#pragma unroll 4
        for (int part = 0; part < parts; ++part) {
          if (!(of_parts[part * WARPS + group / OWN] >> (group % OWN) & 1)) continue;
          const uint4 one = counts[(row * parts + part) * (MAGNITUDES / 4) + group * (GROUP / 4) + four];
          sum = make_uint4(sum.x + one.x, sum.y + one.y, sum.z + one.z, sum.w + one.w);
        }
        return sum;
      });
}

template <typename T>
int launch(const void* values, const void* factors, const float* scale, double half_numel, long long size,
           const Quantiles& wanted, int batch, int parts, void* work, float* quantiles, cudaStream_t stream) {
  const Rows<T> rows = {(const T*)values, (const T*)factors, nullptr, scale, (float)half_numel, 1, false, size};
  const bool wide = size % 8 == 0 && aligned(values, 16) && aligned(factors, 16);
  auto kernel = wide ? count_magnitudes<true, T, 8> : count_magnitudes<true, T, 1>;
  if (factors) kernel = wide ? count_magnitudes<false, T, 8> : count_magnitudes<false, T, 1>;
  const unsigned blocks = (unsigned)batch * parts;
  uint4* counts = (uint4*)work;
  unsigned char* stored = (unsigned char*)(counts + (long long)blocks * (MAGNITUDES / 4));
  const int bytes = MAGNITUDES * sizeof(unsigned);
  cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  const int counted = launch_early(kernel, blocks, THREADS, bytes, stream, rows, wanted, parts, counts, stored, quantiles);
  if (counted != cudaSuccess || parts == 1) return counted;
  return launch_early(select_magnitudes<T>, batch, THREADS, parts * WARPS, stream, rows, wanted, parts, counts, stored,
                      quantiles);
}

}  // namespace
}  // namespace smoe

// quantiles [count, B] of the errors |value (times factor)| half_numel / scale of 16-bit rows [B, M]: see smoe_row_quantiles.
// A block needs 128 KB of shared memory and a little.
//   parts   blocks a row is divided among, at most 1024
//   work    B * parts * (32768 * 4 + 32) bytes; none for one part
extern "C" int smoe_row_quantiles_at_once(const void* values, const void* factors, const float* scale, double half_numel,
                                          int type, int batch, long long size, int count, long long below0, double share0,
                                          double rest0, long long below1, double share1, double rest1, int parts, void* work,
                                          float* quantiles, cudaStream_t stream) {
  using namespace smoe;
  if (size < 1 || size >= 1ll << 31 || batch < 1 || parts < 1 || parts > 1024 || (long long)batch * parts >= 1ll << 31)
    return UNSUPPORTED;
  const Quantiles wanted = make_quantiles(size, count, below0, share0, rest0, below1, share1, rest1);
  if (type == BFLOAT16)
    return launch<__nv_bfloat16>(values, factors, scale, half_numel, size, wanted, batch, parts, work, quantiles, stream);
  if (type == FLOAT16)
    return launch<__half>(values, factors, scale, half_numel, size, wanted, batch, parts, work, quantiles, stream);
  return UNSUPPORTED;
}
