// Attention, a head of a window at a time: softmax(q k' / sqrt(W)) v. The meaning is attend in kernels/reference.py. Included once per
// instruction set.
//
// Keys that aren't real are left out where keys and values are copied to how the products want them. A tile of ROWS queries meets BLOCK
// keys at a time, so that scores stay in the caches and are never all there (Dao et al. 2022, "FlashAttention", algorithms 1 and 4); of a
// softmax the logarithm of its denominator is kept for the gradients.
//
// Products of bfloat16 sum in float32 what two words of two values each give, so their factors lie in pairs: values beside each other in a
// row, which they are, or below each other, for which two rows are interleaved. Of other values a word has one, and nothing needs turning.

constexpr int64_t ROWS = 32, BLOCK = 256;

INLINE void put(float x, float* y) { *y = x; }
INLINE void put(double x, double* y) { *y = x; }
INLINE void put(float x, uint16_t* y) {  // nearest even; NaN stays one
  const uint32_t bits = std::bit_cast<uint32_t>(x), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  *y = x == x ? rounded : 0x7fc0;
}
template <typename A>
INLINE void put(vec<A> x, A* y) { store(x, y); }
INLINE void put(vec<float> x, uint16_t* y) {
#ifdef AVX512_REGION
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), __m256i(_mm512_cvtneps_pbh(x)));
#else
  for (int i = 0; i < LANES_OF<float>; i++) put(x[i], y + i);
#endif
}
template <typename A>
INLINE vec<A> get(const A* x) { return load(x); }
INLINE vec<float> get(const uint16_t* x) {
  typedef uint16_t halves __attribute__((vector_size(BYTES / 2), aligned(2), may_alias));
  return vec<float>(__builtin_convertvector(*reinterpret_cast<const halves*>(x), vec<uint32_t>) << 16);
}

template <typename T, typename A>
class Attention {
  static constexpr int64_t PAIR = sizeof(A) / sizeof(T), LANES = LANES_OF<A>;
  using Word = std::conditional_t<PAIR == 2, uint32_t, A>;
  using Call = AttendCall<T, A>;

  const Call& n;
  const int64_t width, most, columns, inner;  // whole vectors of W and of the keys; words of such a row, and those of W
  const A scale;
  std::vector<A> memory;
  std::vector<int64_t> real;  // the keys of the window that are
  T *k, *v;                      // of a head: keys x width
  Word *k_pairs, *v_pairs;       // the same, two rows a word
  Word *k_turned, *v_turned;     // of each block: columns x its keys
  A *gk, *gv;                    // keys x width
  T *q, *g, *some_y, *p, *gp;    // of a tile: ROWS x width, ROWS x BLOCK
  Word *q_pairs, *g_pairs, *p_pairs;
  A *y, *s, *gs, *high, *total, *mean;

 public:
  Attention(const Call& call, bool gradients)
      : n(call), width(whole(call.width)), most(whole(call.keys)), columns(width / PAIR), inner((call.width + PAIR - 1) / PAIR),
        scale(A(1) / std::sqrt(A(call.width))) {
    const int64_t head = most * width, tile = ROWS * width, scores = ROWS * BLOCK;
    memory.resize((gradients ? 8 : 5) * head + 6 * tile + 5 * scores + 3 * ROWS);
    real.reserve(n.keys);
    A* next = memory.data();
    const auto take = [&](auto*& to, int64_t count) {
      to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(std::exchange(next, next + count));
    };
    take(k, head), take(v, head), take(k_pairs, head), take(v_pairs, head), take(k_turned, head);
    if (gradients) take(v_turned, head), take(gk, head), take(gv, head);
    take(q, tile), take(g, tile), take(some_y, tile), take(q_pairs, tile), take(g_pairs, tile), take(y, tile);
    take(s, scores), take(gs, scores), take(p, scores), take(gp, scores), take(p_pairs, scores);
    take(high, ROWS), take(total, ROWS), take(mean, ROWS);
  }

  void forward(int64_t b, int64_t h) {
    const auto [k_below, v_below] = read_keys(b, h, false);
    for (int64_t first = 0; first < n.queries; first += ROWS) {
      const int64_t rows = std::min(ROWS, n.queries - first);
      for (int64_t i = 0; i < rows; i++) std::copy_n(n.q.at(b, h, first + i), n.width, q + i * width);
      std::fill_n(y, rows * width, A(0));
      std::fill_n(total, rows, A(0));
      std::fill_n(high, rows, -INFINITE);
      for (int64_t from = 0; from < count(); from += BLOCK) {
        const int64_t keys = std::min(BLOCK, count() - from), wide = whole(keys);
        product<Part::all>(words(q), columns, 1, k_turned + from * columns, s, rows, inner, wide, false);
        for (int64_t i = 0; i < rows; i++) {
          A* row = s + i * wide;
          std::fill(row + keys, row + wide, -INFINITE);
          const A before = std::exchange(high[i], std::max(high[i], scale * largest(row, wide)));
          const vec<A> top = all(high[i] == -INFINITE ? A(0) : high[i]);  // no difference of two infinities
          vec<A> sums = {};
          for (int64_t e = 0; e < wide; e += LANES) {
            const vec<A> share = decayed(at_most(all(A(87)), top - load(row + e) * scale));
            store(share, row + e);
            sums += share;
          }
          std::fill(row + keys, row + wide, A(0));
          if (from) {
            const vec<A> fade = decayed(at_most(all(A(87)), top - before));
            total[i] *= fade[0];
            for (int64_t e = 0; e < width; e += LANES) store(load(y + i * width + e) * fade, y + i * width + e);
          }
          total[i] += sum(sums);
        }
        product<Part::all>(words(values(s, rows * wide, p)), wide / PAIR, 1, v_below + from / PAIR * width, y, rows, (keys + PAIR - 1) / PAIR,
                           width, true);
      }
      for (int64_t i = 0; i < rows; i++) {
        const bool none = high[i] == -INFINITE;
        write(y + i * width, n.y.at(b, h, first + i), none ? A(0) : A(1) / total[i]);
        n.level[(b * n.heads + h) * n.queries + first + i] = none ? A(0) : high[i] + std::log(total[i]);
      }
    }
  }

  void backward(int64_t b, int64_t h) {
    const auto [k_below, v_below] = read_keys(b, h, true);
    std::fill_n(gk, most * width, A(0));
    std::fill_n(gv, most * width, A(0));
    for (int64_t first = 0; first < n.queries; first += ROWS) {
      const int64_t rows = std::min(ROWS, n.queries - first), pairs = (rows + PAIR - 1) / PAIR;
      for (int64_t i = 0; i < rows; i++) {
        std::copy_n(n.q.at(b, h, first + i), n.width, q + i * width);
        std::copy_n(n.g.at(b, h, first + i), n.width, g + i * width);
        std::copy_n(n.y.at(b, h, first + i), n.width, some_y + i * width);
        vec<A> product = {};
        for (int64_t e = i * width; e < (i + 1) * width; e += LANES) product = fma(get(g + e), get(some_y + e), product);
        mean[i] = sum(product);
      }
      const Word *q_rows = below(q, rows, width, q_pairs), *g_rows = below(g, rows, width, g_pairs);
      A* gq = y;
      std::fill_n(gq, rows * width, A(0));
      for (int64_t from = 0; from < count(); from += BLOCK) {
        const int64_t keys = std::min(BLOCK, count() - from), wide = whole(keys);
        product<Part::all>(words(q), columns, 1, k_turned + from * columns, s, rows, inner, wide, false);
        product<Part::all>(words(g), columns, 1, v_turned + from * columns, gs, rows, inner, wide, false);
        for (int64_t i = 0; i < rows; i++) {
          const vec<A> level = all(n.level[(b * n.heads + h) * n.queries + first + i]), about = all(mean[i]);
          A *row = s + i * wide, *g_row = gs + i * wide;
          for (int64_t e = 0; e < wide; e += LANES) {
            const vec<A> under = at_most(all(A(87)), level - load(row + e) * scale);
            const vec<A> share = decayed(under < A(0) ? vec<A>{} : under);  // of large scores the level is inexact
            store(share, row + e);
            store(share * (load(g_row + e) - about), g_row + e);
          }
          std::fill(row + keys, row + wide, A(0));
          std::fill(g_row + keys, g_row + wide, A(0));
        }
        const T *shares = values(s, rows * wide, p), *g_scores = values(gs, rows * wide, gp);
        product<Part::all>(words(g_scores), wide / PAIR, 1, k_below + from / PAIR * width, gq, rows, (keys + PAIR - 1) / PAIR, width, true);
        product<Part::all>(below(shares, rows, wide, p_pairs), 1, wide, g_rows, gv + from * width, keys, pairs, width, true);
        product<Part::all>(below(g_scores, rows, wide, p_pairs), 1, wide, q_rows, gk + from * width, keys, pairs, width, true);
      }
      for (int64_t i = 0; i < rows; i++) write(gq + i * width, n.gq.at(b, h, first + i), scale);
    }
    for (int64_t j = 0, next = 0; j < n.keys; j++) {
      const bool is = next < count() && real[next] == j;
      if (is) {
        write(gk + next * width, n.gk.at(b, h, j), scale);
        write(gv + next * width, n.gv.at(b, h, j), A(1));
        next++;
      } else {
        std::fill_n(n.gk.at(b, h, j), n.width, T(0));
        std::fill_n(n.gv.at(b, h, j), n.width, T(0));
      }
    }
  }

 private:
  static constexpr A INFINITE = std::numeric_limits<A>::infinity();
  static int64_t whole(int64_t x) { return (x + LANES - 1) / LANES * LANES; }
  static const Word* words(const T* x) { return reinterpret_cast<const Word*>(x); }
  int64_t count() const { return static_cast<int64_t>(real.size()); }

  void write(const A* from, T* to, A factor) const {
    int64_t e = 0;
    for (; e + LANES <= n.width; e += LANES) put(load(from + e) * factor, to + e);
    for (; e < n.width; e++) put(from[e] * factor, to + e);
  }

  // the same values as T, at `to` if that is another type
  static const T* values(const A* x, int64_t count, T* to) {
    if constexpr (PAIR == 1) return x;
    else {
      for (int64_t i = 0; i < count; i += LANES) put(load(x + i), to + i);
      return to;
    }
  }

  // the same rows, two of them a word, at `to` if there are two to a word
  static const Word* below(const T* x, int64_t rows, int64_t width, Word* to) {
    if constexpr (PAIR == 1) return x;
    else {
      for (int64_t i = 0; i < rows; i += 2) {
        const T *high = x + i * width, *low = high + width;
        Word* pair = to + i / 2 * width;
        if (i + 1 < rows)
          for (int64_t e = 0; e < width; e++) pair[e] = Word(high[e]) | Word(low[e]) << 16;
        else
          for (int64_t e = 0; e < width; e++) pair[e] = high[e];
      }
      return to;
    }
  }

  // the head's keys and values that are real; two rows a word
  std::pair<const Word*, const Word*> read_keys(int64_t b, int64_t h, bool gradients) {
    real.clear();
    for (int64_t j = 0; j < n.keys; j++)
      if (!n.real || n.real[b * n.keys + j]) real.push_back(j);
    for (int64_t i = 0; i < count(); i++) {
      std::copy_n(n.k.at(b, h, real[i]), n.width, k + i * width);
      std::copy_n(n.v.at(b, h, real[i]), n.width, v + i * width);
    }
    for (int64_t from = 0; from < count(); from += BLOCK) {
      const int64_t keys = std::min(BLOCK, count() - from);
      transpose(words(k) + from * columns, keys, columns, k_turned + from * columns, whole(keys));
      if (gradients) transpose(words(v) + from * columns, keys, columns, v_turned + from * columns, whole(keys));
    }
    return {gradients ? below(k, count(), width, k_pairs) : nullptr, below(v, count(), width, v_pairs)};
  }

  static INLINE A largest(const A* x, int64_t count) {
    vec<A> most = load(x);
    for (int64_t e = LANES; e < count; e += LANES) {
      most = at_least(load(x + e), most);
    }
    return max(most);
  }
};

// heads [from, to) of all windows
template <typename T, typename A>
void attend_heads(const AttendCall<T, A>& call, int64_t from, int64_t to) {
  Attention<T, A> attention(call, false);
  for (int64_t i = from; i < to; i++) attention.forward(i / call.heads, i % call.heads);
}
template <typename T, typename A>
void attend_heads_backward(const AttendCall<T, A>& call, int64_t from, int64_t to) {
  Attention<T, A> attention(call, true);
  for (int64_t i = from; i < to; i++) attention.backward(i / call.heads, i % call.heads);
}
