// The three kernels for layers of few channels in float32, always in one order.
#include "few.cuh"

namespace smoe::portable {

constexpr int TOGETHER = 8;  // samples of a thread, which share its weights

struct FewTask {
  const float *in, *w;
  float* out;
  Shape shape;
  Windows windows;
  int choices;

  __device__ __forceinline__ int tiles() const { return windows.tiles_y * windows.tiles_x; }
  __device__ __forceinline__ int wrapped(int w_, int width) const {
    return shape.wrap && (unsigned)w_ >= (unsigned)width ? (w_ % width + width) % width : w_;
  }
};

// Number of a thread's first sample and of its samples: `TOGETHER` of those that share a choice.
__device__ __forceinline__ int samples_of(const FewTask& task, int& first) {
  first = task.choices > 1 ? blockIdx.y : blockIdx.y * TOGETHER;
  return task.choices > 1 ? 1 : min(TOGETHER, task.shape.B - first);
}

// sums[i] of consecutive samples: the same number of the input, `stride` apart, times one weight.
__device__ __forceinline__ void add_products(float (&sums)[TOGETHER], const float* in, int64_t stride, int samples,
                                             float weight) {
#pragma unroll
  for (int i = 0; i < TOGETHER; i++)
    if (i < samples) sums[i] = fmaf(in[i * stride], weight, sums[i]);
}

__global__ void __launch_bounds__(THREADS) few_forward(const __grid_constant__ FewTask task) {
  const Shape& s = task.shape;
  const Windows& v = task.windows;
  const int64_t outputs = (int64_t)s.K * s.F, number = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  if (number >= (int64_t)s.Ho * s.Wo * outputs) return;
  const int pixel = static_cast<int>(number / outputs), channel = static_cast<int>(number % outputs);
  const int h = pixel / s.Wo, w = pixel % s.Wo, k = channel / s.F;
  int first;
  const int samples = samples_of(task, first);
  const int64_t window = (int64_t)(task.choices > 1 ? first : 0) * task.tiles() + h / v.step_h * v.tiles_x + w / v.step_w;
  const int slot = v.slots[((window * v.rows + h % v.step_h) * v.columns + w % v.step_w) * s.K + k];
  float sums[TOGETHER] = {};
  if (slot != LEFT_OUT) {
    const float* weights = task.w + ((int64_t)v.ids[window * v.cap + slot] * s.F + channel % s.F) * s.ksize * s.ksize * s.C;
    for (int i = 0; i < s.ksize; i++)
      for (int j = 0; j < s.ksize; j++) {
        const int from_h = h + i - s.off, from_w = task.wrapped(w + j - s.off, s.Wi);
        const bool inside = (unsigned)from_h < (unsigned)s.Hi && (unsigned)from_w < (unsigned)s.Wi;
        const float* in = task.in + (((int64_t)first * s.Hi + from_h) * s.Wi + from_w) * s.C;
        for (int c = 0; c < s.C; c++, weights++)
          if (inside) add_products(sums, in + c, (int64_t)s.Hi * s.Wi * s.C, samples, __ldg(weights));
      }
  }
  float* to = task.out + (int64_t)first * s.Ho * s.Wo * outputs + number;
  for (int i = 0; i < samples; i++) to[i * s.Ho * s.Wo * outputs] = sums[i];
}

__global__ void __launch_bounds__(THREADS) few_input_grad(const __grid_constant__ FewTask task) {
  const Shape& s = task.shape;
  const Windows& v = task.windows;
  const int64_t number = (int64_t)blockIdx.x * THREADS + threadIdx.x, outputs = (int64_t)s.K * s.F;
  if (number >= (int64_t)s.Hi * s.Wi * s.C) return;
  const int pixel = static_cast<int>(number / s.C), c = static_cast<int>(number % s.C), h = pixel / s.Wi, w = pixel % s.Wi;
  const int taps = s.ksize * s.ksize;
  int first;
  const int samples = samples_of(task, first);
  const int64_t window = (int64_t)(task.choices > 1 ? first : 0) * task.tiles() + h / v.step_h * v.tiles_x + w / v.step_w;
  float sums[TOGETHER] = {};
  for (int i = 0; i < s.ksize; i++)
    for (int j = 0; j < s.ksize; j++) {
      const int from_h = h + s.off - i, from_w = task.wrapped(w + s.off - j, s.Wo);
      if ((unsigned)from_h >= (unsigned)s.Ho || (unsigned)from_w >= (unsigned)s.Wo) continue;
      const int row = h % v.step_h + s.ksize - 1 - i, column = w % v.step_w + s.ksize - 1 - j;
      const uint16_t* slots = v.slots + ((window * v.rows + row) * v.columns + column) * s.K;
      const float* in = task.in + (((int64_t)first * s.Ho + from_h) * s.Wo + from_w) * outputs;
      for (int k = 0; k < s.K; k++) {
        const int slot = slots[k];
        if (slot == LEFT_OUT) continue;
        const float* weights = task.w + ((int64_t)v.ids[window * v.cap + slot] * s.F * taps + i * s.ksize + j) * s.C + c;
        for (int f = 0; f < s.F; f++)
          add_products(sums, in + k * s.F + f, s.Ho * s.Wo * outputs, samples, __ldg(weights + (int64_t)f * taps * s.C));
      }
    }
  float* to = task.out + (int64_t)first * s.Hi * s.Wi * s.C + number;
  for (int i = 0; i < samples; i++) to[(int64_t)i * s.Hi * s.Wi * s.C] = sums[i];
}

__device__ __forceinline__ float sum_over_warp(float value) {
#pragma unroll
  for (int other = 16; other > 0; other /= 2) value += __shfl_xor_sync(~0u, value, other);
  return value;
}

// sums [windows, cap F, taps C] of one window's pixels and samples; a CTA a column, a warp each of its numbers.
__global__ void __launch_bounds__(THREADS) few_weight_sums(const __grid_constant__ FewTask task, const float* g) {
  const Shape& s = task.shape;
  const Windows& v = task.windows;
  const int64_t window = blockIdx.x, outputs = (int64_t)s.K * s.F;
  const int slot = blockIdx.y / s.F, numbers = s.ksize * s.ksize * s.C, tile = blockIdx.x % task.tiles();
  if (slot >= v.counts[window]) return;
  const int top = tile / v.tiles_x * v.step_h + v.first, left = tile % v.tiles_x * v.step_w + v.first;
  const bool per_sample = task.choices > 1;
  const int pixels = v.rows * v.columns, samples = per_sample ? 1 : s.B, first = per_sample ? blockIdx.x / task.tiles() : 0;
  for (int number = warp_number(); number < numbers; number += WARPS) {
    const int tap = number / s.C, c = number % s.C;
    float sum = 0.f;
    for (int pair = lane_number(); pair < pixels * samples; pair += 32) {
      const int pixel = pair % pixels, sample = first + pair / pixels;
      const int h = top + pixel / v.columns, w = left + pixel % v.columns;
      const int from_h = h + tap / s.ksize - s.off, from_w = task.wrapped(w + tap % s.ksize - s.off, s.Wi);
      if (h >= s.Ho || w >= s.Wo || (unsigned)from_h >= (unsigned)s.Hi || (unsigned)from_w >= (unsigned)s.Wi) continue;
      const uint16_t* slots = v.slots + (window * pixels + pixel) * s.K;
      for (int k = 0; k < s.K; k++)
        if (slots[k] == slot)
          sum = fmaf(g[(((int64_t)sample * s.Ho + h) * s.Wo + w) * outputs + k * s.F + blockIdx.y % s.F],
                     task.in[(((int64_t)sample * s.Hi + from_h) * s.Wi + from_w) * s.C + c], sum);
    }
    sum = sum_over_warp(sum);
    if (lane_number() == 0) task.out[(window * v.cap * s.F + blockIdx.y) * numbers + number] = sum;
  }
}

// A row of dw: the sums of those windows that list its expert.
__global__ void __launch_bounds__(THREADS) few_weight_rows(const __grid_constant__ FewTask task, float* dw) {
  const Shape& s = task.shape;
  const Windows& v = task.windows;
  const int windows = task.choices * task.tiles(), numbers = s.ksize * s.ksize * s.C, expert = blockIdx.x / s.F;
  for (int number = warp_number(); number < numbers; number += WARPS) {
    float sum = 0.f;
    for (int64_t window = lane_number(); window < windows; window += 32) {
      const int count = v.counts[window];
      for (int slot = 0; slot < count; slot++)
        if (v.ids[window * v.cap + slot] == expert)
          sum += task.out[((window * v.cap + slot) * s.F + blockIdx.x % s.F) * numbers + number];
    }
    sum = sum_over_warp(sum);
    if (lane_number() == 0) dw[(int64_t)blockIdx.x * numbers + number] = sum;
  }
}

namespace {
int launch_outputs(void (*kernel)(FewTask), const FewTask& task, int64_t outputs, cudaStream_t stream) {
  const int64_t blocks = (outputs + THREADS - 1) / THREADS;
  const int groups = task.choices > 1 ? task.choices : (task.shape.B + TOGETHER - 1) / TOGETHER;
  if (blocks > INT32_MAX || groups > 65535) return UNSUPPORTED;
  if (blocks == 0 || groups == 0) return 0;
  kernel<<<dim3((unsigned)blocks, (unsigned)groups), THREADS, 0, stream>>>(task);
  return cudaGetLastError();
}
}  // namespace

int launch_few_forward(const float* x, const float* w, float* y, const Shape& s, const Windows& v, int choices,
                       cudaStream_t stream) {
  return launch_outputs(few_forward, {x, w, y, s, v, choices}, (int64_t)s.Ho * s.Wo * s.K * s.F, stream);
}

int launch_few_input_grad(const float* g, const float* w, float* dx, const Shape& s, const Windows& v, int choices,
                          cudaStream_t stream) {
  return launch_outputs(few_input_grad, {g, w, dx, s, v, choices}, (int64_t)s.Hi * s.Wi * s.C, stream);
}

int launch_few_weight_grad(const float* x, const float* g, float* dw, const Shape& s, const Windows& v, int choices,
                           float* workspace, cudaStream_t stream) {
  const FewTask task{x, nullptr, workspace, s, v, choices};
  const int64_t windows = (int64_t)choices * v.tiles_y * v.tiles_x, rows = (int64_t)s.N * s.F;
  if (windows > INT32_MAX || rows > INT32_MAX) return UNSUPPORTED;
  if (windows > 0) {
    few_weight_sums<<<dim3((unsigned)windows, (unsigned)(v.cap * s.F)), THREADS, 0, stream>>>(task, g);
    const cudaError_t status = cudaGetLastError();
    if (status != cudaSuccess) return status;
  }
  few_weight_rows<<<(unsigned)rows, THREADS, 0, stream>>>(task, dw);
  return cudaGetLastError();
}

}  // namespace smoe::portable
