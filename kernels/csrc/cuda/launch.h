// How a kernel is launched and gets its shared memory. Without nvcc, tests/cuda_on_threads.h stands in: a CPU thread per CUDA thread.

#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define LAUNCH(kernel, blocks, threads, bytes, stream, ...) kernel<<<blocks, threads, bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define SHARED(name) extern __shared__ double name[]
#define FAILED() (static_cast<int>(cudaGetLastError()))
#endif
