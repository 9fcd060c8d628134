// Vectors in the width of the instruction set that the including region is compiled for: this file is included once per region.
//
//   namespace generic { #include "x.h" }
//   #pragma GCC push_options
//   #pragma GCC target("avx2,fma")
//   namespace avx2 { #include "x.h" }
//   #pragma GCC pop_options
//
// so that one binary has both, and runs on processors that have only the first.

#ifdef AVX2_REGION
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

#ifdef AVX2_REGION
INLINE vec<float> fma(vec<float> a, vec<float> b, vec<float> c) { return vec<float>(_mm256_fmadd_ps(a, b, c)); }
INLINE vec<double> fma(vec<double> a, vec<double> b, vec<double> c) { return vec<double>(_mm256_fmadd_pd(a, b, c)); }
#else
template <typename T>
INLINE T fma(T a, T b, T c) { return a * b + c; }
#endif

INLINE float sum(vec<float> v) {
#ifdef AVX2_REGION
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

// exp for |x| < 87, to 2 units of the last place (the polynomial of Cephes' expf); NaN stays NaN
INLINE vec<float> exponential(vec<float> x) {
  typedef int32_t ints __attribute__((vector_size(BYTES)));
  const vec<float> magic = all(12582912.0f);  // 1.5 x 2^23: adding it rounds to an integer, held in the low bits
  const vec<float> shifted = fma(x, all(1.44269504f), magic), n = shifted - magic;
  const vec<float> r = fma(n, all(2.12194440e-4f), fma(n, all(-0.693359375f), x));
  vec<float> p = fma(r, all(1.9875691500e-4f), all(1.3981999507e-3f));
  p = fma(p, r, all(8.3334519073e-3f));
  p = fma(p, r, all(4.1665795894e-2f));
  p = fma(p, r, all(1.6666665459e-1f));
  p = fma(p, r, all(5.0000001201e-1f));
  p = fma(p, r * r, r) + 1.0f;
  return p * vec<float>(((ints)shifted + 127) << 23);
}
INLINE vec<double> exponential(vec<double> x) {
  for (int i = 0; i < LANES_OF<double>; i++) x[i] = std::exp(x[i]);
  return x;
}
