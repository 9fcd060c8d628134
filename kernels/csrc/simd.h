// Vectors in the width of the instruction set that the including region is compiled for: this file is included once per region.
//
//   namespace generic { #include "x.h" }
//   #pragma GCC push_options
//   #pragma GCC target("avx2,fma")
//   namespace avx2 { #include "x.h" }
//   #pragma GCC pop_options
//
// so that one binary has all, and runs on processors that have only the first.

#if defined(AVX512_REGION)
constexpr int BYTES = 64;
#elif defined(AVX2_REGION)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif

template <typename T>
struct Vector {
  typedef T type __attribute__((vector_size(BYTES)));
  typedef T loose __attribute__((vector_size(BYTES), aligned(sizeof(T)), may_alias));  // at any address
};
template <typename T>
using vec = typename Vector<T>::type;
template <typename T>
constexpr int64_t LANES_OF = BYTES / sizeof(T);

template <typename T>
INLINE vec<T> load(const T* x) { return *reinterpret_cast<const typename Vector<T>::loose*>(x); }
template <typename T>
INLINE void store(vec<T> v, T* y) { *reinterpret_cast<typename Vector<T>::loose*>(y) = v; }
template <typename T>
INLINE vec<T> all(T x) { return x - vec<T>{}; }  // -0 stays -0
template <typename T>
INLINE T one(const T* x) {  // of whatever type it was written as
  T value;
  std::memcpy(&value, x, sizeof(T));
  return value;
}

// the first n < LANES_OF values, zeros beyond
template <typename T>
INLINE vec<T> load_some(const T* x, int64_t n) {
  T some[LANES_OF<T>] = {};
  for (int64_t i = 0; i < n; i++) some[i] = x[i];
  return load(some);
}
template <typename T>
INLINE void store_some(vec<T> v, T* y, int64_t n) {
  T some[LANES_OF<T>];
  store(v, some);
  for (int64_t i = 0; i < n; i++) y[i] = some[i];
}

#if defined(AVX512_REGION)
INLINE vec<float> fma(vec<float> a, vec<float> b, vec<float> c) { return vec<float>(_mm512_fmadd_ps(a, b, c)); }
INLINE vec<double> fma(vec<double> a, vec<double> b, vec<double> c) { return vec<double>(_mm512_fmadd_pd(a, b, c)); }
#elif defined(AVX2_REGION)
INLINE vec<float> fma(vec<float> a, vec<float> b, vec<float> c) { return vec<float>(_mm256_fmadd_ps(a, b, c)); }
INLINE vec<double> fma(vec<double> a, vec<double> b, vec<double> c) { return vec<double>(_mm256_fmadd_pd(a, b, c)); }
#else
template <typename T>
INLINE T fma(T a, T b, T c) { return a * b + c; }
#endif

INLINE float sum(vec<float> v) {
#if defined(AVX512_REGION)
  return _mm512_reduce_add_ps(v);
#elif defined(AVX2_REGION)
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}
INLINE double sum(vec<double> v) {
  double s = 0;
  for (int i = 0; i < LANES_OF<double>; i++) s += v[i];
  return s;
}

// exp(-x) for 0 <= x < 87, to 2 units of the last place (the polynomial of Cephes' expf, odd signs turned); NaN stays NaN
INLINE vec<float> decayed(vec<float> x) {
  typedef int32_t ints __attribute__((vector_size(BYTES)));
  const vec<float> magic = all(12582912.0f);  // 1.5 x 2^23: adding it rounds to an integer, held in the low bits
  const vec<float> shifted = fma(x, all(-1.44269504f), magic), n = shifted - magic;
  const vec<float> r = fma(n, all(-2.12194440e-4f), fma(n, all(0.693359375f), x));
  vec<float> p = fma(r, all(1.9875691500e-4f), all(-1.3981999507e-3f));
  p = fma(p, r, all(8.3334519073e-3f));
  p = fma(p, r, all(-4.1665795894e-2f));
  p = fma(p, r, all(1.6666665459e-1f));
  p = fma(p, r, all(-5.0000001201e-1f));
  p = 1.0f - fma(p, r * r, r);
  return p * vec<float>(((ints)shifted + 127) << 23);
}
INLINE vec<double> decayed(vec<double> x) {
  for (int i = 0; i < LANES_OF<double>; i++) x[i] = std::exp(-x[i]);
  return x;
}

// x0 y0 + x1 y1 + z of words of two bfloat16, in float32
INLINE vec<float> fma(vec<uint32_t> x, vec<uint32_t> y, vec<float> z) {
#ifdef AVX512_REGION
  return vec<float>(_mm512_dpbf16_ps(z, __m512bh(x), __m512bh(y)));
#else
  const vec<uint32_t> high = all(0xffff0000u);
  return fma(vec<float>(x << 16), vec<float>(y << 16), fma(vec<float>(x & high), vec<float>(y & high), z));
#endif
}

// the smaller one, the larger one; x if it is NaN
#if defined(AVX512_REGION)
INLINE vec<float> at_most(vec<float> most, vec<float> x) { return vec<float>(_mm512_min_ps(most, x)); }
INLINE vec<double> at_most(vec<double> most, vec<double> x) { return vec<double>(_mm512_min_pd(most, x)); }
INLINE vec<float> at_least(vec<float> least, vec<float> x) { return vec<float>(_mm512_max_ps(least, x)); }
INLINE vec<double> at_least(vec<double> least, vec<double> x) { return vec<double>(_mm512_max_pd(least, x)); }
#elif defined(AVX2_REGION)
INLINE vec<float> at_most(vec<float> most, vec<float> x) { return vec<float>(_mm256_min_ps(most, x)); }
INLINE vec<double> at_most(vec<double> most, vec<double> x) { return vec<double>(_mm256_min_pd(most, x)); }
INLINE vec<float> at_least(vec<float> least, vec<float> x) { return vec<float>(_mm256_max_ps(least, x)); }
INLINE vec<double> at_least(vec<double> least, vec<double> x) { return vec<double>(_mm256_max_pd(least, x)); }
#else
template <typename T>
INLINE T at_most(T most, T x) { return x > most ? most : x; }
template <typename T>
INLINE T at_least(T least, T x) { return x < least ? least : x; }
#endif

// the largest lane
INLINE float max(vec<float> v) {
#ifdef AVX512_REGION
  return _mm512_reduce_max_ps(v);
#else
  float found = v[0];
  for (int i = 1; i < LANES_OF<float>; i++) found = std::max(found, float(v[i]));
  return found;
#endif
}
INLINE double max(vec<double> v) {
  double found = v[0];
  for (int i = 1; i < LANES_OF<double>; i++) found = std::max(found, double(v[i]));
  return found;
}

// y[e * stride + i] = x[i * width + e], i < rows
template <typename T>
void transpose(const T* x, int64_t rows, int64_t width, T* y, int64_t stride) {
  int64_t from = 0;
#ifdef AVX2_REGION
  if constexpr (sizeof(T) == 4)
    for (; from + 8 <= rows; from += 8)
      for (int64_t e = 0; e + 8 <= width; e += 8) {
        __m256 a[8], b[8];
        for (int i = 0; i < 4; i++) {  // row i beside row i + 4
          const auto *low = reinterpret_cast<const float*>(x + (from + i) * width + e), *high = low + 4 * width;
          a[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(high), 1);
          a[i + 4] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low + 4)), _mm_loadu_ps(high + 4), 1);
        }
        for (int i = 0; i < 8; i += 4)
          for (int j = 0; j < 2; j++) {
            b[i + j] = _mm256_unpacklo_ps(a[i + 2 * j], a[i + 2 * j + 1]);
            b[i + j + 2] = _mm256_unpackhi_ps(a[i + 2 * j], a[i + 2 * j + 1]);
          }
        auto* to = reinterpret_cast<float*>(y + e * stride + from);
        for (int i = 0; i < 8; i += 4)
          for (int j = 0; j < 2; j++) {
            const __m256 low = b[i + 2 * j], high = b[i + 2 * j + 1];
            _mm256_storeu_ps(to + (i + 2 * j) * stride, _mm256_shuffle_ps(low, high, 0x44));
            _mm256_storeu_ps(to + (i + 2 * j + 1) * stride, _mm256_shuffle_ps(low, high, 0xee));
          }
      }
#endif
  for (int64_t i = 0; i < rows; i++)
    for (int64_t e = i < from ? width / LANES_OF<T> * LANES_OF<T> : 0; e < width; e++) y[e * stride + i] = one(x + i * width + e);
}

// y (+)= a x: y is rows x width, a rows x inner at any strides, x inner x width; width a multiple of the lanes.
// Lower: only inner <= row counts, upper: only inner >= row; what a tile takes in beyond the diagonal must be 0 in a.
enum class Part { all, lower, upper };
template <Part part, typename E, typename T>
void product(const E* a, int64_t a_row, int64_t a_inner, const E* x, T* y, int64_t rows, int64_t inner, int64_t width, bool add) {
  constexpr int64_t LANES = LANES_OF<T>, TILE = 4;  // rows
  for (int64_t i = 0; i < rows; i += TILE) {
    const int64_t from = part == Part::upper ? i : 0, to = part == Part::lower ? std::min(i + TILE, inner) : inner;
    const int64_t some = std::min(TILE, rows - i);
    const E* row[TILE];
    for (int64_t r = 0; r < TILE; r++) row[r] = a + (i + std::min(r, some - 1)) * a_row;
    const auto tile = [&](int64_t e, auto vectors) INLINE_LAMBDA {
      vec<T> sum[TILE][vectors];
      for (int r = 0; r < TILE; r++)
        for (int v = 0; v < vectors; v++) sum[r][v] = vec<T>{};
      for (int64_t j = from; j < to; j++) {
        vec<E> z[vectors];
        for (int v = 0; v < vectors; v++) z[v] = load(x + j * width + e + v * LANES);
        for (int r = 0; r < TILE; r++)
          for (int v = 0; v < vectors; v++) sum[r][v] = fma(all(one(row[r] + j * a_inner)), z[v], sum[r][v]);
      }
      for (int r = 0; r < TILE; r++)
        for (int v = 0; v < vectors; v++) {
          T* at = y + (i + r) * width + e + v * LANES;
          if (r < some) store(add ? load(at) + sum[r][v] : sum[r][v], at);
        }
    };
    int64_t e = 0;
    for (; e + 2 * LANES <= width; e += 2 * LANES) tile(e, std::integral_constant<int, 2>());
    if (e < width) tile(e, std::integral_constant<int, 1>());
  }
}
