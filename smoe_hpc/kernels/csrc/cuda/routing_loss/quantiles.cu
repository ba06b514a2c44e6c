// Quantiles of the rows of a matrix by histograms of their numbers' bits: exact order statistics, no sorting.
//
// Numbers are ordered by their 32 bits in three reads of 11, 11 and 10. Each row is divided among several blocks, whose
// histograms are added up in global memory (integers: the same in any order); the last block of a row selects.
#include "routing_loss.cuh"

namespace smoe {
namespace {

constexpr int BINS = 2048;    // of a level
constexpr int WANTED = 4;     // order statistics of a row, at most
constexpr int LEVELS = 3;
constexpr int THREADS = 512;
constexpr int COPIES = 8;     // of the bins of the first level, whose few bins most values share

// What the levels of a row leave to each other, all zero at first.
struct RowWork {
  unsigned counts[LEVELS][WANTED][BINS];
  unsigned prefix[LEVELS][WANTED];  // bits found so far, after each level
  unsigned rank[LEVELS][WANTED];    // place among the values that have these bits
  unsigned arrived[LEVELS];
  unsigned not_numbers;
};

constexpr unsigned NOT_A_NUMBER = ~0u;

// Bits that sort as the numbers do; NaN last.
__device__ __forceinline__ unsigned ordered_bits(float x) {
  if (isnan(x)) return NOT_A_NUMBER;
  const unsigned bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float from_ordered_bits(unsigned bits) {
  return __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}

template <bool PLAIN, typename T, int V, int LEVEL>
__global__ void __launch_bounds__(THREADS, 2)
    count_level(Rows<T> rows, Quantiles wanted, int parts, RowWork* work, float* quantiles) {
  constexpr int DIGIT_BITS = LEVEL < 2 ? 11 : 10, SHIFT = LEVEL == 0 ? 21 : LEVEL == 1 ? 10 : 0;
  extern __shared__ uint4 memory[];
  unsigned* bins = reinterpret_cast<unsigned*>(memory);  // first level [BINS, COPIES], others [order statistics, BINS]
  __shared__ unsigned warps[32], flag;
  __shared__ float found[WANTED];
  const long long row = blockIdx.x / parts;
  const int part = blockIdx.x % parts, batch = gridDim.x / parts, thread = threadIdx.x;
  const int statistics = 2 * wanted.count, all_bins = LEVEL == 0 ? COPIES * BINS : statistics * BINS;
  RowWork& own = work[row];
  for (int i = thread; i < all_bins / 4; i += THREADS) memory[i] = make_uint4(0, 0, 0, 0);
  // Order statistics that agree so far share the bins of the first of them.
  unsigned prefix[WANTED];
  int bins_of[WANTED];
  bool agree = true;
#pragma unroll
  for (int w = 0; w < WANTED; ++w) {
    prefix[w] = LEVEL > 0 && w < statistics ? own.prefix[LEVEL > 0 ? LEVEL - 1 : 0][w] : 0;
    bins_of[w] = w;
#pragma unroll
    for (int v = w - 1; v >= 0; --v)
      if (prefix[v] == prefix[w]) bins_of[w] = v;
    agree = agree && (w >= statistics || bins_of[w] == 0);
  }
  __syncthreads();
  const float factor = error_factor(rows.scale, rows.half_numel);
  const bool ordered_as_they_are = rows.half_numel == 0.f;
  const auto bits_of = [&](T value, Divisor divisor) {
    const float x = as_float(value);
    const float error = ordered_as_they_are ? x : __fmul_rn(fabsf(x), factor);
    return ordered_bits(!PLAIN && rows.divisor ? divisor(error) : error);
  };
  constexpr int AHEAD = PLAIN ? 8 / sizeof(T) : 2;  // what the registers hold
  constexpr unsigned DIGITS = (1u << DIGIT_BITS) - 1;
  if constexpr (LEVEL == 0) {
    bool not_a_number = false;
    const int copy = thread % COPIES;
    for_each_value<PLAIN, AHEAD, T, V>(rows, row, part, parts, [&](T value, Divisor divisor) {
      const unsigned bits = bits_of(value, divisor);
      not_a_number |= bits == NOT_A_NUMBER;
      atomicAdd(&bins[(bits >> SHIFT) * COPIES + copy], 1u);
    });
    if (__syncthreads_or(not_a_number) && thread == 0) atomicOr(&own.not_numbers, 1u);
  } else if (agree) {
    for_each_value<PLAIN, AHEAD, T, V>(rows, row, part, parts, [&](T value, Divisor divisor) {
      const unsigned bits = bits_of(value, divisor);
      if (bits >> (SHIFT + DIGIT_BITS) == prefix[0]) atomicAdd(&bins[(bits >> SHIFT) & DIGITS], 1u);
    });
  } else {
    for_each_value<PLAIN, 1, T, V>(rows, row, part, parts, [&](T value, Divisor divisor) {
      const unsigned bits = bits_of(value, divisor);
#pragma unroll
      for (int w = 0; w < WANTED; ++w)
        if (w < statistics && bins_of[w] == w && bits >> (SHIFT + DIGIT_BITS) == prefix[w])
          atomicAdd(&bins[w * BINS + ((bits >> SHIFT) & DIGITS)], 1u);
    });
  }
  __syncthreads();
  unsigned* total = &own.counts[LEVEL][0][0];
  for (int i = thread; i < (LEVEL == 0 ? BINS : all_bins); i += THREADS) {
    unsigned count = 0;
    if constexpr (LEVEL == 0) {
      for (int copy = 0; copy < COPIES; ++copy) count += bins[i * COPIES + (copy + thread) % COPIES];
    } else {
      count = bins[i];
    }
    if (count) atomicAdd(&total[i], count);
  }
  if (!last_of(&own.arrived[LEVEL], parts, &flag)) return;

  constexpr int OWN = BINS / THREADS;
  unsigned counts[OWN], sum = 0, before = 0;
#pragma unroll
  for (int w = 0; w < WANTED; ++w) {
    if (w >= statistics) break;
    if (w == 0 || bins_of[w] != bins_of[w > 0 ? w - 1 : 0]) {
      sum = 0;
#pragma unroll
      for (int j = 0; j < OWN; ++j) sum += counts[j] = __ldcg(&total[bins_of[w] * BINS + thread * OWN + j]);
      before = sum_before(sum, warps);
    }
    const unsigned place = w % 2 ? wanted.above[w / 2] : wanted.below[w / 2];
    const unsigned rank = LEVEL > 0 ? own.rank[LEVEL > 0 ? LEVEL - 1 : 0][w] : place;
    if (rank < before || rank >= before + sum) continue;
    unsigned reached = before, digit = thread * OWN;
#pragma unroll
    for (int j = 0; j < OWN - 1; ++j) {
      if (reached + counts[j] > rank) break;
      reached += counts[j];
      ++digit;
    }
    const unsigned bits = prefix[w] << DIGIT_BITS | digit;
    own.prefix[LEVEL][w] = bits;
    own.rank[LEVEL][w] = rank - reached;
    found[w] = from_ordered_bits(bits);
  }
  if constexpr (LEVEL == LEVELS - 1) {
    __syncthreads();
    if (thread < wanted.count)
      quantiles[(long long)thread * batch + row] =
          own.not_numbers ? __int_as_float(0x7fffffff)
                          : between(found[2 * thread], found[2 * thread + 1], wanted.share[thread], wanted.rest[thread]);
  }
}

template <bool PLAIN, typename T, int V>
int launch_levels(const Rows<T>& rows, const Quantiles& wanted, int batch, int parts, void* work, float* quantiles,
                  cudaStream_t stream) {
  const unsigned blocks = (unsigned)batch * parts;
  const int first_bytes = COPIES * BINS * sizeof(unsigned), bytes = 2 * wanted.count * BINS * sizeof(unsigned);
  const auto first = count_level<PLAIN, T, V, 0>;
  cudaError_t status = cudaFuncSetAttribute(first, cudaFuncAttributeMaxDynamicSharedMemorySize, first_bytes);
  if (status == cudaSuccess) status = cudaMemsetAsync(work, 0, (size_t)batch * sizeof(RowWork), stream);
  if (status != cudaSuccess) return status;
  RowWork* of_rows = (RowWork*)work;
  first<<<blocks, THREADS, first_bytes, stream>>>(rows, wanted, parts, of_rows, quantiles);
  count_level<PLAIN, T, V, 1><<<blocks, THREADS, bytes, stream>>>(rows, wanted, parts, of_rows, quantiles);
  count_level<PLAIN, T, V, 2><<<blocks, THREADS, bytes, stream>>>(rows, wanted, parts, of_rows, quantiles);
  return cudaGetLastError();
}

template <typename T>
int launch(const void* values, const void* factors, const float* divisor, int per, int channels_last, const float* scale,
           double half_numel, long long size, const Quantiles& wanted, int batch, int parts, void* work, float* quantiles,
           cudaStream_t stream) {
  constexpr int V = 16 / sizeof(T);
  const Rows<T> rows = {(const T*)values, (const T*)factors, divisor, scale, (float)half_numel, per, channels_last != 0, size};
  const bool wide = size % V == 0 && aligned(values, 16) && aligned(factors, 16);
  auto run = wide ? launch_levels<true, T, V> : launch_levels<true, T, 1>;
  if (factors || divisor) run = wide ? launch_levels<false, T, V> : launch_levels<false, T, 1>;
  return run(rows, wanted, batch, parts, work, quantiles, stream);
}

}  // namespace
}  // namespace smoe

// quantiles [count, B] of the rows of values [B, M], each between the places `below` and the next one of the row's order,
// `share` of the way (`rest` = 1 - share).
//   half_numel   0: of the values; else of the errors |value (times factor)| half_numel / scale / divisor
//   divisor      of each pixel, or null: see PixelWalk for `per` and `channels_last`
//   parts        blocks a row is divided among
//   work         24604 words of 4 bytes a row
extern "C" int smoe_row_quantiles(const void* values, const void* factors, const float* divisor, int per, int channels_last,
                                  const float* scale, double half_numel, int type, int batch, long long size, int count,
                                  long long below0, double share0, double rest0, long long below1, double share1, double rest1,
                                  int parts, void* work, float* quantiles, cudaStream_t stream) {
  using namespace smoe;
  static_assert(sizeof(RowWork) == 4 * 24604, "as said above");
  if (size < 1 || size >= 1ll << 31 || batch < 1 || parts < 1 || (long long)batch * parts >= 1ll << 31) return UNSUPPORTED;
  const Quantiles wanted = make_quantiles(size, count, below0, share0, rest0, below1, share1, rest1);
  const auto run = type == FLOAT32 ? launch<float> : type == BFLOAT16 ? launch<__nv_bfloat16> : launch<__half>;
  return run(values, factors, divisor, per, channels_last, scale, half_numel, size, wanted, batch, parts, work, quantiles,
             stream);
}
