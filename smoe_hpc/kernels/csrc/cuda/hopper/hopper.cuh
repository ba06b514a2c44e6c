// Hopper's own instructions (sm_90a): barriers in shared memory and matrix products of a warpgroup.
#pragma once
#include "common.cuh"

namespace smoe {

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
// After the inits and before __syncthreads: the matrix unit and the copies see them too.
__device__ __forceinline__ void barriers_visible() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives once all copies that this thread has started are in shared memory; counts as one of the expected arrivals.
__device__ __forceinline__ void barrier_arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred p;\nWAIT: mbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n@p bra DONE;\nbra WAIT;\nDONE:\n}"
      ::"r"(barrier), "r"(parity)
      : "memory");
}
// Ordinary (or cp.async) writes to shared memory become visible to the matrix unit.
__device__ __forceinline__ void fence_for_matrix_unit() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Descriptor of an operand in shared memory, 128-byte swizzle: rows of 128 bytes, in groups of 8 (1024 bytes, aligned),
// 16-byte piece p of row r stored at piece p ^ (r % 8). `group_stride`: bytes from one group of 8 rows to the next.
__device__ __forceinline__ uint64_t descriptor(uint32_t address, uint32_t leading_stride, uint32_t group_stride) {
  return (uint64_t)((address & 0x3ffff) >> 4) | (uint64_t)(leading_stride >> 4) << 16 | (uint64_t)(group_stride >> 4) << 32 |
         (uint64_t)1 << 62;
}
__device__ __forceinline__ void matrix_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void matrix_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void matrix_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
template <int REGISTERS>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

}  // namespace smoe
