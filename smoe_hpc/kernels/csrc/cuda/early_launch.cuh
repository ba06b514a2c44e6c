// Kernels that start before the one ahead of them in the stream is done, where the device can (sm_90 and later): what they do
// before they read or write global memory then costs nothing.
#pragma once
#include "common.cuh"

namespace smoe {

// To be called by every thread before it touches global memory: waits until the kernels ahead are done.
__device__ __forceinline__ void wait_for_earlier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the kernel that follows start as soon as all blocks of this one have. Pays where a short kernel follows; not before
// kernels that fill the multiprocessors, whose waiting blocks are in the way.
__device__ __forceinline__ void let_later_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Launches a kernel that calls wait_for_earlier.
template <typename... Parameters, typename... Arguments>
int launch_early(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, int shared_bytes, cudaStream_t stream,
                 const Arguments&... arguments) {
  int device = 0, major = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks, config.blockDim = threads, config.dynamicSmemBytes = shared_bytes, config.stream = stream;
  config.attrs = &early, config.numAttrs = major >= 9;
  status = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  const cudaError_t last = cudaGetLastError();
  return status == cudaSuccess ? last : status;
}

}  // namespace smoe
