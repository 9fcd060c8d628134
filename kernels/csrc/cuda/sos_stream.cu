// Second-order sections with carried state, in block state-space form. The meaning is sos_stream in kernels/reference.py.
//
// Q samples of a channel and its 2S states, through one matrix (reference.sos_block), give Q samples and the states after them: a
// block of threads per channel, a row of the matrix per thread, so that time is parallel where there are fewer channels than lanes.
// Reads x and writes y once; the matrix, some kilobytes, stays in cache.

#include "launch.h"

template <typename T>
__global__ void filter_blocks(const T* x, T* y, double* state, int64_t channels, int64_t steps, const double* whole, int64_t q,
                              const double* rest, int64_t sections) {
  SHARED(v);  // the samples, then the states
  const int64_t c = blockIdx.x, row = threadIdx.x, states = 2 * sections;
  if (row < states) v[q + row] = state[row * channels + c];
  for (int64_t t = 0; t < steps; t += q) {
    const int64_t n = steps - t < q ? steps - t : q, width = n + states;
    const double* m = (n < q ? rest : whole) + row * width;
    if (row < n) v[row] = x[c * steps + t + row];
    __syncthreads();
    double sum = 0;
    if (row < width) {
      for (int64_t i = 0; i < n; i++) sum += m[i] * v[i];
      for (int64_t i = 0; i < states; i++) sum += m[n + i] * v[q + i];
    }
    __syncthreads();
    if (row < n) y[c * steps + t + row] = static_cast<T>(sum);
    else if (row < width) v[q + row - n] = sum;
  }
  __syncthreads();
  if (row < states) state[row * channels + c] = v[q + row];
}

extern "C" int berger_sos_stream(const void* x, void* y, double* state, int64_t channels, int64_t steps, const double* whole, int64_t q,
                                 const double* rest, int64_t sections, int64_t is_double, void* stream) {
  const int64_t rows = q + 2 * sections, bytes = rows * sizeof(double);
  if (is_double)
    LAUNCH(filter_blocks<double>, channels, rows, bytes, stream, static_cast<const double*>(x), static_cast<double*>(y), state, channels,
           steps, whole, q, rest, sections);
  else
    LAUNCH(filter_blocks<float>, channels, rows, bytes, stream, static_cast<const float*>(x), static_cast<float*>(y), state, channels,
           steps, whole, q, rest, sections);
  return FAILED();
}
