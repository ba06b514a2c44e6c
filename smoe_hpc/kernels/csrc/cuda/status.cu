// What a status that an entry point returned means, and whether a stream is being captured.
#include <cuda_runtime.h>

extern "C" const char* smoe_error_string(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

// The number of the capture that the stream takes part in, which no other one has; 0 if it is in none.
extern "C" int smoe_capture(unsigned long long* id, cudaStream_t stream) {
  cudaStreamCaptureStatus status;
  *id = 0;
  const cudaError_t error = cudaStreamGetCaptureInfo(stream, &status, id);
  if (error == cudaSuccess && status != cudaStreamCaptureStatusActive) *id = 0;
  return error;
}
