// Tokens by number plus the codes of their places, and the moving average of many tensors. The meanings are embed_tokens and ema_ in
// kernels/reference.py. Included once per instruction set.

template <typename T>
INLINE float wide(T x) { return static_cast<float>(x); }
INLINE double wide(double x) { return x; }

// Rows [from, to) of the B x K: z = x + (space + time), summed as C; x has N rows a window, or K if `taken`.
template <typename X, typename C, typename Z>
void embed_rows(const TokenCall<X, C, Z>& n, int64_t from, int64_t to) {
  for (int64_t row = from; row < to; row++) {
    const int64_t b = row / n.tokens, id = n.ids[row];
    const X* __restrict x = n.x + b * n.x_window + (n.taken ? row % n.tokens : id) * n.x_row;
    const C *__restrict space = n.space + (b * n.channels + id / n.patches) * n.width, *__restrict time = n.time + id % n.patches * n.width;
    Z* __restrict z = n.z + row * n.width;
    for (int64_t d = 0; d < n.width; d++) z[d] = static_cast<Z>(static_cast<C>(x[d]) + (space[d] + time[d]));
  }
}

// The gradients of one window from those of its K tokens, each row written once: gx (N rows), gspace (C rows) in T, and in A what its
// tokens add to gtime (P rows). Null where one isn't wanted. `room` is N + 1 + K numbers and a row of A for gx and for gspace.
template <typename T, typename A>
void gather_gradients(const T* grad, const int64_t* ids, int64_t tokens, int64_t channels, int64_t patches, int64_t width, int64_t* room,
                      A* sums, T* gx, T* gspace, A* gtime) {
  const int64_t places = channels * patches;
  int64_t *first = room, *order = room + places + 1;  // the tokens in order of their places
  std::fill_n(first, places + 1, 0);
  for (int64_t k = 0; k < tokens; k++) first[ids[k] + 1]++;
  for (int64_t p = 0; p < places; p++) first[p + 1] += first[p];
  for (int64_t k = 0; k < tokens; k++) order[first[ids[k]]++] = k;  // now first[p] is where place p ends
  A *__restrict of_place = sums, *__restrict of_channel = sums + width;
  for (int64_t p = 0, i = 0; p < places; p++) {
    if (p % patches == 0) std::fill_n(of_channel, width, A(0));
    const int64_t count = first[p] - i;
    const T* __restrict from = grad + (count ? order[i] : 0) * width;
    T* __restrict to = gx ? gx + p * width : nullptr;
    if (gx && count == 0) std::fill_n(to, width, T(0));
    if (gx && count == 1) std::copy_n(from, width, to);
    if (gx && count > 1) std::fill_n(of_place, width, A(0));
    for (const int64_t last = first[p]; i < last; i++) {
      from = grad + order[i] * width;
      A* __restrict of_patch = gtime ? gtime + p % patches * width : nullptr;
      for (int64_t d = 0; gspace && d < width; d++) of_channel[d] += static_cast<A>(from[d]);
      for (int64_t d = 0; gtime && d < width; d++) of_patch[d] += static_cast<A>(from[d]);
      for (int64_t d = 0; gx && count > 1 && d < width; d++) of_place[d] += static_cast<A>(from[d]);
    }
    for (int64_t d = 0; gx && count > 1 && d < width; d++) to[d] = static_cast<T>(of_place[d]);
    if (gspace && (p + 1) % patches == 0)
      for (int64_t d = 0; d < width; d++) gspace[p / patches * width + d] = static_cast<T>(of_channel[d]);
  }
}

// t += weight (s - t), or from the other end where that is more exact (as torch.lerp), and copy = t
template <typename T, typename S, typename C>
void average(T* __restrict t, const S* __restrict s, C* __restrict copy, int64_t n, T weight) {
  const bool near = std::abs(weight) < T(0.5);
  const T rest = T(1) - weight;
  for (int64_t i = 0; i < n; i++) {
    const T from = t[i], by = static_cast<T>(s[i]) - from;
    t[i] = near ? from + weight * by : static_cast<T>(s[i]) - rest * by;
  }
  if (copy)
    for (int64_t i = 0; i < n; i++) copy[i] = static_cast<C>(t[i]);
}
