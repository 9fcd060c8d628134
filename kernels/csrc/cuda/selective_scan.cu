// Mamba's recurrence with a rate per channel. The meaning is selective_scan in kernels/reference.py.
//
// A block of threads per row, a channel per thread, its states in registers: u and fade are read once and y is written once. Backwards
// a first pass runs the states again for the gradient of c, a second one theirs against time; sums over channels are made in
// shared memory in a fixed order, so that a gradient is the same every time. The fade's gradient is a running sum (see
// selective_scan.h), in double so that it stays exact over long rows.

#include "launch.h"

constexpr int THREADS = 64;

template <typename T>
__device__ T keep(T fade) { return exp(-(fade > T(4) ? T(4) : fade)); }

struct Sizes {
  int64_t steps, channels, states, ahead;
};

template <typename T, int MOST>
__global__ void scan(const T* u, const T* fade, const T* b, const T* c, T* y, Sizes n) {
  SHARED(memory);  // b and c of a step
  T* of_step = reinterpret_cast<T*>(memory);
  const int64_t row = blockIdx.x, S = n.states, E = n.channels;
  for (int64_t first = 0; first < E; first += THREADS) {
    const int64_t e = first + threadIdx.x;
    const bool back = e >= n.ahead;
    T h[MOST] = {};
    for (int64_t i = 0; i < n.steps; i++) {
      // channels of both directions may share a block, so it holds the steps of both
      const int64_t t = row * n.steps + i, turned = row * n.steps + n.steps - 1 - i;
      __syncthreads();
      for (int64_t s = threadIdx.x; s < S; s += THREADS) {
        of_step[s] = b[t * S + s], of_step[S + s] = c[t * S + s];
        of_step[2 * S + s] = b[turned * S + s], of_step[3 * S + s] = c[turned * S + s];
      }
      __syncthreads();
      if (e < E) {
        const int64_t at = (back ? turned : t) * E + e;
        const T *b_S = of_step + (back ? 2 * S : 0), *c_S = b_S + S, kept = keep(fade[at]), x = u[at];
        T sum = 0;
#pragma unroll
        for (int s = 0; s < MOST; s++)
          if (s < S) h[s] = kept * h[s] + b_S[s] * x, sum += c_S[s] * h[s];
        y[at] = sum;
      }
    }
  }
}

// sum over the block's channels of what each thread holds per state, added to `to`
template <typename T, int MOST>
__device__ void add_over_channels(const T* value, T* scratch, T* to, int64_t S) {
  __syncthreads();
#pragma unroll
  for (int s = 0; s < MOST; s++)
    if (s < S) scratch[s * (THREADS + 1) + threadIdx.x] = value[s];
  __syncthreads();
  for (int64_t s = threadIdx.x; s < S; s += THREADS) {
    T sum = 0;
    for (int e = 0; e < THREADS; e++) sum += scratch[s * (THREADS + 1) + e];
    to[s] += sum;
  }
}

template <typename T, int MOST>
__global__ void scan_backward(const T* g, const T* u, const T* fade, const T* b, const T* c, const T* y, T* gu, T* gfade, T* gb, T* gc,
                              Sizes n) {
  SHARED(memory);
  T* scratch = reinterpret_cast<T*>(memory);
  const int64_t row = blockIdx.x, S = n.states, E = n.channels, L = n.steps;
  for (int back = 0; back < 2; back++) {
    const int64_t end = back ? E : n.ahead;
    for (int64_t first = back ? n.ahead : 0; first < end; first += THREADS) {
      const int64_t e = first + threadIdx.x;
      const bool here = e < end;
      T h[MOST] = {}, part[MOST];
      for (int64_t i = 0; i < L; i++) {
        const int64_t t = row * L + (back ? L - 1 - i : i), at = t * E + e;
        const T kept = here ? keep(fade[at]) : T(0), x = here ? u[at] : T(0), g_y = here ? g[at] : T(0);
#pragma unroll
        for (int s = 0; s < MOST; s++)
          if (s < S) h[s] = kept * h[s] + b[t * S + s] * x, part[s] = h[s] * g_y;
        add_over_channels<T, MOST>(part, scratch, gc + t * S, S);
      }
#pragma unroll
      for (int s = 0; s < MOST; s++) h[s] = 0;  // now the gradient of the state, before it fades into the step after
      double g_age = 0;
      for (int64_t i = L - 1; i >= 0; i--) {
        const int64_t t = row * L + (back ? L - 1 - i : i), at = t * E + e;
        const T f = here ? fade[at] : T(0), x = here ? u[at] : T(0), g_y = here ? g[at] : T(0), y_t = here ? y[at] : T(0), kept = keep(f);
        T g_u = 0;
#pragma unroll
        for (int s = 0; s < MOST; s++)
          if (s < S) {
            h[s] += c[t * S + s] * g_y;
            g_u += b[t * S + s] * h[s];
            part[s] = h[s] * x;
            h[s] *= kept;
          }
        add_over_channels<T, MOST>(part, scratch, gb + t * S, S);
        g_age += static_cast<double>(g_u) * x - static_cast<double>(g_y) * y_t;
        if (here) gu[at] = g_u, gfade[at] = f > T(4) ? T(0) : static_cast<T>(g_age);
      }
    }
  }
}

template <typename T, int MOST>
int forward(const T* u, const T* fade, const T* b, const T* c, T* y, int64_t rows, Sizes n, void* stream) {
  LAUNCH((scan<T, MOST>), rows, THREADS, 4 * n.states * sizeof(T), stream, u, fade, b, c, y, n);
  return FAILED();
}
template <typename T, int MOST>
int backward(const T* g, const T* u, const T* fade, const T* b, const T* c, const T* y, T* gu, T* gfade, T* gb, T* gc, int64_t rows,
             Sizes n, void* stream) {
  LAUNCH((scan_backward<T, MOST>), rows, THREADS, n.states * (THREADS + 1) * sizeof(T), stream, g, u, fade, b, c, y, gu, gfade, gb, gc, n);
  return FAILED();
}

// All contiguous; gb and gc start as zeros; at most 64 states.
#define C_NAMES(T, name)                                                                                                          \
  extern "C" int berger_scan_##name(const T* u, const T* fade, const T* b, const T* c, T* y, int64_t rows, int64_t steps,         \
                                    int64_t channels, int64_t states, int64_t ahead, void* stream) {                              \
    const auto run = states <= 16 ? forward<T, 16> : forward<T, 64>;                                                              \
    return run(u, fade, b, c, y, rows, Sizes{steps, channels, states, ahead}, stream);                                            \
  }                                                                                                                               \
  extern "C" int berger_scan_backward_##name(const T* g, const T* u, const T* fade, const T* b, const T* c, const T* y, T* gu,    \
                                             T* gfade, T* gb, T* gc, int64_t rows, int64_t steps, int64_t channels,               \
                                             int64_t states, int64_t ahead, void* stream) {                                       \
    const auto run = states <= 16 ? backward<T, 16> : backward<T, 64>;                                                            \
    return run(g, u, fade, b, c, y, gu, gfade, gb, gc, rows, Sizes{steps, channels, states, ahead}, stream);                      \
  }
C_NAMES(float, float)
C_NAMES(double, double)
