// Mamba's recurrence with a rate per channel. The meaning is selective_scan in kernels/reference.py. Included once per instruction set.
//
// In a chunk of Q = 16 steps let `kept` be the product of the steps' exp(-fade) since the chunk's start, and `grown` u / kept. Then
// y = kept * (tri(c b') grown + c h), h being the state before the chunk, and the state after it is kept_last * (h + b' grown): small
// matrix products, with one exponential and one division a value. As a step fades to 2 % at most, 16 leave 1e-28. So that both kept and
// 1 / kept stay within 1e14, kept is `START` times as much, a power of two, and h is the state over START. Channels that run backwards have their products from the chunk's end, and the upper triangle of the same c b'.
//
// Backwards in the sense of gradients the same products appear transposed. A fade acts on the chunk's outputs and state only by
// way of the sums of fades, whence its gradient: the sum of gu u - gy y over the steps from it on, less gh . h at the chunk's end.

constexpr int64_t Q = 16;  // steps of a chunk
constexpr double START = 0x1p46;

template <typename T>
struct Scan {
  ScanSizes n;
  int64_t chunks, width, states;  // width and states: the larger direction's channels and S, in whole vectors
  std::vector<T> memory;
  T *b, *c, *cb, *g_cb, *gb, *gc;                             // of a row: steps x states, and per chunk Q x Q
  T *kept, *inverse, *grown, *g_y, *g_grown, *y, *before, *gh, *after;  // of a chunk: Q x width; states x width, `before` of every chunk
  T* turned;  // scratch for a transpose

  Scan(const ScanSizes& sizes, bool gradients) : n(sizes) {
    chunks = (n.steps + Q - 1) / Q;
    const int64_t most = std::max(n.ahead, n.channels - n.ahead);
    width = (most + LANES_OF<T> - 1) / LANES_OF<T> * LANES_OF<T>;
    states = (n.states + LANES_OF<T> - 1) / LANES_OF<T> * LANES_OF<T>;
    const int64_t row = chunks * Q * states, square = chunks * Q * Q, chunk = Q * width, state = std::max<int64_t>(states, 1) * width;
    const int64_t scratch = std::max(states, width) * std::max(Q, states);
    const int64_t forward = 2 * row + square + 3 * chunk + 2 * state + scratch;
    memory.resize(forward + gradients * (2 * row + square + 3 * chunk + (chunks + 1) * state));
    T* next = memory.data();
    const auto take = [&](int64_t count) { return std::exchange(next, next + count); };
    b = take(row), c = take(row), cb = take(square), kept = take(chunk), grown = take(chunk), y = take(chunk);
    after = take(state), turned = take(scratch), before = take(state);
    if (!gradients) return;
    next += chunks * state;  // of `before`
    gh = take(state), gb = take(row), gc = take(row), g_cb = take(square), inverse = take(chunk), g_y = take(chunk), g_grown = take(chunk);
  }

  void read_row(const ScanRow<T>& r) {  // b and c in whole vectors, zeros beyond, and c b' of every chunk
    for (int64_t t = 0; t < n.steps; t++)
      for (int64_t s = 0; s < states; s += LANES_OF<T>) {
        __builtin_prefetch(r.b + (t + Q) * r.b_step + s);
        __builtin_prefetch(r.c + (t + Q) * r.c_step + s);
        store(read(r.b + t * r.b_step + s, n.states - s), b + t * states + s);
        store(read(r.c + t * r.c_step + s, n.states - s), c + t * states + s);
      }
    for (int64_t k = 0; k < chunks; k++) {
      transpose(b + k * Q * states, Q, states, turned, Q);
      product<Part::all>(c + k * Q * states, states, 1, turned, cb + k * Q * Q, Q, states, Q, false);
    }
  }

  // kept, grown and, for gradients, 1 / kept of one chunk of one direction; w is the direction's channels in whole vectors
  template <bool gradients>
  void read_chunk(const ScanRow<T>& r, int64_t k, bool back, int64_t from, int64_t count, int64_t w) {
    const int64_t steps = std::min(Q, n.steps - k * Q), next = back && k > 0 ? -Q : Q;  // beyond the last one is often the next row
    const int64_t first = back ? steps - 1 : 0, step = back ? -1 : 1;
    const T *fade = r.fade + (k * Q + first) * r.fade_step + from, *u = r.u + (k * Q + first) * r.u_step + from;
    const auto columns = [&](int64_t e, auto vectors, auto get) INLINE_LAMBDA {  // in registers from step to step
      vec<T> product[vectors];
      for (int v = 0; v < vectors; v++) product[v] = all(T(START));
      const T *f_at = fade + e, *u_at = u + e;
      T *kept_at = kept + first * w + e, *grown_at = grown + first * w + e, *inverse_at = inverse + first * w + e;
      for (int64_t i = 0; i < steps; i++) {
        __builtin_prefetch(f_at + next * r.fade_step);
        __builtin_prefetch(u_at + next * r.u_step);
        for (int v = 0; v < vectors; v++) {
          constexpr int64_t lanes = LANES_OF<T>;
          product[v] *= decayed(at_most(all(T(4)), get(f_at + v * lanes)));
          const vec<T> over = T(1) / product[v];
          store(product[v], kept_at + v * lanes);
          if (gradients) store(over, inverse_at + v * lanes);
          store(get(u_at + v * lanes) * over, grown_at + v * lanes);
        }
        f_at += step * r.fade_step, u_at += step * r.u_step, kept_at += step * w, grown_at += step * w, inverse_at += step * w;
      }
    };
    const auto whole = [](const T* x) { return load(x); };
    int64_t e = 0;
    for (; e + 2 * LANES_OF<T> <= count; e += 2 * LANES_OF<T>) columns(e, std::integral_constant<int, 2>(), whole);
    for (; e < count; e += LANES_OF<T>) columns(e, std::integral_constant<int, 1>(), [&](const T* x) { return read(x, count - e); });
  }

  static INLINE vec<T> read(const T* from, int64_t left) { return left >= LANES_OF<T> ? load(from) : load_some(from, left); }
  static INLINE void write(vec<T> v, T* to, int64_t left) {
    if (left >= LANES_OF<T>) store(v, to);
    else store_some(v, to, left);
  }

  // the state after chunk k over START, from the one before it: kept_last * (h + b' grown) / START
  void pass_on(int64_t k, bool back, const T* h, T* to, int64_t w) {
    const int64_t steps = std::min(Q, n.steps - k * Q);
    std::copy_n(h, states * w, to);
    product<Part::all>(b + k * Q * states, 1, states, grown, to, n.states, steps, w, true);
    const T* last = kept + (back ? 0 : steps - 1) * w;
    for (int64_t s = 0; s < n.states; s++)
      for (int64_t e = 0; e < w; e += LANES_OF<T>) store(load(to + s * w + e) * (load(last + e) * T(1 / START)), to + s * w + e);
  }

  void forward(const ScanRow<T>& r, T* y_LE) {
    read_row(r);
    for (const bool back : {false, true}) {
      const int64_t from = back ? n.ahead : 0, count = (back ? n.channels : n.ahead) - from;
      const int64_t w = (count + LANES_OF<T> - 1) / LANES_OF<T> * LANES_OF<T>;
      if (count == 0) continue;
      T *h = before, *next = after;
      if (chunks > 1) std::fill(h, h + states * w, T(0));
      for (int64_t i = 0; i < chunks; i++) {
        const int64_t k = back ? chunks - 1 - i : i, steps = std::min(Q, n.steps - k * Q);
        read_chunk<false>(r, k, back, from, count, w);
        const T* square = cb + k * Q * Q;
        if (back) triangle<Part::upper>(square, y, steps, w);
        else triangle<Part::lower>(square, y, steps, w);
        if (i > 0) product<Part::all>(c + k * Q * states, states, 1, h, y, steps, n.states, w, true);
        for (int64_t t = 0; t < steps; t++) {
          const T *sum = y + t * w, *scale = kept + t * w;
          T* to = y_LE + (k * Q + t) * n.channels + from;
          int64_t e = 0;
          __builtin_prefetch(to + (back && k > 0 ? -Q : Q) * n.channels, 1);
          for (; e + LANES_OF<T> <= count; e += LANES_OF<T>) store(load(sum + e) * load(scale + e), to + e);
          if (e < count) store_some(load(sum + e) * load(scale + e), to + e, count - e);
        }
        if (i + 1 < chunks) pass_on(k, back, h, next, w), std::swap(h, next);
      }
    }
  }

  // y = tri(square) grown; beyond the diagonal a product wants zeros
  template <Part part>
  void triangle(const T* square, T* to, int64_t steps, int64_t w, bool turned = false) {
    T part_of[Q * Q];
    cut<part>(square, part_of);
    constexpr Part other = part == Part::lower ? Part::upper : Part::lower;
    if (turned) product<other>(part_of, 1, Q, g_y, to, steps, steps, w, false);
    else product<part>(part_of, Q, 1, grown, to, steps, steps, w, false);
  }
  template <Part part>
  static INLINE void cut(const T* square, T* to) {
    for (int64_t i = 0; i < Q; i++)
      for (int64_t j = 0; j < Q; j++) to[i * Q + j] = (part == Part::lower ? j <= i : j >= i) ? square[i * Q + j] : T(0);
  }

  void backward(const ScanRow<T>& r, const T* g_LE, int64_t g_step, const T* y_LE, T* gu_LE, T* gfade_LE, T* gb_LS,
                       T* gc_LS) {
    read_row(r);
    std::fill(gb, gb + 2 * chunks * Q * states, T(0));
    std::fill(g_cb, g_cb + chunks * Q * Q, T(0));
    for (const bool back : {false, true}) {
      const int64_t from = back ? n.ahead : 0, count = (back ? n.channels : n.ahead) - from;
      const int64_t w = (count + LANES_OF<T> - 1) / LANES_OF<T> * LANES_OF<T>, state = states * w;
      if (count == 0) continue;
      std::fill(before, before + state, T(0));
      for (int64_t i = 0; i + 1 < chunks; i++) {  // the states before each chunk, once more
        read_chunk<false>(r, back ? chunks - 1 - i : i, back, from, count, w);
        pass_on(back ? chunks - 1 - i : i, back, before + i * state, before + (i + 1) * state, w);
      }
      std::fill(gh, gh + state, T(0));
      for (int64_t i = chunks - 1; i >= 0; i--) {
        const int64_t k = back ? chunks - 1 - i : i, steps = std::min(Q, n.steps - k * Q), last = back ? 0 : steps - 1;
        const T *h = before + i * state, *b_k = b + k * Q * states, *c_k = c + k * Q * states;
        read_chunk<true>(r, k, back, from, count, w);
        T* sums = after;  // of the fades' gradient, per channel; first - gh . h at the chunk's end
        std::fill(sums, sums + w, T(0));
        if (i + 1 < chunks) {
          T* h_after = before + (i + 1) * state;
          for (int64_t s = 0; s < n.states; s++)
            for (int64_t e = 0; e < w; e += LANES_OF<T>) {
              const vec<T> g = load(gh + s * w + e);
              store(load(sums + e) - g * load(h_after + s * w + e), sums + e);
              store(g * (load(kept + last * w + e) * T(1 / START)), gh + s * w + e);
            }
        }
        for (int64_t t = 0; t < steps; t++)
          for (int64_t e = 0; e < w; e += LANES_OF<T>) {
            __builtin_prefetch(y_LE + (k * Q + t) * n.channels + from + e);
            const vec<T> g = read(g_LE + (k * Q + t) * g_step + from + e, count - e);
            store(g * load(kept + t * w + e), g_y + t * w + e);
          }
        T own[Q * Q] = {};
        std::fill(turned, turned + w * Q, T(0));
        transpose(grown, steps, w, turned, Q);
        product<Part::all>(g_y, w, 1, turned, own, steps, w, Q, false);
        if (back) cut<Part::upper>(own, own);
        else cut<Part::lower>(own, own);
        for (int64_t j = 0; j < Q * Q; j++) g_cb[k * Q * Q + j] += own[j];
        if (back) triangle<Part::upper>(cb + k * Q * Q, g_grown, steps, w, true);
        else triangle<Part::lower>(cb + k * Q * Q, g_grown, steps, w, true);
        if (i + 1 < chunks) {
          product<Part::all>(b_k, states, 1, gh, g_grown, steps, n.states, w, true);
          transpose(gh, states, w, turned, states);
          product<Part::all>(grown, w, 1, turned, gb + k * Q * states, steps, w, states, true);
        }
        if (i > 0) {
          transpose(h, states, w, turned, states);
          product<Part::all>(g_y, w, 1, turned, gc + k * Q * states, steps, w, states, true);
          product<Part::all>(c_k, 1, states, g_y, gh, n.states, steps, w, true);
        }
        for (int64_t j = 0; j < steps; j++) {
          const int64_t at = back ? j : steps - 1 - j, t = k * Q + at, to = t * n.channels + from;
          const T *u = r.u + t * r.u_step + from, *fade = r.fade + t * r.fade_step + from, *g = g_LE + t * g_step + from;
          for (int64_t e = 0; e < w; e += LANES_OF<T>) {
            const vec<T> gu = load(g_grown + at * w + e) * load(inverse + at * w + e);
            vec<T> g_age = fma(gu, read(u + e, count - e), load(sums + e));
            g_age -= read(g + e, count - e) * read(y_LE + to + e, count - e);
            store(g_age, sums + e);
            write(gu, gu_LE + to + e, count - e);
            write(read(fade + e, count - e) > T(4) ? vec<T>{} : g_age, gfade_LE + to + e, count - e);
          }
        }
      }
    }
    for (int64_t k = 0; k < chunks; k++) {
      const int64_t steps = std::min(Q, n.steps - k * Q), at = k * Q * states;
      product<Part::all>(g_cb + k * Q * Q, Q, 1, b + at, gc + at, steps, steps, states, true);
      product<Part::all>(g_cb + k * Q * Q, 1, Q, c + at, gb + at, steps, steps, states, true);
    }
    for (int64_t t = 0; t < n.steps; t++) {
      std::copy_n(gb + t * states, n.states, gb_LS + t * n.states);
      std::copy_n(gc + t * states, n.states, gc_LS + t * n.states);
    }
  }
};

// rows [from, to) of a call
template <typename T>
void scan_rows(const ScanCall<T>& call, int64_t from, int64_t to) {
  Scan<T> scan(call.sizes, false);
  for (int64_t row = from; row < to; row++) scan.forward(call.row(row), call.y + row * call.values());
}
template <typename T>
void scan_rows_backward(const ScanCall<T>& call, int64_t from, int64_t to) {
  Scan<T> scan(call.sizes, true);
  const int64_t each = call.sizes.steps * call.sizes.states;
  for (int64_t row = from; row < to; row++)
    scan.backward(call.row(row), call.g + row * call.g_row, call.g_step, call.y + row * call.values(), call.gu + row * call.values(),
                  call.gfade + row * call.values(), call.gb + row * each, call.gc + row * each);
}
