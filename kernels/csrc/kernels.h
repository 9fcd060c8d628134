// The arithmetic of every operation, without torch, compiled for any processor and with AVX2, attention also with AVX-512's products of
// bfloat16. `processor()` picks.

#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__) && !defined(__clang__)  // clang has no such pragma: there the first one runs
#include <immintrin.h>
#define HAS_AVX2
#endif
#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

constexpr int64_t MOST_SECTIONS = 64;  // of one filter

struct LiveSignal {  // what stays from chunk to chunk of a stream (kernels/plain.py fills it)
  int64_t announced, channels, sections;
  const int64_t* taken;  // none: all
  const double* sos;
  double *state, *last;  // last: the newest sample before the filter
  double factor, limit;
};
struct LiveWindow {  // how a window is made of filtered samples
  int64_t channels, wanted;
  const int64_t* row;  // of each wanted channel; below 0: a zero one; none: all as they are
  int64_t reference;  // a row, or MEAN or NONE
  double factor;
};
constexpr int64_t MEAN_OF_ALL = -1, NO_REFERENCE = -2;
struct ScanSizes {
  int64_t steps, channels, states, ahead;  // the first `ahead` channels run forwards
};
template <typename T>
struct ScanRow {
  const T *u, *fade, *b, *c;
  int64_t u_step, fade_step, b_step, c_step;
};
template <typename T>
struct ScanCall {
  ScanSizes sizes;
  ScanRow<T> first;
  int64_t u_row, fade_row, b_row, c_row;
  T* y;  // y, gu and gfade are rows x steps x channels; gb and gc rows x steps x states
  const T* g = nullptr;
  int64_t g_row = 0, g_step = 0;
  T *gu = nullptr, *gfade = nullptr, *gb = nullptr, *gc = nullptr;

  int64_t values() const { return sizes.steps * sizes.channels; }
  ScanRow<T> row(int64_t r) const {
    ScanRow<T> at = first;
    at.u += r * u_row, at.fade += r * fade_row, at.b += r * b_row, at.c += r * c_row;
    return at;
  }
};
template <typename X, typename C, typename Z>
struct TokenCall {
  const X* x;
  int64_t x_window, x_row;
  const C *space, *time;
  const int64_t* ids;
  Z* z;
  int64_t tokens, channels, patches, width;
  bool taken;
};

template <typename T, typename A>
struct AttendCall {  // T: of the tensors, uint16_t for bfloat16; A: of the arithmetic
  struct Rows {
    T* x;  // heads x rows x width of each window
    int64_t window, head, row;
    T* at(int64_t b, int64_t h, int64_t i) const { return x + b * window + h * head + i * row; }
  };
  int64_t heads, queries, keys, width;
  Rows q, k, v, y;
  const bool* real;  // windows x keys; none: all of them
  A* level;          // windows x heads x queries: the logarithm of each softmax's denominator
  Rows g = {}, gq = {}, gk = {}, gv = {};
};

namespace generic {
#include "simd.h"
#include "filter_sections.h"
#include "selective_scan.h"
#include "tokens.h"
#include "attention.h"
}  // namespace generic

#ifdef HAS_AVX2
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define AVX2_REGION
namespace avx2 {
#include "simd.h"
#include "filter_sections.h"
#include "selective_scan.h"
#include "tokens.h"
#include "attention.h"
}  // namespace avx2
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#define AVX512_REGION
namespace avx512 {
using namespace avx2;  // wider vectors gain nothing elsewhere
#include "simd.h"
#include "attention.h"
}  // namespace avx512
#undef AVX512_REGION
#undef AVX2_REGION
#pragma GCC pop_options
#else
namespace avx2 = generic;
namespace avx512 = generic;
#endif

enum class Processor { generic, avx2, avx512 };
constexpr const char* PROCESSORS[] = {"generic", "avx2", "avx512"};

inline Processor processor() {
  static const Processor chosen = [] {
#ifdef HAS_AVX2
    const char* wanted = std::getenv("BERGER_KERNELS");
    const auto at_most = [&](std::string_view name) { return wanted != nullptr && wanted == name; };
    if (at_most("generic") || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Processor::generic;
    if (at_most("avx2")) return Processor::avx2;
    for (const bool has : {__builtin_cpu_supports("avx512f"), __builtin_cpu_supports("avx512bw"), __builtin_cpu_supports("avx512dq"),
                           __builtin_cpu_supports("avx512vl"), __builtin_cpu_supports("avx512bf16")})
      if (!has) return Processor::avx2;
    return Processor::avx512;
#else
    return Processor::generic;
#endif
  }();
  return chosen;
}

#define CALL(function, ...)                                                \
  (processor() == Processor::avx512 ? avx512::function(__VA_ARGS__)        \
   : processor() == Processor::avx2 ? avx2::function(__VA_ARGS__)          \
                                    : generic::function(__VA_ARGS__))
