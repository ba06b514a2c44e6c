// The last pass over the gradient of a layer's output: which selections were correct, and damping of the wrong ones.
//
// Dimensions: B samples, K selected, F filters per expert, P pixels; a sample has K F P values.
#include "routing_loss.cuh"

namespace smoe {
namespace {

constexpr int SAMPLES_AHEAD = 4;  // samples of which a thread has loads under way
constexpr int MOST_GROUPS = 8;

// Either every value is a selection of its own (F = 1) and its error is formed here, in either order of memory, or errors
// [B, P, K] were formed before and memory is [B, P, K F].
template <typename T>
struct LabelAndDamp {
  const T* grad;              // [B, size]
  const T* factors;           // the same, multiplied with the gradient for the labels; or null
  const float* label_errors;  // null: form them
  const float* damp_errors;
  const float* divisor;          // of errors formed here, at each pixel (PixelWalk), or null
  const float* scale;            // see error_factor
  const float* label_quantiles;  // [B], null: no labels
  const float* damp_quantiles;   // [B], null: no damping
  float half_numel, tolerance, damping_tolerance, damping_factor;
  T* damped;      // [B, size] or null
  float* counts;  // correct selections, [size / F], or [B, size / F] if each sample's are wanted; or null
  int batch, filters, channels, each, per;
  bool channels_last;
  long long size;
};

// How an error comes about: from one value alone, from a value with factors or divisors, or formed before.
enum Errors { PLAIN, GENERAL, FORMED };

// A thread has V values that lie side by side and goes through the samples; the groups of a block share out the samples.
template <typename T, int V, Errors ERRORS>
__global__ void __launch_bounds__(32 * MOST_GROUPS, ERRORS == PLAIN ? 4 : 3) label_and_damp(LabelAndDamp<T> a) {
  __shared__ unsigned shared_counts[V][32];
  const int lane = threadIdx.x, group = threadIdx.y, groups = blockDim.y;
  const long long pack = blockIdx.x * 32ll + lane, at = pack * V;
  const bool inside = at < a.size;
  const bool add_up = a.counts && !a.each;
  let_later_start();
  wait_for_earlier();
  const float factor = error_factor(a.scale, a.half_numel);
  const float damping = as_float(from_float<T>(a.damping_factor));
  // Selection and filter of the first value, where a selection has several.
  long long first_selection = at;
  int first_filter = 0;
  if constexpr (ERRORS == FORMED) {
    const int channel = (int)(at % a.channels);
    first_selection = at / a.channels * (a.channels / a.filters) + channel / a.filters;
    first_filter = channel % a.filters;
  }
  Divisor divisors[V];
  if (ERRORS == GENERAL && a.divisor && inside) {
    PixelWalk walk((unsigned)at, a.per, a.channels_last);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      divisors[v] = Divisor(__ldg(a.divisor + walk.pixel()));
      walk.next();
    }
  }
  const long long selections = ERRORS == FORMED ? a.size / a.filters : a.size;
  unsigned counts[V] = {};
  if (inside) {
    for (int from = group; from < a.batch; from += SAMPLES_AHEAD * groups) {
      Pack<T, V> values[SAMPLES_AHEAD];
#pragma unroll
      for (int s = 0; s < SAMPLES_AHEAD; ++s)
        if (from + s * groups < a.batch) values[s] = load_pack<T, V>(a.grad + (from + s * groups) * a.size + at);
#pragma unroll
      for (int s = 0; s < SAMPLES_AHEAD; ++s) {
        const int sample = from + s * groups;
        if (sample >= a.batch) break;
        const float label_limit = a.label_quantiles ? __fadd_rn(a.label_quantiles[sample], a.tolerance) : 0.f;
        const float damp_limit = a.damp_quantiles ? __fadd_rn(a.damp_quantiles[sample], a.damping_tolerance) : 0.f;
        Pack<T, V> times;
        if (ERRORS == GENERAL && a.factors) times = load_pack<T, V>(a.factors + sample * a.size + at);
        long long selection = sample * selections + first_selection;
        int filter = first_filter;
        float label_error = 0.f, damp_error = 0.f;
        bool fresh = true;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          if constexpr (ERRORS == FORMED) {
            if (fresh) {
              if (a.label_quantiles) label_error = __ldg(a.label_errors + selection);
              damp_error = a.damp_errors == a.label_errors ? label_error
                           : a.damp_quantiles              ? __ldg(a.damp_errors + selection)
                                                           : 0.f;
            }
          } else {
            damp_error = __fmul_rn(fabsf(as_float(values[s].of[v])), factor);
            label_error = damp_error;
            if constexpr (ERRORS == GENERAL) {
              if (a.factors) label_error = __fmul_rn(fabsf(as_float(product(values[s].of[v], times.of[v]))), factor);
              if (a.divisor) {
                damp_error = divisors[v](damp_error);
                label_error = a.factors ? divisors[v](label_error) : damp_error;
              }
            }
          }
          const bool correct = label_error <= label_limit;
          if (ERRORS != FORMED || filter == 0) {
            counts[v] += correct;
            if (a.each && a.counts) a.counts[selection] = correct ? 1.f : 0.f;
          }
          // A product, so that what is not finite survives a factor of 0.
          if (damp_error > damp_limit) values[s].of[v] = from_float<T>(__fmul_rn(as_float(values[s].of[v]), damping));
          if constexpr (ERRORS == FORMED) {
            fresh = ++filter == a.filters;
            if (fresh) {
              filter = 0;
              ++selection;
            }
          } else {
            ++selection;
          }
        }
        if (a.damped) store_pack<T, V>(a.damped + sample * a.size + at, values[s]);
      }
    }
  }
  if (!add_up) return;
  if (groups > 1) {
    if (group == 0)
      for (int v = 0; v < V; ++v) shared_counts[v][lane] = 0;
    __syncthreads();
    for (int v = 0; v < V; ++v) atomicAdd(&shared_counts[v][lane], counts[v]);
    __syncthreads();
    if (group) return;
    for (int v = 0; v < V; ++v) counts[v] = shared_counts[v][lane];
  }
  if (!inside) return;
  if constexpr (ERRORS == FORMED) {
    long long selection = first_selection;
    int filter = first_filter;
    for (int v = 0; v < V; ++v) {
      if (filter == 0) a.counts[selection] = (float)counts[v];
      if (++filter == a.filters) {
        filter = 0;
        ++selection;
      }
    }
  } else if constexpr (V % 4 == 0) {
    for (int v = 0; v < V; v += 4)
      *reinterpret_cast<float4*>(a.counts + at + v) =
          make_float4((float)counts[v], (float)counts[v + 1], (float)counts[v + 2], (float)counts[v + 3]);
  } else {
    for (int v = 0; v < V; ++v) a.counts[at + v] = (float)counts[v];
  }
}

template <typename T>
int launch(const void* grad, const void* factors, const float* label_errors, const float* damp_errors, const float* divisor,
           int per, int channels_last, const float* scale, double half_numel, const float* label_quantiles, double tolerance,
           const float* damp_quantiles, double damping_tolerance, double damping_factor, void* damped, float* counts,
           int each, int batch, int filters, int channels, long long size, cudaStream_t stream) {
  LabelAndDamp<T> a;
  a.grad = (const T*)grad;
  a.factors = (const T*)factors;
  a.label_errors = label_errors;
  a.damp_errors = damp_errors;
  a.divisor = divisor;
  a.per = per;
  a.channels_last = channels_last != 0;
  a.scale = scale;
  a.half_numel = (float)half_numel;
  a.label_quantiles = label_quantiles;
  a.tolerance = (float)tolerance;
  a.damp_quantiles = damp_quantiles;
  a.damping_tolerance = (float)damping_tolerance;
  a.damping_factor = (float)damping_factor;
  a.damped = (T*)damped;
  a.counts = counts;
  a.each = each;
  a.batch = batch;
  a.filters = filters;
  a.channels = channels;
  a.size = size;
  const bool formed = label_errors || damp_errors;
  constexpr int WIDE = 16 / sizeof(T);
  const bool wide = size % WIDE == 0 && (!formed || channels % WIDE == 0) && aligned(grad, 16) && aligned(factors, 16) &&
                    aligned(damped, 16) && aligned(counts, 16);
  auto kernel = wide ? label_and_damp<T, WIDE, PLAIN> : label_and_damp<T, 1, PLAIN>;
  if (formed)
    kernel = wide ? label_and_damp<T, WIDE, FORMED> : label_and_damp<T, 1, FORMED>;
  else if (factors || divisor)
    kernel = wide ? label_and_damp<T, WIDE, GENERAL> : label_and_damp<T, 1, GENERAL>;
  int groups = 1;
  while (groups < MOST_GROUPS && groups * SAMPLES_AHEAD < batch) groups *= 2;
  const long long each_block = 32 * (wide ? WIDE : 1);
  return launch_early(kernel, (unsigned)((size + each_block - 1) / each_block), dim3(32, groups), 0, stream, a);
}

}  // namespace
}  // namespace smoe

// Which selections are correct, their number at each pixel, and the gradient with the wrong ones damped. See LabelAndDamp;
// errors that were formed before come for each use that there is, and then the divisor is no concern here.
extern "C" int smoe_label_and_damp(const void* grad, const void* factors, const float* label_errors, const float* damp_errors,
                                   const float* divisor, int per, int channels_last, const float* scale, double half_numel,
                                   int type, const float* label_quantiles, double tolerance, const float* damp_quantiles,
                                   double damping_tolerance, double damping_factor, void* damped, float* counts, int each,
                                   int batch, int filters, int channels, long long size, cudaStream_t stream) {
  using namespace smoe;
  if (batch < 1 || size < 1 || size >= 1ll << 31) return UNSUPPORTED;
  const auto run = type == FLOAT32 ? launch<float> : type == BFLOAT16 ? launch<__nv_bfloat16> : launch<__half>;
  return run(grad, factors, label_errors, damp_errors, divisor, per, channels_last, scale, half_numel, label_quantiles,
             tolerance, damp_quantiles, damping_tolerance, damping_factor, damped, counts, each, batch, filters, channels, size,
             stream);
}
