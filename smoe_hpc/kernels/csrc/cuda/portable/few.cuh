// Layers of so few channels that a tile's product would be mostly padding: a thread an output. float32 alone.
#pragma once
#include "portable.cuh"

namespace smoe::portable {

// Of up to 4 channels, or 8 (channels that were padded) where the outputs are few too.
inline bool is_few(const Shape& s) { return s.ksize <= 7 && (s.C <= 4 || (s.C <= 8 && s.K * s.F <= 8)); }

// The weight gradient goes over a region's pixels for each of its columns: of few columns only.
constexpr int FEW_COLUMNS = 64, FEW_SELECTED = 8;

// Bytes of workspace for the weight gradient, 0 where this form does not do it.
inline int64_t few_weight_grad_bytes(const Shape& s, const Windows& v, int64_t windows) {
  const int64_t columns = (int64_t)v.cap * s.F, bytes = windows * columns * s.ksize * s.ksize * s.C * 4;
  return is_few(s) && s.K <= FEW_SELECTED && columns <= FEW_COLUMNS && bytes <= 16 << 20 ? bytes : 0;
}

int launch_few_forward(const float* x, const float* w, float* y, const Shape& s, const Windows& v, int choices,
                       cudaStream_t stream);
int launch_few_input_grad(const float* g, const float* w, float* dx, const Shape& s, const Windows& v, int choices,
                          cudaStream_t stream);
int launch_few_weight_grad(const float* x, const float* g, float* dw, const Shape& s, const Windows& v, int choices,
                           float* workspace, cudaStream_t stream);

}  // namespace smoe::portable
