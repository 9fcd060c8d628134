// The arithmetic of every operation, without torch, compiled twice: for any processor and for one with AVX2. `fast()` picks.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
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

namespace generic {
#include "simd.h"
#include "filter_sections.h"
#include "selective_scan.h"
#include "tokens.h"
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
}  // namespace avx2
#undef AVX2_REGION
#pragma GCC pop_options
#else
namespace avx2 = generic;
#endif

inline bool fast() {
  static const bool chosen = [] {
#ifdef HAS_AVX2
    const char* wanted = std::getenv("BERGER_KERNELS");
    const bool generic = wanted != nullptr && std::string_view(wanted) == "generic";
    return !generic && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return false;
#endif
  }();
  return chosen;
}

#define CALL(function, ...) (fast() ? avx2::function(__VA_ARGS__) : generic::function(__VA_ARGS__))
