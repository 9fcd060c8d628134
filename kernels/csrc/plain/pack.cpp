// The loops of the builder for NumPy arrays (kernels/pack.py): pack.h with C names, and the CRC-32.

#include "../kernels.h"

#include <cstring>

namespace generic {
#include "../pack.h"
}  // namespace generic
#ifdef HAS_AVX2
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#include "../pack.h"
}  // namespace avx2
#pragma GCC pop_options
#endif

#ifdef HAS_AVX2
// Sixteen bytes with the remainder of `bytes` (a multiple of 64) after the register `crc`: Gopal et al. 2009, "Fast CRC computation for
// generic polynomials using PCLMULQDQ instruction", without its last reduction.
#define CARRYLESS __attribute__((target("pclmul,sse4.1")))
CARRYLESS static inline __m128i fold(__m128i v, __m128i by, __m128i next) {
  return _mm_xor_si128(_mm_xor_si128(_mm_clmulepi64_si128(v, by, 0x00), _mm_clmulepi64_si128(v, by, 0x11)), next);
}
CARRYLESS static void remainder_of(const uint8_t* x, int64_t bytes, uint32_t crc, uint8_t* remainder) {
  const auto* from = reinterpret_cast<const __m128i*>(x);
  const __m128i by512 = _mm_set_epi64x(0x1c6e41596, 0x154442bd4), by128 = _mm_set_epi64x(0x0ccaa009e, 0x1751997d0);
  __m128i v[4];
  for (int i = 0; i < 4; i++) v[i] = _mm_loadu_si128(from + i);
  v[0] = _mm_xor_si128(v[0], _mm_cvtsi32_si128(static_cast<int>(crc)));
  for (int64_t n = 4; n < bytes / 16; n += 4)
    for (int i = 0; i < 4; i++) v[i] = fold(v[i], by512, _mm_loadu_si128(from + n + i));
  for (int i = 1; i < 4; i++) v[0] = fold(v[0], by128, v[i]);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(remainder), v[0]);
}
#endif

extern "C" {

void berger_decode(const uint8_t* block, int64_t records, int64_t record_bytes, int64_t sample_bytes, int64_t channels,
                   const int64_t* offset, int64_t samples, const float* gain, const float* bias, int64_t row, float* x) {
  CALL(decode, block, records, record_bytes, sample_bytes, channels, offset, samples, gain, bias, row, x);
}

void berger_halve(const float* x, int64_t channels, int64_t samples, int64_t row, int64_t left, int64_t points, const float* offset,
                  const float* taps, int64_t count, float* y) {
  CALL(halve, x, channels, samples, row, left, points, offset, taps, count, y);
}

void berger_interpolate(const float* x, int64_t channels, int64_t points, int64_t period, int64_t first, int64_t outputs,
                        const float* polynomials, int64_t degree, float* y) {
  CALL(interpolate, x, channels, points, period, first, outputs, polynomials, degree, y);
}

void berger_order_statistics(const float* x, int64_t channels, int64_t samples, int64_t row, const int64_t* rank, int64_t ranks, float* y) {
  CALL(order_statistics, x, channels, samples, row, rank, ranks, y);
}

void berger_pack(const float* y, int64_t channels, int64_t outputs, int64_t row, const float* offset, const float* scale, uint16_t* z) {
  CALL(pack, y, channels, outputs, row, offset, scale, z);
}

// false where the processor has no carry-less multiplication
int64_t berger_crc_remainder(const uint8_t* x, int64_t bytes, int64_t crc, uint8_t* remainder) {
#ifdef HAS_AVX2
  if (__builtin_cpu_supports("pclmul")) {
    remainder_of(x, bytes, static_cast<uint32_t>(crc), remainder);
    return 1;
  }
#endif
  return 0;
}

}  // extern "C"
