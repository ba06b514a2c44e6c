// What the kernels of the routing loss share: loads of any type and width, errors, and the selection of order statistics.
//
// Letters: B samples (rows), K selected, F filters per expert, P pixels, M errors of a sample (K P).
#pragma once
#include <cstring>
#include "early_launch.cuh"

namespace smoe {

// V values that lie side by side and are loaded or stored at once.
template <typename T, int V>
struct Pack {
  T of[V];
};

template <int BYTES>
struct Word;
template <>
struct Word<2> {
  using Type = unsigned short;
};
template <>
struct Word<4> {
  using Type = unsigned int;
};
template <>
struct Word<8> {
  using Type = uint2;
};
template <>
struct Word<16> {
  using Type = uint4;
};

template <typename T, int V>
using WordOf = typename Word<sizeof(T) * V>::Type;

template <typename T, int V>
__device__ __forceinline__ Pack<T, V> as_pack(WordOf<T, V> word) {
  Pack<T, V> pack;
  memcpy(&pack, &word, sizeof(word));
  return pack;
}
// Of global memory that the kernel does not write.
template <typename T, int V>
__device__ __forceinline__ Pack<T, V> load_pack(const T* from) {
  return as_pack<T, V>(__ldg(reinterpret_cast<const WordOf<T, V>*>(from)));
}
// Of any memory.
template <typename T, int V>
__device__ __forceinline__ Pack<T, V> pack_at(const T* from) {
  return as_pack<T, V>(*reinterpret_cast<const WordOf<T, V>*>(from));
}

template <typename T, int V>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, V>& pack) {
  WordOf<T, V> word;
  memcpy(&word, &pack, sizeof(word));
  *reinterpret_cast<WordOf<T, V>*>(to) = word;
}

__device__ __forceinline__ float as_float(float x) { return x; }
__device__ __forceinline__ float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float as_float(__half x) { return __half2float(x); }
template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// The product of two numbers of a type, rounded to it.
template <typename T>
__device__ __forceinline__ T product(T a, T b) {
  return from_float<T>(__fmul_rn(as_float(a), as_float(b)));
}

// What turns |g| into an error: numel(g) / 2 / s, rounded as the written-out form does. No scale is a scale of 1.
__device__ __forceinline__ float error_factor(const float* scale, float half_numel) {
  return scale ? __fmul_rn(__frcp_rn(*scale), half_numel) : half_numel;
}

// The pixels of values that lie side by side in a sample with one filter per expert: `per` values of each pixel in turn
// (channels last, K), or all `per` pixels (P) of one channel after the other.
struct PixelWalk {
  unsigned pixel_or_channel, rest;
  const unsigned per;
  const bool channels_last;
  __device__ __forceinline__ PixelWalk(unsigned at, int per, bool channels_last)
      : pixel_or_channel(at / (unsigned)per), rest(at % (unsigned)per), per(per), channels_last(channels_last) {}
  __device__ __forceinline__ unsigned pixel() const { return channels_last ? pixel_or_channel : rest; }
  __device__ __forceinline__ void next() {
    if (++rest == per) {
      rest = 0;
      ++pixel_or_channel;
    }
  }
};

// What errors are divided by; rounded as a division is, but faster where several share the divisor.
struct Divisor {
  float by = 1.f, reciprocal = 1.f;
  Divisor() = default;
  __device__ __forceinline__ explicit Divisor(float divisor) {
    by = divisor;
    reciprocal = __frcp_rn(divisor);
  }
  __device__ __forceinline__ float operator()(float x) const {
    const float guess = __fmul_rn(x, reciprocal);
    // The remainders below neither overflow nor lose bits in this range.
    if (!(guess > 1e-28f && guess < 1e28f && x > 1e-28f && x < 1e28f)) return __fdiv_rn(x, by);
    const float closer = __fmaf_rn(__fmaf_rn(-guess, by, x), reciprocal, guess);
    return __fmaf_rn(__fmaf_rn(-closer, by, x), reciprocal, closer);
  }
};

// Which places of a row's order are wanted: for each of one or two quantiles the two neighbours it lies between, at `below`
// and the next one, and how far it is from them.
struct Quantiles {
  int count;
  unsigned below[2], above[2];
  float share[2], rest[2];
};

inline Quantiles make_quantiles(long long size, int count, long long below0, double share0, double rest0, long long below1,
                                double share1, double rest1) {
  const long long last = size - 1;
  return {count,
          {(unsigned)below0, (unsigned)below1},
          {(unsigned)(below0 < last ? below0 + 1 : last), (unsigned)(below1 < last ? below1 + 1 : last)},
          {(float)share0, (float)share1},
          {(float)rest0, (float)rest1}};
}

// Interpolated from the nearer neighbour; every operation rounded by itself.
__device__ __forceinline__ float between(float low, float high, float share, float rest) {
  if (share == 0.f) return low;
  if (isinf(high)) return high;
  const float step = __fsub_rn(high, low);
  return share < 0.5f ? __fadd_rn(low, __fmul_rn(share, step)) : __fsub_rn(high, __fmul_rn(step, rest));
}

// The sum of `value` over the threads before this one, in a block of a multiple of 32 threads; `warps` holds 32 words.
__device__ __forceinline__ unsigned sum_before(unsigned value, unsigned* warps) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  unsigned sum = value;
  for (int step = 1; step < 32; step *= 2) {
    const unsigned other = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == 31) warps[warp] = sum;
  __syncthreads();
  if (warp == 0) {
    const unsigned own = lane < (int)(blockDim.x >> 5) ? warps[lane] : 0;
    unsigned all = own;
    for (int step = 1; step < 32; step *= 2) {
      const unsigned other = __shfl_up_sync(~0u, all, step);
      if (lane >= step) all += other;
    }
    warps[lane] = all - own;
  }
  __syncthreads();
  const unsigned before = warps[warp] + sum - value;
  __syncthreads();
  return before;
}

// Whether this block is the last of `parts` to come here. What the others wrote before is then visible to all its threads.
__device__ __forceinline__ bool last_of(unsigned* arrived, unsigned parts, unsigned* flag) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *flag = atomicAdd(arrived, 1u);
  __syncthreads();
  __threadfence();
  return *flag == parts - 1;
}

inline bool aligned(const void* pointer, int bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// What a row's quantiles are read from.
template <typename T>
struct Rows {
  const T* values;       // [B, M]
  const T* factors;      // [B, M] or null: multiplied with the values first, rounded to their type
  const float* divisor;  // of the errors of each pixel, or null; see PixelWalk
  const float* scale;    // see error_factor
  float half_numel;      // 0: the values themselves are ordered, not the errors they make
  int per;
  bool channels_last;
  long long size;        // M
};

// A row's part of `parts`, in packs.
struct Part {
  long long begin, end;
};
__device__ __forceinline__ Part part_of(long long packs, int part, int parts) {
  const long long each = (packs + parts - 1) / parts;
  const long long begin = min(each * part, packs);
  return {begin, min(begin + each, packs)};
}

// Calls `use` with every value of this block's part of the row and what its error is divided by; AHEAD loads are under
// way. PLAIN: there are neither factors nor divisors.
template <bool PLAIN, int AHEAD, typename T, int V, typename Use>
__device__ __forceinline__ void for_each_value(const Rows<T>& rows, long long row, int part, int parts, Use use) {
  const T* values = rows.values + row * rows.size;
  const T* factors = rows.factors ? rows.factors + row * rows.size : nullptr;
  const Part own = part_of(rows.size / V, part, parts);
  const long long stride = blockDim.x;
  for (long long first = own.begin + threadIdx.x; first < own.end; first += AHEAD * stride) {
    Pack<T, V> pack[AHEAD];
#pragma unroll
    for (int a = 0; a < AHEAD; ++a)
      if (first + a * stride < own.end) pack[a] = load_pack<T, V>(values + (first + a * stride) * V);
#pragma unroll
    for (int a = 0; a < AHEAD; ++a) {
      const long long at = (first + a * stride) * V;
      if (first + a * stride >= own.end) break;
      if constexpr (PLAIN) {
#pragma unroll
        for (int v = 0; v < V; ++v) use(pack[a].of[v], Divisor{});
      } else {
        if (factors) {
          const Pack<T, V> times = load_pack<T, V>(factors + at);
#pragma unroll
          for (int v = 0; v < V; ++v) pack[a].of[v] = product(pack[a].of[v], times.of[v]);
        }
        PixelWalk walk(rows.divisor ? (unsigned)at : 0, rows.per, rows.channels_last);
        const bool one_pixel = V == 1 || (rows.channels_last && rows.per % V == 0);
        Divisor divisor = rows.divisor ? Divisor(__ldg(rows.divisor + walk.pixel())) : Divisor();
#pragma unroll
        for (int v = 0; v < V; ++v) {
          use(pack[a].of[v], divisor);
          if (!one_pixel && rows.divisor && v + 1 < V) {
            walk.next();
            divisor = Divisor(__ldg(rows.divisor + walk.pixel()));
          }
        }
      }
    }
  }
}

}  // namespace smoe
