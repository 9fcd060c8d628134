// The loops that building a cache spends its time in. The meaning is in kernels/pack.py, and every result is bit-equal to it: each sum
// in one order, no fused multiply-add. Included once per instruction set, after simd.h.

constexpr int64_t COLUMNS = 1024;  // outputs at a time, so that what they need stays in L1

// ---- integers of 2 or 3 bytes, little-endian, in records

inline void decode(const uint8_t* block, int64_t records, int64_t record_bytes, int64_t sample_bytes, int64_t channels,
                   const int64_t* offset, int64_t samples, const float* gain, const float* bias, int64_t row, float* x) {
  for (int64_t r = 0; r < records; r++)
    for (int64_t c = 0; c < channels; c++) {
      const uint8_t* from = block + r * record_bytes + offset[c];
      const float factor = gain[c], shift = bias[c];
      float* to = x + c * row + r * samples;
      if (sample_bytes == 2)
        for (int64_t t = 0; t < samples; t++) {
          int16_t digit;
          std::memcpy(&digit, from + 2 * t, 2);
          to[t] = static_cast<float>(digit) * factor + shift;
        }
      else
        for (int64_t t = 0; t < samples; t++) {
          const uint8_t* b = from + 3 * t;
          const uint32_t digit = uint32_t{b[0]} << 8 | uint32_t{b[1]} << 16 | uint32_t{b[2]} << 24;
          to[t] = static_cast<float>(static_cast<int32_t>(digit) >> 8) * factor + shift;
        }
    }
}

// ---- half the rate

// One row of kernels/pack.py's extend(): x - offset, odd-reflected about its ends, zeros beyond, `points` in all, and circular.
struct Extended {
  const float* x;
  int64_t samples, left, points;
  float offset;

  INLINE void read(int64_t from, int64_t count, float* y) const {
    const int64_t stop = left + samples;
    const int64_t a = std::min(left, samples - 1), b = std::min(points - stop, samples - 1);
    const float first = 2 * (x[0] - offset), last = 2 * (x[samples - 1] - offset);
    for (int64_t done = 0; done < count;) {
      const int64_t i = ((from + done) % points + points) % points;
      const int64_t border = i < left - a ? left - a : i < left ? left : i < stop ? stop : i < stop + b ? stop + b : points;
      const int64_t n = std::min(border - i, count - done);
      float* to = y + done;
      if (i >= left && i < stop)
        for (int64_t k = 0; k < n; k++) to[k] = x[i - left + k] - offset;
      else if (i >= left - a && i < left)
        for (int64_t k = 0; k < n; k++) to[k] = first - (x[left - i - k] - offset);
      else if (i >= stop && i < stop + b)
        for (int64_t k = 0; k < n; k++) to[k] = last - (x[samples - 2 - (i - stop) - k] - offset);
      else
        std::fill_n(to, n, 0.0f);
      done += n;
    }
  }
};

// Outputs [from, to) of one row, whose taps reach `count` odd samples to either side.
struct Halving {
  const Extended& extended;
  const float* taps;
  int64_t count;
  std::vector<float>&both, &odd, &even;

  void operator()(int64_t from, int64_t to, float* y) const {
    constexpr int64_t LANES = LANES_OF<float>, STEP = 4 * LANES;
    for (int64_t first = from; first < to; first += COLUMNS) {
      const int64_t n = std::min(COLUMNS, to - first);
      extended.read(2 * (first - count), 2 * (n + 2 * count), both.data());
      for (int64_t i = 0; i < n + 2 * count; i++) odd[i] = both[2 * i + 1];
      for (int64_t i = 0; i < n; i++) even[i] = both[2 * (i + count)];
      for (int64_t i = 0; i < n; i += STEP) {
        vec<float> sum[4];
        for (int k = 0; k < 4; k++) sum[k] = load(even.data() + i + k * LANES) * 0.5f;
        const float *after = odd.data() + i + count, *before = after - 1;
        for (int64_t j = 0; j < count; j++, after++, before--)
          for (int k = 0; k < 4; k++) sum[k] += taps[j] * (load(after + k * LANES) + load(before + k * LANES));
        if (n - i >= STEP)
          for (int k = 0; k < 4; k++) store(sum[k], y + first + i + k * LANES);
        else
          std::memcpy(y + first + i, sum, (n - i) * sizeof(float));
      }
    }
  }
};

inline void halve(const float* x, int64_t channels, int64_t samples, int64_t row, int64_t left, int64_t points, const float* offset,
                  const float* taps, int64_t count, float* y) {
  const int64_t half = points / 2, last = left + samples - 1, reach = 2 * count - 1;
  const int64_t a = std::min(left, samples - 1), b = std::min(points - 1 - last, samples - 1);
  // outputs whose whole sum lies in a reflection are the reflection of others: pivot, first, stop
  const int64_t mirrored[2][3] = {{left, (left - a + reach + 1) / 2, (left - reach) / 2 + 1},
                                  {last, (last + reach + 1) / 2, (last + b - reach) / 2 + 1}};
  float twice = 1;  // twice the gain at 0 Hz
  for (int64_t j = 0; j < count; j++) twice += 4 * taps[j];
  std::vector<float> both(2 * (COLUMNS + 2 * count)), odd(COLUMNS + 2 * count + 64), even(COLUMNS + 64);
  for (int64_t c = 0; c < channels; c++) {
    const Extended extended{x + c * row, samples, left, points, offset[c]};
    const Halving sums{extended, taps, count, both, odd, even};
    float* to = y + c * half;
    int64_t done = 0;
    for (const auto& [pivot, first, stop] : mirrored)
      if (first < stop) sums(done, first, to), done = stop;
    sums(done, half, to);
    for (const auto& [pivot, first, stop] : mirrored) {
      const float total = twice * (extended.x[pivot - left] - offset[c]);
      for (int64_t n = first; n < stop; n++) to[n] = total - to[pivot - n];
    }
  }
}

// ---- between samples: eight taps, each a polynomial of the fraction

inline void interpolate(const float* x, int64_t channels, int64_t points, int64_t period, int64_t first, int64_t outputs,
                        const float* polynomials, int64_t degree, float* y) {
  typedef float four __attribute__((vector_size(16)));
  typedef float eight __attribute__((vector_size(32)));
  typedef float loose __attribute__((vector_size(32), aligned(4), may_alias));
  const loose* powers = reinterpret_cast<const loose*>(polynomials);  // auto would lose the alignment
  int64_t at = first * points / period - 3, rest = first * points % period;
  for (int64_t k = 0; k < outputs; k++) {
    const float fraction = static_cast<float>(rest) / static_cast<float>(period) - 0.5f;
    eight taps = powers[degree];
    for (int64_t d = degree - 1; d >= 0; d--) taps = taps * fraction + powers[d];
    for (int64_t c = 0; c < channels; c++) {
      const float* from = x + c * points;
      eight v;
      if (at >= 0 && at + 8 <= points)
        v = *reinterpret_cast<const loose*>(from + at);
      else
        for (int64_t i = 0; i < 8; i++) v[i] = from[(at + i + 3 * points) % points];
      v *= taps;
      four part[2];
      std::memcpy(part, &v, sizeof(v));
      part[0] += part[1];
      y[c * outputs + k] = (part[0][0] + part[0][2]) + (part[0][1] + part[0][3]);
    }
    rest += points % period;
    at += points / period + (rest >= period);
    rest -= rest >= period ? period : 0;
  }
}

// ---- values at ranks (ascending) of a sorted row: a histogram between the extremes of a sample says which values to sort

inline void order_statistics(const float* x, int64_t channels, int64_t samples, int64_t row, const int64_t* rank, int64_t ranks,
                             float* y) {
  constexpr int64_t BINS = 1024, LANES = LANES_OF<float>, LOOK = 32;
  typedef int32_t ints __attribute__((vector_size(BYTES)));
  typedef uint16_t words __attribute__((vector_size(BYTES / 2)));
  std::vector<uint16_t> bins(samples + LOOK);
  std::vector<float> found;
  for (int64_t c = 0; c < channels; c++) {
    const float* from = x + c * row;
    float low = from[0], high = from[0];
    for (int64_t t = 0; t < samples; t += samples / 256 + 1) low = std::min(low, from[t]), high = std::max(high, from[t]);
    if (!std::isfinite(high - low)) low = std::numeric_limits<float>::quiet_NaN();  // all into the last bin
    const vec<float> factor = all(high > low ? BINS / (high - low) : 1.0f), most = all(float{BINS - 1}), zero = all(0.0f);
    for (int64_t t = 0; t < samples; t += LANES) {
      const vec<float> v = ((t + LANES <= samples ? load(from + t) : load_some(from + t, samples - t)) - low) * factor;
      const vec<float> below = v < most ? v : most;  // not a number: last, as NumPy has it
      const words bin = __builtin_convertvector(__builtin_convertvector(below > zero ? below : zero, ints), words);
      std::memcpy(bins.data() + t, &bin, sizeof(bin));  // a bin never falls as x rises
    }
    uint32_t count[2][BINS] = {};  // by turns, because an addition waits for the one before to the same place
    for (int64_t t = 0; t < samples; t++) count[t & 1][bins[t]]++;
    int64_t before = 0, inside = 0, bin = -1;
    for (int64_t r = 0; r < ranks; r++) {
      const int64_t last = bin;
      while (rank[r] >= before + inside) {
        before += inside;
        bin++;
        inside = int64_t{count[0][bin]} + count[1][bin];
      }
      if (bin != last) {
        const auto wanted = static_cast<uint16_t>(bin);
        found.clear();
        for (int64_t t = 0; t < samples; t += LOOK) {
          uint16_t any = 0;
          for (int64_t i = t; i < t + LOOK; i++) any |= bins[i] == wanted;
          for (int64_t i = t; any != 0 && i < std::min(t + LOOK, samples); i++)
            if (bins[i] == wanted) found.push_back(from[i]);
        }
        std::sort(found.begin(), found.end(), [](float a, float b) { return a < b || (b != b && a == a); });
      }
      y[c * ranks + r] = found[rank[r] - before];
    }
  }
}

// ---- float16, time-major, to nearest even and clipped to what it holds

inline void pack(const float* y, int64_t channels, int64_t outputs, int64_t row, const float* offset, const float* scale, uint16_t* z) {
  constexpr int64_t STEPS = 64, LANES = LANES_OF<float>;
  typedef uint32_t bits __attribute__((vector_size(BYTES)));
  typedef uint16_t words __attribute__((vector_size(BYTES / 2)));
  std::vector<uint16_t> block(channels * STEPS);
  for (int64_t first = 0; first < outputs; first += STEPS) {
    const int64_t n = std::min(STEPS, outputs - first);
    for (int64_t c = 0; c < channels; c++)
      for (int64_t t = 0; t < n; t += LANES) {
        const float* from = y + c * row + first + t;
        const vec<float> v = ((t + LANES <= n ? load(from) : load_some(from, n - t)) - offset[c]) / scale[c];
        const bits all = (bits)v, size = all & 0x7fffffff;
        const bits some = size < 0x477fe000 ? size : 0x477fe000 - bits{};  // 65504
        const bits normal = (some - 0x38000000 + 0xfff + (some >> 13 & 1)) >> 13;
        // a number below 2^-14 loses its last bits by the addition of 1/2, which rounds to nearest even too
        const bits small = (bits)((vec<float>)some + 0.5f) - 0x3f000000;
        const bits half = size > 0x7f800000 ? 0x7e00 | (size >> 13 & 0x3ff) : some < 0x38800000 ? small : normal;
        const words word = __builtin_convertvector(half | (all >> 16 & 0x8000), words);
        std::memcpy(block.data() + c * STEPS + t, &word, sizeof(word));
      }
    for (int64_t t = 0; t < n; t++)
      for (int64_t c = 0; c < channels; c++) z[(first + t) * channels + c] = block[c * STEPS + t];
  }
}
