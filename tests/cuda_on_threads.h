// Enough of CUDA to run kernels/csrc/cuda on a CPU: a thread for each thread of a block, blocks one after the other.

#pragma once
#include <barrier>
#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>

#define __global__ static
#define __device__ static inline
struct Index {
  int64_t x = 0;
};
inline thread_local Index threadIdx, blockIdx;
inline thread_local std::barrier<>* sync_point;
inline thread_local double* shared_memory;
inline void __syncthreads() { sync_point->arrive_and_wait(); }

template <typename Work>
void launch(int64_t blocks, int64_t threads, int64_t bytes, const Work& work) {
  for (int64_t block = 0; block < blocks; block++) {
    std::barrier<> barrier(threads);
    std::vector<double> memory(bytes / sizeof(double) + 1);
    std::vector<std::jthread> running;
    for (int64_t i = 0; i < threads; i++)
      running.emplace_back([&, i] {
        threadIdx.x = i, blockIdx.x = block, sync_point = &barrier, shared_memory = memory.data();
        work();
      });
  }
}
#define LAUNCH(kernel, blocks, threads, bytes, stream, ...) (void)(stream), launch(blocks, threads, bytes, [&] { kernel(__VA_ARGS__); })
#define SHARED(name) double* name = shared_memory
#define FAILED() 0
