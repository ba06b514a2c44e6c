// The errors of selections with several filters each, and the sum of all errors at each pixel.
//
// Dimensions: B samples, K selected, F filters per expert, P pixels.
#include "routing_loss.cuh"

namespace smoe {
namespace {

constexpr int THREADS = 256;

template <typename T>
struct ErrorSource {
  const T* grad;         // [B, P, K F]
  const T* factors;      // the same or null
  const float* scale;    // see error_factor
  const float* divisor;  // [P] or null
  float half_numel;
  int batch, selected, filters;
  long long pixels;
};

// errors [B, P, K] (or null) and their sum over batch and selections, before the division: sums [P] (or null). A warp has a
// pixel, its lanes share out the selections of all samples, PER of them in a pack of V values at a time (or one in several
// packs), and add up in a fixed order.
template <typename T, int V, int PER>
__global__ void __launch_bounds__(THREADS) form_errors(ErrorSource<T> from, float* errors, float* sums) {
  const long long pixel = (blockIdx.x * (long long)THREADS + threadIdx.x) / 32;
  const int lane = threadIdx.x & 31;
  if (pixel >= from.pixels) return;
  const float factor = error_factor(from.scale, from.half_numel);
  const float divisor = from.divisor ? from.divisor[pixel] : 1.f;
  const unsigned units = from.selected / PER, all = from.batch * units;
  const float filters = (float)from.filters;
  float sum = 0.f;
#pragma unroll 4
  for (unsigned i = lane; i < all; i += 32) {
    const unsigned sample = i / units;
    const long long place = ((long long)sample * from.pixels + pixel) * from.selected + (i % units) * PER;
    float error[PER] = {};
    for (int f = 0; f < from.filters * PER; f += V) {
      Pack<T, V> values = load_pack<T, V>(from.grad + place * from.filters + f);
      if (from.factors) {
        const Pack<T, V> times = load_pack<T, V>(from.factors + place * from.filters + f);
#pragma unroll
        for (int v = 0; v < V; ++v) values.of[v] = product(values.of[v], times.of[v]);
      }
#pragma unroll
      for (int v = 0; v < V; ++v) error[v * PER / V] += fabsf(as_float(values.of[v]));
      if constexpr (PER > 1) break;  // one pack holds them all
    }
#pragma unroll
    for (int e = 0; e < PER; ++e) {
      error[e] = __fmul_rn(__fdiv_rn(error[e], filters), factor);
      sum += error[e];
      if (errors) errors[place + e] = from.divisor ? __fdiv_rn(error[e], divisor) : error[e];
    }
  }
  if (!sums) return;
  for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(~0u, sum, step);
  if (lane == 0) sums[pixel] = sum;
}

template <typename T>
int launch_errors(const void* grad, const void* factors, const float* scale, const float* divisor, double half_numel,
                  int batch, int selected, int filters, long long pixels, float* errors, float* sums, cudaStream_t stream) {
  const ErrorSource<T> from = {(const T*)grad, (const T*)factors, scale,   divisor, (float)half_numel,
                               batch,          selected,          filters, pixels};
  const unsigned blocks = (unsigned)((pixels * 32 + THREADS - 1) / THREADS);
  constexpr int WIDE = 16 / sizeof(T);
  const auto fits = [&](int width) { return aligned(grad, width * sizeof(T)) && aligned(factors, width * sizeof(T)); };
  auto kernel = form_errors<T, 1, 1>;
  if (filters % WIDE == 0 && fits(WIDE))
    kernel = form_errors<T, WIDE, 1>;
  else if (filters == 1 && selected % WIDE == 0 && fits(WIDE))
    kernel = form_errors<T, WIDE, WIDE>;
  else if (filters == 2 && selected % (WIDE / 2) == 0 && fits(WIDE))
    kernel = form_errors<T, WIDE, WIDE / 2>;
  else if (filters % 4 == 0 && fits(4))
    kernel = form_errors<T, 4, 1>;
  else if (filters % 2 == 0 && fits(2))
    kernel = form_errors<T, 2, 1>;
  kernel<<<blocks, THREADS, 0, stream>>>(from, errors, sums);
  return cudaGetLastError();
}

}  // namespace
}  // namespace smoe

// Errors [B, P, K] of a gradient [B, P, K F]: the mean over F of |grad (times factors)| half_numel / scale, divided by the
// divisor [P]; and sums [P] over batch and selections of the errors before that division. Each of the outputs may be null.
extern "C" int smoe_selection_errors(const void* grad, const void* factors, const float* scale, const float* divisor,
                                     double half_numel, int type, int batch, int selected, int filters, long long pixels,
                                     float* errors, float* sums, cudaStream_t stream) {
  using namespace smoe;
  if (batch < 1 || pixels < 1 || pixels >= 1ll << 31 || (long long)batch * selected >= 1ll << 31) return UNSUPPORTED;
  const auto run =
      type == FLOAT32 ? launch_errors<float> : type == BFLOAT16 ? launch_errors<__nv_bfloat16> : launch_errors<__half>;
  return run(grad, factors, scale, divisor, half_numel, batch, selected, filters, pixels, errors, sums, stream);
}
