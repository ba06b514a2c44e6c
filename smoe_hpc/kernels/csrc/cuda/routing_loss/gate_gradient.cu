// The gate's gradient and the routing loss from counts of correct selections: one read of the gate's values, one write.
//
// Dimensions: B samples, N experts, K selected, P pixels; S maps of values, 1 (shared by all samples) or B.
#include "routing_loss.cuh"

namespace smoe {
namespace {

constexpr int TILE = 32;  // pixels of a block
constexpr int THREADS = 512;
constexpr int TABLE = 512;  // experts that are marked at once
constexpr int CHUNK = 128;  // selections of a pixel that are marked at once
constexpr unsigned short UNSELECTED = 0xffff;

struct GateArguments {
  const float* values;  // [S, N, P]
  const float* counts;  // correct selections (s, k, p) at s * counts_s + k * counts_k + p * counts_p
  const void* indices;  // the selections, int64 or int32, addressed likewise
  long long counts_s, counts_k, counts_p, indices_s, indices_k, indices_p;
  const float* scale;   // 0-d or null
  double share;         // the gradient is the loss's times share * scale
  double entries;       // what the loss is a mean over: B N P
  float of_each;        // labels that a count and a value stand for: B, or 1 if S = B
  int experts, selected, wide_indices;
  long long pixels;
  float* grad;       // [S, N, P]
  double* partial;   // loss of each block
};

__device__ __forceinline__ long long index_at(const GateArguments& a, long long place) {
  return a.wide_indices ? __ldg((const long long*)a.indices + place) : (long long)__ldg((const int*)a.indices + place);
}

// Approximations of the hardware's, good to about two units of the last place.
__device__ __forceinline__ float power_of_two(float x) {
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}
__device__ __forceinline__ float reciprocal(float x) {
  asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}

// One value v with the sum of its labels: its gradient, of_each sigmoid(v) - label, and its loss up to the logarithm of
// 1 + exp(-|v|). Returns exp(-|v|).
__device__ __forceinline__ float one_value(float v, float label, float of_each, float factor, float& grad, float& loss) {
  const float small = power_of_two(-1.44269504f * fabsf(v)), whole = reciprocal(1.f + small);
  grad = fmaf(of_each, v >= 0.f ? whole : small * whole, -label) * factor;
  loss = fmaf(-label, v, fmaf(of_each, fmaxf(v, 0.f), loss));
  return small;
}
// (1 + a) (1 + b) - 1
__device__ __forceinline__ float joined(float a, float b) { return fmaf(a, b, a + b); }

__device__ __forceinline__ float gradient_factor(const GateArguments& a) {
  return (float)((a.scale ? (double)*a.scale : 1.0) * a.share / a.entries);
}

// The sum of a block's losses, in a fixed order, to its place among the partial sums.
__device__ __forceinline__ void store_loss(double loss, double* partial, double* warps) {
  for (int step = 16; step > 0; step /= 2) loss += __shfl_down_sync(~0u, loss, step);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = loss;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < THREADS / 32; ++w) loss += warps[w];
    *partial = loss;
  }
}

// The CHUNK x TILE selections of a block that are dealt with at once, eight of them a thread's: along the selections where
// those lie side by side in memory, else along the pixels.
struct Eight {
  const bool along_selections;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  __device__ __forceinline__ int selection(int s) const {
    return along_selections ? lane + 32 * (s % 4) : warp + THREADS / 32 * s;
  }
  __device__ __forceinline__ int pixel(int s) const { return along_selections ? warp + THREADS / 32 * (s / 4) : lane; }
};

__device__ __forceinline__ void add_up(const Eight& where, const int (&count)[8], int* correct) {
  if (where.along_selections) {
    const int one = __reduce_add_sync(~0u, count[0] + count[1] + count[2] + count[3]);
    const int other = __reduce_add_sync(~0u, count[4] + count[5] + count[6] + count[7]);
    if (where.lane == 0) {
      correct[where.pixel(0)] += one;
      correct[where.pixel(4)] += other;
    }
  } else {
    int sum = 0;
    for (int s = 0; s < 8; ++s) sum += count[s];
    atomicAdd(&correct[where.lane], sum);
  }
}

// A block has 32 pixels and some of the experts, of which it deals with TABLE at a time: it marks the selected ones in a table
// in shared memory, then streams over the values. V pixels lie side by side in a load.
template <int V>
__global__ void __launch_bounds__(THREADS, 2) gate_gradient(GateArguments a, int experts_each) {
  __shared__ __align__(16) unsigned short table[TABLE * TILE];  // [experts, TILE]: correct, or UNSELECTED
  __shared__ unsigned short staged[CHUNK][TILE + 2];  // correct selections; two more columns keep the banks apart
  __shared__ int correct[TILE];
  __shared__ double warps[THREADS / 32];
  constexpr int ROW_THREADS = TILE / V, ROWS = THREADS / ROW_THREADS, AHEAD = V > 1 ? 4 : 8;
  const int thread = threadIdx.x, sample = blockIdx.z;
  const long long first_pixel = (long long)blockIdx.x * TILE;
  const int pixels = (int)min((long long)TILE, a.pixels - first_pixel);
  const int own_begin = blockIdx.y * experts_each, own_end = min(own_begin + experts_each, a.experts);
  const int row = thread / ROW_THREADS, column = thread % ROW_THREADS * V;
  const long long at = (long long)sample * a.experts * a.pixels + first_pixel + column;
  const Eight of_counts = {a.counts_k == 1}, of_indices = {a.indices_k == 1};
  let_later_start(), wait_for_earlier();
  const float factor = gradient_factor(a);
  const bool all_at_once = a.selected <= CHUNK;  // then the selections are read only once
  int expert[8], count[8];
  float loss = 0.f, other[V];
  if (thread < TILE) correct[thread] = 0;
  for (int first_expert = own_begin; first_expert < own_end; first_expert += TABLE) {
    const int experts = min(TABLE, own_end - first_expert);
    Pack<float, V> values[AHEAD];
    const auto load_values = [&](int e) {
#pragma unroll
      for (int n = 0; n < AHEAD; ++n)
        if (column < pixels && e + n * ROWS < experts)
          values[n] = load_pack<float, V>(a.values + at + (first_expert + e + n * ROWS) * a.pixels);
    };
    load_values(row);
    uint4* words = reinterpret_cast<uint4*>(table);
    for (int i = thread; i < (experts * TILE + 7) / 8; i += THREADS) words[i] = make_uint4(~0u, ~0u, ~0u, ~0u);
    for (int first = 0; first < a.selected; first += CHUNK) {
      const int selected = min(CHUNK, a.selected - first);
      if (!all_at_once || first_expert == own_begin) {
        const long long counts = sample * a.counts_s + first * a.counts_k + first_pixel * a.counts_p;
        const long long indices = sample * a.indices_s + first * a.indices_k + first_pixel * a.indices_p;
#pragma unroll
        for (int s = 0; s < 8; ++s) {
          const int k = of_indices.selection(s), p = of_indices.pixel(s);
          expert[s] = -1;
          if (k < selected && p < pixels) expert[s] = (int)index_at(a, indices + k * a.indices_k + p * a.indices_p);
        }
#pragma unroll
        for (int s = 0; s < 8; ++s) {
          const int k = of_counts.selection(s), p = of_counts.pixel(s);
          count[s] = k < selected && p < pixels ? (int)__ldg(a.counts + counts + k * a.counts_k + p * a.counts_p) : 0;
        }
        __syncthreads();
#pragma unroll
        for (int s = 0; s < 8; ++s) staged[of_counts.selection(s)][of_counts.pixel(s)] = (unsigned short)count[s];
        if (first_expert == own_begin) add_up(of_counts, count, correct);
      }
      __syncthreads();
#pragma unroll
      for (int s = 0; s < 8; ++s) {
        const int p = of_indices.pixel(s);
        const unsigned here = (unsigned)(expert[s] - first_expert);
        if (expert[s] >= 0 && here < (unsigned)experts) table[here * TILE + p] = staged[of_indices.selection(s)][p];
      }
    }
    __syncthreads();
    if (column < pixels) {
#pragma unroll
      for (int v = 0; v < V; ++v)
        other[v] = (a.selected * a.of_each - (float)correct[column + v]) / (float)(a.experts - a.selected);
    }
    for (int e = row; e < experts; e += AHEAD * ROWS) {
      if (e > row) load_values(e);
#pragma unroll
      for (int n = 0; n < AHEAD; ++n) {
        const int here = e + n * ROWS;
        if (column >= pixels || here >= experts) break;
        const Pack<unsigned short, V> codes = pack_at<unsigned short, V>(&table[here * TILE + column]);
        Pack<float, V> grads;
        float small = 0.f;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          // A whole number below 2^23 is the fraction of a float32 of this exponent: faster than a conversion.
          const float marked = __uint_as_float(0x4b000000u | codes.of[v]) - 8388608.f;
          const float label = codes.of[v] == UNSELECTED ? other[v] : marked;
          small = joined(small, one_value(values[n].of[v], label, a.of_each, factor, grads.of[v], loss));
        }
        store_pack<float, V>(a.grad + at + (first_expert + here) * a.pixels, grads);
        loss = fmaf(a.of_each, log1pf(small), loss);
      }
    }
    __syncthreads();  // before the table is cleared
  }
  store_loss(loss, a.partial + (((long long)sample * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x), warps);
}

// -- samples with a choice of their own, values that they share ----------------------------------------------------------
// Labels are added up over the samples by integer atomics: for each expert and pixel, the correct selections in the lower
// half of a word of 64 bits, and in the upper half the wrong selections at this pixel in samples that selected the expert.

__global__ void __launch_bounds__(THREADS) add_labels(GateArguments a, unsigned long long* labels, unsigned* wrong) {
  const long long pixel = (long long)blockIdx.x * TILE + threadIdx.x % TILE;
  __shared__ unsigned correct[TILE];
  const int group = threadIdx.x / TILE, sample = blockIdx.y;
  if (threadIdx.x < TILE) correct[threadIdx.x] = 0;
  __syncthreads();
  const long long counts = sample * a.counts_s + pixel * a.counts_p, indices = sample * a.indices_s + pixel * a.indices_p;
  if (pixel < a.pixels) {
    unsigned sum = 0;
    for (int k = group; k < a.selected; k += THREADS / TILE) sum += (unsigned)a.counts[counts + k * a.counts_k];
    atomicAdd(&correct[threadIdx.x % TILE], sum);
  }
  __syncthreads();
  if (pixel >= a.pixels) return;
  const unsigned long long wrong_here = a.selected - correct[threadIdx.x % TILE];
  for (int k = group; k < a.selected; k += THREADS / TILE) {
    const long long expert = index_at(a, indices + k * a.indices_k);
    const unsigned long long right = (unsigned long long)a.counts[counts + k * a.counts_k];
    if (expert >= 0 && expert < a.experts) atomicAdd(&labels[expert * a.pixels + pixel], wrong_here << 32 | right);
  }
  if (group == 0) atomicAdd(&wrong[pixel], (unsigned)wrong_here);
}

__global__ void __launch_bounds__(THREADS)
    gate_gradient_of_labels(GateArguments a, const unsigned long long* labels, const unsigned* wrong) {
  __shared__ double warps[THREADS / 32];
  const float factor = gradient_factor(a);
  const long long all = a.experts * a.pixels;
  double loss = 0.0;
  for (long long i = blockIdx.x * (long long)THREADS + threadIdx.x; i < all; i += (long long)gridDim.x * THREADS) {
    const unsigned long long label = labels[i];
    const unsigned elsewhere = wrong[i % a.pixels] - (unsigned)(label >> 32);
    const float sum = (float)(unsigned)label + (float)elsewhere / (float)(a.experts - a.selected);
    float part = 0.f;
    const float small = one_value(a.values[i], sum, a.of_each, factor, a.grad[i], part);
    loss += part + a.of_each * log1pf(small);
  }
  store_loss(loss, a.partial + blockIdx.x, warps);
}

__global__ void __launch_bounds__(THREADS) finish_loss(const double* partial, long long count, double entries, float* result) {
  __shared__ double warps[THREADS / 32];
  __shared__ double total;
  let_later_start(), wait_for_earlier();
  double loss = 0.0;
  for (long long i = threadIdx.x; i < count; i += THREADS) loss += partial[i];
  store_loss(loss, &total, warps);
  if (threadIdx.x == 0) *result = (float)(total / entries);
}

}  // namespace
}  // namespace smoe

// grad [S, N, P] of the routing loss, times share * scale, and the loss itself.
//   counts, indices   see GateArguments; float32 whole numbers below 65535; int64 (wide_indices) or int32
//   maps              S
//   batch             B, where S = 1: samples that a count was summed over
//   experts_each      experts of a block
//   partial           float64 [S * ceil(N / experts_each) * ceil(P / 32)]
extern "C" int smoe_gate_gradient(const float* values, const float* counts, long long counts_s, long long counts_k,
                                  long long counts_p, const void* indices, long long indices_s, long long indices_k,
                                  long long indices_p, int wide_indices, const float* scale, double share, int maps, int batch,
                                  int experts, int selected, long long pixels, int experts_each, float* grad, double* partial,
                                  float* loss, cudaStream_t stream) {
  using namespace smoe;
  if (maps < 1 || maps > 65535 || batch < 1 || batch >= UNSELECTED || pixels < 1 || experts <= selected || experts_each < 1)
    return UNSUPPORTED;
  const double entries = (double)maps * batch * experts * pixels;
  const GateArguments a = {values,      counts,    indices,     counts_s, counts_k, counts_p,     indices_s,
                           indices_k,   indices_p, scale,       share,    entries,  (float)batch, experts,
                           selected,    wide_indices, pixels,   grad,     partial};
  const dim3 blocks((unsigned)((pixels + TILE - 1) / TILE), (experts + experts_each - 1) / experts_each, maps);
  if (blocks.y > 65535) return UNSUPPORTED;
  const bool wide = pixels % 4 == 0 && aligned(values, 16) && aligned(grad, 16);
  const auto kernel = wide ? gate_gradient<4> : gate_gradient<1>;
  const int status = launch_early(kernel, blocks, THREADS, 0, stream, a, experts_each);
  if (status != cudaSuccess) return status;
  return launch_early(finish_loss, 1, THREADS, 0, stream, partial, (long long)blocks.x * blocks.y * blocks.z, entries, loss);
}

// The same where each of B samples has its own selection and counts of 0 and 1, but all share the values (S = 1).
//   labels    uint64 [N, P] and then uint32 [P], to be written
//   partial   float64 [blocks]
extern "C" int smoe_gate_gradient_own(const float* values, const float* counts, long long counts_s, long long counts_k,
                                      long long counts_p, const void* indices, long long indices_s, long long indices_k,
                                      long long indices_p, int wide_indices, const float* scale, double share, int batch,
                                      int experts, int selected, long long pixels, int blocks, void* labels, float* grad,
                                      double* partial, float* loss, cudaStream_t stream) {
  using namespace smoe;
  if (batch < 1 || batch > 65535 || pixels < 1 || experts <= selected || (double)batch * selected >= 4294967296.0)
    return UNSUPPORTED;
  const double entries = (double)batch * experts * pixels;
  const GateArguments a = {values,      counts,    indices,     counts_s, counts_k, counts_p,     indices_s,
                           indices_k,   indices_p, scale,       share,    entries,  (float)batch, experts,
                           selected,    wide_indices, pixels,   grad,     partial};
  unsigned long long* sums = (unsigned long long*)labels;
  unsigned* wrong = (unsigned*)(sums + experts * pixels);
  cudaError_t status = cudaMemsetAsync(labels, 0, (size_t)pixels * (experts * 8ull + 4), stream);
  if (status != cudaSuccess) return status;
  add_labels<<<dim3((unsigned)((pixels + TILE - 1) / TILE), batch), THREADS, 0, stream>>>(a, sums, wrong);
  status = cudaGetLastError();
  if (status != cudaSuccess) return status;
  gate_gradient_of_labels<<<blocks, THREADS, 0, stream>>>(a, sums, wrong);
  status = cudaGetLastError();
  if (status != cudaSuccess) return status;
  return launch_early(finish_loss, 1, THREADS, 0, stream, partial, blocks, entries, loss);
}
