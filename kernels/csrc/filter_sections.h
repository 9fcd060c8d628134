// Second-order sections in series, with carried state. The meaning is sos_stream in kernels/reference.py. Included once per instruction set.
//
// Lanes are channels, so a chunk of any length is as good as another and every bit is SciPy's (no fused multiply-add). A section takes a
// block of samples through before the next one does, its state and those of COUNT vectors of channels staying in registers: the steps of
// one channel wait for each other, those of six vectors fill the time.

// LANES rows of x (`row` apart, step by step) as LANES vectors of channels
INLINE void turn(vec<double>* r) {
#ifdef AVX2_REGION
  const vec<double> a = __builtin_shufflevector(r[0], r[1], 0, 4, 2, 6), b = __builtin_shufflevector(r[0], r[1], 1, 5, 3, 7);
  const vec<double> c = __builtin_shufflevector(r[2], r[3], 0, 4, 2, 6), d = __builtin_shufflevector(r[2], r[3], 1, 5, 3, 7);
  r[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5), r[1] = __builtin_shufflevector(b, d, 0, 1, 4, 5);
  r[2] = __builtin_shufflevector(a, c, 2, 3, 6, 7), r[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
#else
  const vec<double> a = r[0];
  r[0] = vec<double>{a[0], r[1][0]}, r[1] = vec<double>{a[1], r[1][1]};
#endif
}

// n steps of `some` channels, x_CT (rows of x_row values), to x_TC of WIDE channels, zeros beyond, and back
template <int64_t WIDE, typename T>
INLINE void read_steps(const T* x, int64_t x_row, int64_t n, int64_t some, double* x_TC) {
  constexpr int64_t LANES = LANES_OF<double>;
  for (int64_t k = 0; k < WIDE; k += LANES) {
    int64_t t = 0;
    if constexpr (std::is_same_v<T, double>)
      if (k + LANES <= some)
        for (; t + LANES <= n; t += LANES) {
          vec<double> r[LANES];
          for (int i = 0; i < LANES; i++) r[i] = load(x + (k + i) * x_row + t);
          turn(r);
          for (int i = 0; i < LANES; i++) store(r[i], x_TC + (t + i) * WIDE + k);
        }
    for (; t < n; t++)
      for (int64_t i = k; i < k + LANES; i++) x_TC[t * WIDE + i] = i < some ? x[i * x_row + t] : 0.0;
  }
}
template <int64_t WIDE, typename T>
INLINE void write_steps(const double* x_TC, int64_t n, int64_t some, T* y, int64_t y_row) {
  constexpr int64_t LANES = LANES_OF<double>;
  for (int64_t k = 0; k < some; k += LANES) {
    int64_t t = 0;
    if constexpr (std::is_same_v<T, double>)
      if (k + LANES <= some)
        for (; t + LANES <= n; t += LANES) {
          vec<double> r[LANES];
          for (int i = 0; i < LANES; i++) r[i] = load(x_TC + (t + i) * WIDE + k);
          turn(r);
          for (int i = 0; i < LANES; i++) store(r[i], y + (k + i) * y_row + t);
        }
    for (; t < n; t++)
      for (int64_t i = k; i < std::min(k + LANES, some); i++) y[i * y_row + t] = static_cast<T>(x_TC[t * WIDE + i]);
  }
}

// The same for x_TC (`x_row` values from step to step): nothing has to be turned.
template <int64_t WIDE>
INLINE void copy_steps(const double* x, int64_t x_row, int64_t n, int64_t some, double* x_TC, int64_t row) {
  for (int64_t t = 0; t < n; t++)
    for (int64_t i = 0; i < some; i++) x_TC[t * row + i] = x[t * x_row + i];
}

// COUNT vectors of channels, of which the first `some` channels are there; x and y may be the same. Time-major: x_TC instead of x_CT.
template <int COUNT, bool TIME_MAJOR, typename T>
void filter_some(const T* x, int64_t x_row, T* y, int64_t y_row, int64_t steps, const double* sos, int64_t sections, double* state,
                 int64_t state_row, int64_t some) {
  constexpr int64_t LANES = LANES_OF<double>, WIDE = COUNT * LANES, BLOCK = 32;
  double x_TC[BLOCK * WIDE];
  if constexpr (TIME_MAJOR) std::fill(x_TC, x_TC + BLOCK * WIDE, 0.0);
  for (int64_t t = 0; t < steps; t += BLOCK) {
    const int64_t n = std::min(BLOCK, steps - t);
    if constexpr (TIME_MAJOR) copy_steps<WIDE>(x + t * x_row, x_row, n, some, x_TC, WIDE);
    else read_steps<WIDE>(x + t, x_row, n, some, x_TC);
    double* at = state;
    for (const double* f = sos; f < sos + 6 * sections; f += 6, at += 2 * state_row) {
      const vec<double> b0 = all(f[0]), b1 = all(f[1]), b2 = all(f[2]), a1 = all(f[4]), a2 = all(f[5]);
      vec<double> z1[COUNT], z2[COUNT];
      for (int v = 0; v < COUNT; v++) {
        const int64_t k = v * LANES;
        z1[v] = k + LANES <= some ? load(at + k) : load_some(at + k, some - k);
        z2[v] = k + LANES <= some ? load(at + state_row + k) : load_some(at + state_row + k, some - k);
      }
      const auto pass = [&](auto even) INLINE_LAMBDA {
        for (double* x_C = x_TC; x_C < x_TC + n * WIDE; x_C += WIDE)
          for (int v = 0; v < COUNT; v++) {
            const vec<double> u = load(x_C + v * LANES), b0_u = b0 * u, p = b0_u + z1[v];
            z1[v] = b1 * u - a1 * p + z2[v];
            z2[v] = (even ? b0_u : b2 * u) - a2 * p;
            store(p, x_C + v * LANES);
          }
      };
      if (f[0] == f[2] && f[0] != 0) pass(std::true_type());  // as in notches and Butterworth's band-passes: a product less
      else pass(std::false_type());
      for (int v = 0; v < COUNT; v++) {
        const int64_t k = v * LANES;
        if (k + LANES <= some) store(z1[v], at + k), store(z2[v], at + state_row + k);
        else store_some(z1[v], at + k, some - k), store_some(z2[v], at + state_row + k, some - k);
      }
    }
    if constexpr (TIME_MAJOR) copy_steps<WIDE>(x_TC, WIDE, n, some, y + t * y_row, y_row);
    else write_steps<WIDE>(x_TC, n, some, y + t, y_row);
  }
}

constexpr int64_t FILTER_VECTORS = 6;  // at a time

// The channels [from, to) of x_CT (rows of x_row values) to y_CT; state_S2C as in the reference, `channels` wide.
template <bool TIME_MAJOR = false, typename T>
void filter_channels(const T* x, int64_t x_row, T* y, int64_t y_row, int64_t steps, const double* sos, int64_t sections,
                     double* state, int64_t channels, int64_t from, int64_t to) {
  constexpr int64_t LANES = LANES_OF<double>;
  for (int64_t c = from; c < to; c += FILTER_VECTORS * LANES) {
    const int64_t some = std::min(FILTER_VECTORS * LANES, to - c);
    const auto run = some > 4 * LANES   ? filter_some<6, TIME_MAJOR, T>
                     : some > 2 * LANES ? filter_some<4, TIME_MAJOR, T>
                     : some > LANES     ? filter_some<2, TIME_MAJOR, T>
                                        : filter_some<1, TIME_MAJOR, T>;
    const int64_t x_step = TIME_MAJOR ? 1 : x_row, y_step = TIME_MAJOR ? 1 : y_row;
    run(x + c * x_step, x_row, y + c * y_step, y_row, steps, sos, sections, state + c, channels, some);
  }
}

// A live chunk: the taken channels of x_TA in microvolts, checked, to raw_TC as they are and to y_TC through the sections, which may be
// none. False, and nothing but y and raw written to, if a sample isn't finite or beyond the limit.
inline bool take_chunk(const float* x, int64_t steps, const LiveSignal& f, float* raw, double* y) {
  bool good = true;
  for (int64_t t = 0; t < steps; t++) {
    const float* from = x + t * f.announced;
    double* to = y + t * f.channels;
    if (f.taken)
      for (int64_t c = 0; c < f.channels; c++) to[c] = static_cast<double>(from[f.taken[c]]) * f.factor;
    else
      for (int64_t c = 0; c < f.channels; c++) to[c] = static_cast<double>(from[c]) * f.factor;
    int64_t fine = 0;
    for (int64_t c = 0; c < f.channels; c++) {
      fine += std::abs(to[c]) <= f.limit;
      raw[t * f.channels + c] = static_cast<float>(to[c]);
    }
    good &= fine == f.channels;
  }
  if (!good) return false;
  if (steps == 0) return true;
  std::copy(y + (steps - 1) * f.channels, y + steps * f.channels, f.last);
  if (f.sections)
    filter_channels<true>(y, f.channels, y, f.channels, steps, f.sos, f.sections, f.state, f.channels, int64_t{0}, f.channels);
  return true;
}

// The sum of n values in the order in which NumPy adds up what lies side by side (pairwise, by eights).
inline double pairwise_sum(const double* x, int64_t n) {
  if (n < 8) {
    double s = 0;
    for (int64_t i = 0; i < n; i++) s += x[i];
    return s;
  }
  if (n > 128) {
    const int64_t half = n / 2 / 8 * 8;
    return pairwise_sum(x, half) + pairwise_sum(x + half, n - half);
  }
  double r[8];
  for (int i = 0; i < 8; i++) r[i] = x[i];
  int64_t i = 8;
  for (; i + 8 <= n; i += 8)
    for (int j = 0; j < 8; j++) r[j] += x[i + j];
  double s = ((r[0] + r[1]) + (r[2] + r[3])) + ((r[4] + r[5]) + (r[6] + r[7]));
  for (; i < n; i++) s += x[i];
  return s;
}

// Filtered samples y_TC as a window x_CT for a model: less the reference, in its unit and order, float32.
inline void cut_window(const double* y, int64_t steps, const LiveWindow& w, float* x) {
  constexpr int64_t BLOCK = 8;
  std::vector<float> z_TC(BLOCK * w.channels);
  for (int64_t t = 0; t < steps; t += BLOCK) {
    const int64_t n = std::min(BLOCK, steps - t);
    for (int64_t i = 0; i < n; i++) {
      const double* y_C = y + (t + i) * w.channels;
      const double away = w.reference == NO_REFERENCE  ? 0.0
                          : w.reference == MEAN_OF_ALL ? pairwise_sum(y_C, w.channels) / static_cast<double>(w.channels)
                                                       : y_C[w.reference];
      for (int64_t c = 0; c < w.channels; c++) z_TC[i * w.channels + c] = static_cast<float>((y_C[c] - away) * w.factor);
    }
    for (int64_t c = 0; c < w.wanted; c++) {
      const int64_t row = w.row ? w.row[c] : c;
      for (int64_t i = 0; i < n; i++) x[c * steps + t + i] = row < 0 ? 0.0f : z_TC[i * w.channels + row];
    }
  }
}
