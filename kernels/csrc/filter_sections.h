// Second-order sections in series, with carried state. The meaning is sos_stream in kernels/reference.py. Included once per instruction set.
//
// Lanes are channels, so a chunk of any length is as good as another and every bit is SciPy's (no fused multiply-add). A sample's way
// through the sections overlaps with the next sample's: the processor finds that by itself.

// COUNT vectors of channels, of which the first `some` channels are there; x and y may be the same
template <int COUNT, typename T>
void filter_some(const T* x, int64_t x_row, T* y, int64_t y_row, int64_t steps, const double* sos, int64_t sections, double* state,
                 int64_t state_row, int64_t some) {
  constexpr int64_t LANES = LANES_OF<double>, WIDE = COUNT * LANES, BLOCK = 32;
  double z[MOST_SECTIONS * 2 * WIDE], x_TC[BLOCK * WIDE];
  for (int64_t i = 0; i < 2 * sections; i++)
    for (int64_t k = 0; k < WIDE; k += LANES) {
      const double* at = state + i * state_row + k;
      store(k + LANES <= some ? load(at) : load_some(at, some - k), z + i * WIDE + k);
    }
  for (int64_t t = 0; t < steps; t += BLOCK) {
    const int64_t n = std::min(BLOCK, steps - t);
    for (int64_t k = 0; k < WIDE; k++)
      for (int64_t i = 0; i < n; i++) x_TC[i * WIDE + k] = k < some ? x[k * x_row + t + i] : 0.0;
    for (double* x_C = x_TC; x_C < x_TC + n * WIDE; x_C += WIDE) {
      vec<double> u[COUNT];
      for (int v = 0; v < COUNT; v++) u[v] = load(x_C + v * LANES);
      double* s = z;
      for (const double* f = sos; f < sos + 6 * sections; f += 6, s += 2 * WIDE) {
        const vec<double> b0 = all(f[0]), b1 = all(f[1]), b2 = all(f[2]), a1 = all(f[4]), a2 = all(f[5]);
        for (int v = 0; v < COUNT; v++) {
          const vec<double> p = b0 * u[v] + load(s + v * LANES);
          store(b1 * u[v] - a1 * p + load(s + WIDE + v * LANES), s + v * LANES);
          store(b2 * u[v] - a2 * p, s + WIDE + v * LANES);
          u[v] = p;
        }
      }
      for (int v = 0; v < COUNT; v++) store(u[v], x_C + v * LANES);
    }
    for (int64_t k = 0; k < some; k++)
      for (int64_t i = 0; i < n; i++) y[k * y_row + t + i] = static_cast<T>(x_TC[i * WIDE + k]);
  }
  for (int64_t i = 0; i < 2 * sections; i++)
    for (int64_t k = 0; k < some; k += LANES) {
      double* at = state + i * state_row + k;
      if (k + LANES <= some) store(load(z + i * WIDE + k), at);
      else store_some(load(z + i * WIDE + k), at, some - k);
    }
}

// The channels [from, to) of x_CT (rows of x_row values) to y_CT; state_S2C as in the reference, `channels` wide.
template <typename T>
void filter_channels(const T* x, int64_t x_row, T* y, int64_t y_row, int64_t steps, const double* sos, int64_t sections,
                     double* state, int64_t channels, int64_t from, int64_t to) {
  constexpr int64_t LANES = LANES_OF<double>;
  for (int64_t c = from; c < to; c += 3 * LANES) {
    const int64_t some = std::min(3 * LANES, to - c);
    const auto run = some > 2 * LANES ? filter_some<3, T> : some > LANES ? filter_some<2, T> : filter_some<1, T>;
    run(x + c * x_row, x_row, y + c * y_row, y_row, steps, sos, sections, state + c, channels, some);
  }
}
