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

// Gradients of tokens summed in A per place: the quotient of the token's number, or the remainder
template <typename T, typename A>
void sum_rows(const T* grad, const int64_t* ids, int64_t tokens, int64_t width, int64_t by, bool remainder, A* to) {
  for (int64_t k = 0; k < tokens; k++) {
    const T* __restrict from = grad + k * width;
    A* __restrict sum = to + (remainder ? ids[k] % by : ids[k] / by) * width;
    for (int64_t d = 0; d < width; d++) sum[d] += static_cast<A>(from[d]);
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
