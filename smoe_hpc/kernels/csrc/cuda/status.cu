// What a status that an entry point returned means.
#include <cuda_runtime.h>

extern "C" const char* smoe_error_string(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }
