// Changes of layout around the products: weights to rows of channels for each tap, their gradient back, indices by pixel.
#include <algorithm>
#include "common.cuh"

namespace smoe {
namespace {

constexpr int THREADS = 256;
constexpr int STAGED = 4096;  // numbers that a CTA turns round in shared memory
constexpr int MANY_BLOCKS = 512;  // keep any GPU busy
constexpr int EDGE = 32;      // of the squares in which indices are transposed

__device__ __forceinline__ float read_number(const void* from, int64_t at, int type) {
  if (type == FLOAT32) return static_cast<const float*>(from)[at];
  if (type == BFLOAT16) return __bfloat162float(static_cast<const __nv_bfloat16*>(from)[at]);
  return __half2float(static_cast<const __half*>(from)[at]);
}

__device__ __forceinline__ void write_number(void* to, int64_t at, int type, float value) {
  if (type == FLOAT32)
    static_cast<float*>(to)[at] = value;
  else if (type == BFLOAT16)
    static_cast<__nv_bfloat16*>(to)[at] = __float2bfloat16_rn(value);
  else
    static_cast<__half*>(to)[at] = __float2half_rn(value);
}

__device__ __forceinline__ void write_pair(void* to, int64_t at, int type, float a, float b) {
  if (type == FLOAT32)
    *reinterpret_cast<float2*>(static_cast<float*>(to) + at) = make_float2(a, b);
  else if (type == BFLOAT16)
    *reinterpret_cast<__nv_bfloat162*>(static_cast<__nv_bfloat16*>(to) + at) = __floats2bfloat162_rn(a, b);
  else
    *reinterpret_cast<__half2*>(static_cast<__half*>(to) + at) = __floats2half2_rn(a, b);
}

// What a CTA turns round: whole rows of [rows, C, taps], or a run of the channels of one row; in either case a piece of memory
// without gaps, which begins at `start`.
struct Piece {
  int64_t first_row, start;
  int rows, first_channel, channels;
};

// `C` channels are divided into runs of `channels`; only `there` of them are in the unpacked tensor.
__device__ __forceinline__ Piece piece_of(int64_t all_rows, int C, int there, int taps, int rows, int channels) {
  const int runs = (C + channels - 1) / channels;
  const int64_t first_row = blockIdx.x / runs * static_cast<int64_t>(rows);
  const int first_channel = blockIdx.x % runs * channels;
  const int64_t left = all_rows - first_row;
  return {first_row, (first_row * there + first_channel) * taps, left < rows ? static_cast<int>(left) : rows, first_channel,
          min(channels, C - first_channel)};
}

// weight [rows, C, taps] -> packed [rows, taps, padded], zero beyond C.
__global__ void __launch_bounds__(THREADS) pack_kernel(const void* weight, int from, void* packed, int to, int64_t all_rows,
                                                       int C, int taps, int padded, int rows, int channels) {
  __shared__ __align__(16) float staged[STAGED];
  const Piece piece = piece_of(all_rows, padded, C, taps, rows, channels);
  const int there = max(0, min(piece.channels, C - piece.first_channel));  // channels that are no padding
  const int run = there * taps, length = piece.rows * run;
  if (from == FLOAT32 && piece.start % 4 == 0 && reinterpret_cast<uintptr_t>(weight) % 16 == 0) {
    constexpr int EACH = STAGED / 4 / THREADS;
    const float4* fours = reinterpret_cast<const float4*>(static_cast<const float*>(weight) + piece.start);
    float4 mine[EACH];  // all on their way before the first is waited for
#pragma unroll
    for (int j = 0; j < EACH; j++)
      if (threadIdx.x + j * THREADS < length / 4) mine[j] = __ldg(fours + threadIdx.x + j * THREADS);
#pragma unroll
    for (int j = 0; j < EACH; j++)
      if (threadIdx.x + j * THREADS < length / 4) reinterpret_cast<float4*>(staged)[threadIdx.x + j * THREADS] = mine[j];
    for (int i = length / 4 * 4 + threadIdx.x; i < length; i += THREADS) staged[i] = read_number(weight, piece.start + i, from);
  } else {
#pragma unroll 4
    for (int i = threadIdx.x; i < length; i += THREADS) staged[i] = read_number(weight, piece.start + i, from);
  }
  __syncthreads();
  for (int unit = threadIdx.x / 32; unit < piece.rows * taps; unit += THREADS / 32) {  // a tap of a row
    const int row = unit / taps, tap = unit % taps;
    const float* own = staged + row * run + tap;
    const int64_t start = ((piece.first_row + row) * taps + tap) * padded + piece.first_channel;
    for (int channel = threadIdx.x % 32 * 2; channel < piece.channels; channel += 64) {
      const float a = channel < there ? own[channel * taps] : 0.0f, b = channel + 1 < there ? own[(channel + 1) * taps] : 0.0f;
      write_pair(packed, start + channel, to, a, b);
    }
  }
}

// packed [rows, taps, padded] float32 -> gradient [rows, C, taps].
__global__ void __launch_bounds__(THREADS) unpack_kernel(const float* packed, void* gradient, int to, int64_t all_rows, int C,
                                                         int taps, int padded, int rows, int channels) {
  __shared__ __align__(16) float staged[STAGED];
  const Piece piece = piece_of(all_rows, C, C, taps, rows, channels);
  const int run = piece.channels * taps, length = piece.rows * run;
  if (padded == C && C % 2 == 0 && piece.channels == C && reinterpret_cast<uintptr_t>(packed) % 8 == 0) {  // without gaps
    constexpr int EACH = STAGED / 2 / THREADS;
    const float2* pairs = reinterpret_cast<const float2*>(packed + piece.start);
    float2 mine[EACH];  // all on their way before the first is waited for
#pragma unroll
    for (int j = 0; j < EACH; j++)
      if (threadIdx.x + j * THREADS < length / 2) mine[j] = __ldg(pairs + threadIdx.x + j * THREADS);
#pragma unroll
    for (int j = 0; j < EACH; j++) {
      const int i = 2 * (threadIdx.x + j * THREADS), unit = i / C, row = unit / taps;
      if (i >= length) break;
      float* to = staged + row * run + (i - unit * C) * taps + unit - row * taps;
      to[0] = mine[j].x;
      to[taps] = mine[j].y;
    }
  } else {
    for (int unit = threadIdx.x / 32; unit < piece.rows * taps; unit += THREADS / 32) {
      const int row = unit / taps, tap = unit % taps;
      const float* from = packed + ((piece.first_row + row) * taps + tap) * padded + piece.first_channel;
#pragma unroll 4
      for (int channel = threadIdx.x % 32; channel < piece.channels; channel += 32)
        staged[row * run + channel * taps + tap] = __ldg(from + channel);
    }
  }
  __syncthreads();
  if (to == FLOAT32 && piece.start % 4 == 0 && reinterpret_cast<uintptr_t>(gradient) % 16 == 0) {
    float4* fours = reinterpret_cast<float4*>(static_cast<float*>(gradient) + piece.start);
    for (int i = threadIdx.x; i < length / 4; i += THREADS) fours[i] = reinterpret_cast<const float4*>(staged)[i];
    for (int i = length / 4 * 4 + threadIdx.x; i < length; i += THREADS) write_number(gradient, piece.start + i, to, staged[i]);
  } else {
    for (int i = threadIdx.x; i < length; i += THREADS) write_number(gradient, piece.start + i, to, staged[i]);
  }
}

// indices [S, K, P] -> index [S, P, K]; what no int can hold becomes -1, which no expert has.
__global__ void __launch_bounds__(THREADS) transpose_kernel(const int64_t* indices, int K, int P, int* index) {
  __shared__ int square[EDGE][EDGE + 1];
  const int across = (P + EDGE - 1) / EDGE, down = (K + EDGE - 1) / EDGE;
  const int64_t choice = blockIdx.x / (across * down);
  const int rest = blockIdx.x % (across * down), p = rest % across * EDGE, k = rest / across * EDGE;
  const int lane = threadIdx.x % EDGE;
  const int64_t* from = indices + choice * K * P;
  int* to = index + choice * K * P;
  for (int i = threadIdx.x / EDGE; i < EDGE; i += THREADS / EDGE)
    if (k + i < K && p + lane < P) {
      const int64_t expert = from[(int64_t)(k + i) * P + p + lane];
      square[i][lane] = expert == static_cast<int>(expert) ? static_cast<int>(expert) : -1;
    }
  __syncthreads();
  for (int i = threadIdx.x / EDGE; i < EDGE; i += THREADS / EDGE)
    if (p + i < P && k + lane < K) to[(int64_t)(p + i) * K + k + lane] = square[lane][i];
}

// Rows, or channels of one row, that fit into a CTA's shared memory; fewer if there are not enough for all multiprocessors.
void divide_rows(int rows, int channels, int taps, int* rows_each, int* channels_each) {
  const int most = STAGED / taps / 2 * 2;
  *channels_each = channels < most ? channels : most;
  *rows_each = channels <= most ? std::max(1, std::min(STAGED / (channels * taps), rows / MANY_BLOCKS)) : 1;
}

}  // namespace
}  // namespace smoe

// weight [rows, C, taps] of type `from` to packed [rows, taps, padded] of type `to`; padded is even and at least C.
extern "C" int smoe_pack_weight(const void* weight, int from, void* packed, int to, int rows, int C, int taps, int padded,
                                cudaStream_t stream) {
  using namespace smoe;
  if (padded % 2 || padded < C || taps > STAGED / 2) return UNSUPPORTED;
  if (rows == 0 || padded == 0) return 0;
  int rows_each, channels_each;
  divide_rows(rows, padded, taps, &rows_each, &channels_each);
  const int64_t blocks = (int64_t)((rows + rows_each - 1) / rows_each) * ((padded + channels_each - 1) / channels_each);
  if (blocks > INT32_MAX) return UNSUPPORTED;
  pack_kernel<<<static_cast<unsigned>(blocks), THREADS, 0, stream>>>(weight, from, packed, to, rows, C, taps, padded, rows_each,
                                                                     channels_each);
  return cudaGetLastError();
}

// packed [rows, taps, padded] float32 to gradient [rows, C, taps] of type `to`.
extern "C" int smoe_unpack_gradient(const float* packed, void* gradient, int to, int rows, int C, int taps, int padded,
                                    cudaStream_t stream) {
  using namespace smoe;
  if (padded < C || taps > STAGED / 2) return UNSUPPORTED;
  if (rows == 0 || C == 0) return 0;
  int rows_each, channels_each;
  divide_rows(rows, C, taps, &rows_each, &channels_each);
  const int64_t blocks = (int64_t)((rows + rows_each - 1) / rows_each) * ((C + channels_each - 1) / channels_each);
  if (blocks > INT32_MAX) return UNSUPPORTED;
  unpack_kernel<<<static_cast<unsigned>(blocks), THREADS, 0, stream>>>(packed, gradient, to, rows, C, taps, padded, rows_each,
                                                                       channels_each);
  return cudaGetLastError();
}

// indices [choices, K, P] int64 to index [choices, P, K] int32.
extern "C" int smoe_transpose_indices(const int64_t* indices, int choices, int K, int P, int* index, cudaStream_t stream) {
  using namespace smoe;
  const int64_t blocks = (int64_t)choices * ((P + EDGE - 1) / EDGE) * ((K + EDGE - 1) / EDGE);
  if (blocks > INT32_MAX) return UNSUPPORTED;
  if (blocks == 0) return 0;
  transpose_kernel<<<static_cast<unsigned>(blocks), THREADS, 0, stream>>>(indices, K, P, index);
  return cudaGetLastError();
}
