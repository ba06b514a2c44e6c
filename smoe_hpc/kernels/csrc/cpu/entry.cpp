// Entry points of the CPU kernels: indices are checked and laid out by pixel, then one of two ways is taken.
#include "common.h"

namespace smoe {

std::atomic<Parallel> run_parallel{nullptr};

// The filters [S, P, K F] of the experts [S, K, P] that each pixel selected.
static Status lay_out(const Problem& p, const int64_t* indices, int32_t* filters) {
  const int64_t strip = 64, strips = ceil_div(p.pixels(), strip), outputs = p.outputs();
  std::atomic<bool> outside{false};
  const bool ran = parallel(p.S * strips, p.threads, 0, [&](int64_t item, char*) {
    const int64_t s = item / strips, first = item % strips * strip, last = smaller(first + strip, p.pixels());
    bool bad = false;
    for (int64_t n = 0; n < p.K; n++) {
      const int64_t* from = indices + (s * p.K + n) * p.pixels();
      int32_t* to = filters + s * p.pixels() * outputs + n * p.F;
      for (int64_t pixel = first; pixel < last; pixel++) {
        bad |= (uint64_t)from[pixel] >= (uint64_t)p.N;
        for (int64_t f = 0; f < p.F; f++) to[pixel * outputs + f] = (int32_t)(from[pixel] * p.F + f);
      }
    }
    if (bad) outside = true;
  });
  return !ran ? NO_MEMORY : outside ? OUT_OF_RANGE : DONE;
}

template <class T>
static Status forward(const Problem& p, Map<const T> x, const T* weight, Map<T> y) {
  return few_channels(p) ? forward_by_columns<T>(p, x, weight, y) : forward_by_channels<T>(p, x, weight, y);
}

template <class T>
static Status backward(const Problem& p, Map<const T> g, Map<const T> x, const T* weight, Map<T> dx, T* dw) {
  return few_channels(p) ? backward_by_columns<T>(p, g, x, weight, dx, dw) : backward_by_channels<T>(p, g, x, weight, dx, dw);
}

}  // namespace smoe

using smoe::Map;

// What to run threads with: GOMP_parallel, or null for one thread.
extern "C" void smoe_cpu_use_threads(smoe::Parallel parallel) { smoe::run_parallel = parallel; }

#define SIZES                                                                                                             \
  int is_double, int threads, int64_t B, int64_t C, int64_t H, int64_t W, int64_t N, int64_t K, int64_t F, int64_t k,     \
      int64_t S, int padding, const int64_t *indices
#define MAP(name) void *name, int64_t name##_sample, int64_t name##_channel, int64_t name##_row, int64_t name##_column
#define AS_MAP(type, name) {(type*)name, name##_sample, name##_channel, name##_row, name##_column}

// Sizes become a problem; little work is left to one thread, which costs less than waking others.
#define MAKE_PROBLEM                                                                        \
  const int helpers = B * H * W * K * F * C * k * k < 200000 ? 1 : threads;                \
  smoe::Memory<int32_t> filters(S * H * W * K * F);                                         \
  if (!filters.data) return smoe::NO_MEMORY;                                                \
  const smoe::Problem p{B, C, H, W, N, K, F, k, S, padding, helpers, filters.data};         \
  if (const smoe::Status status = smoe::lay_out(p, indices, filters.data)) return status;

extern "C" int smoe_cpu_forward(SIZES, MAP(x), const void* weight, MAP(y)) {
  MAKE_PROBLEM
  if (is_double) return smoe::forward<double>(p, AS_MAP(const double, x), (const double*)weight, AS_MAP(double, y));
  return smoe::forward<float>(p, AS_MAP(const float, x), (const float*)weight, AS_MAP(float, y));
}

// dx and dw may be null.
extern "C" int smoe_cpu_backward(SIZES, MAP(g), MAP(x), const void* weight, MAP(dx), void* dw) {
  MAKE_PROBLEM
  if (is_double)
    return smoe::backward<double>(p, AS_MAP(const double, g), AS_MAP(const double, x), (const double*)weight,
                                  AS_MAP(double, dx), (double*)dw);
  return smoe::backward<float>(p, AS_MAP(const float, g), AS_MAP(const float, x), (const float*)weight, AS_MAP(float, dx),
                               (float*)dw);
}
