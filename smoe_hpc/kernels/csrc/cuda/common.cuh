// What every kernel here agrees on: shapes, tiles, plans, error codes, and the copies that sm_80 and later have.
//
// Letters: B batch, C input channels, N experts, K selected, F filters per expert, S choices (1, or B where each sample
// has its own). Maps are channels last: x [B, Hi, Wi, C], y and g [B, Ho, Wo, K F]. Weights are packed [N F, taps, C].
#pragma once
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace smoe {

// A convolution with ksize x ksize taps. Output pixel (h, w) and tap (i, j) see input pixel (h + i - off, w + j - off);
// columns wrap if `wrap`, what lies outside is zero.
struct Shape {
  int B, C, Hi, Wi, Ho, Wo, N, K, F, ksize, off, wrap;
};

// What the pixels of each window select. Windows lie on a grid of tiles_y x tiles_x; window (ty, tx) has its first pixel at
// (ty * step_h + first, tx * step_w + first) and covers rows x columns pixels, those outside the map left out (or wrapped).
//   counts [S, T]           number of experts that any pixel of the window selects
//   ids    [S, T, cap]      their numbers
//   masks  [S, T, cap]      which sub-windows select them, a bit each (null for the forward windows)
//   slots  [S, T, rows * columns, K]  place in `ids` of each pixel's k-th selection; 0xffff outside the map
struct Windows {
  const int* counts;
  const int* ids;
  const uint16_t* masks;
  const uint16_t* slots;
  int tiles_y, tiles_x, step_h, step_w, first, rows, columns, cap;
};

// A tile is 128 rows of a matrix: rows x columns pixels times `batch` samples, the sample varying fastest.
struct Tile {
  int rows, columns, batch;
};

enum Type : int { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

// Every entry point returns 0, a cudaError_t, or one of these.
enum Status : int { UNSUPPORTED = -1 };

__device__ __forceinline__ uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// 16 bytes from global to shared memory; only the first `bytes` of them (0 or 16) are read, the rest is zero.
__device__ __forceinline__ void copy16(uint32_t to, const void* from, int bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes));
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// Four 8x8 matrices of 16-bit numbers; each lane gives the address of one 16-byte row.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

// Four 8x8 matrices of 16-bit numbers as the matrix unit leaves them, columns becoming rows; each lane gives the address of
// 16 bytes (sm_90).
__device__ __forceinline__ void store_matrices_transposed(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};"
               ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

// Barrier number `name` (1 to 15) among THREADS threads of the block.
template <int THREADS>
__device__ __forceinline__ void barrier_among(int name) {
  asm volatile("bar.sync %0, %1;" ::"r"(name), "n"(THREADS) : "memory");
}

}  // namespace smoe
