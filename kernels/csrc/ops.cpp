// The CPU's side of the operators that kernels/ops.py defines: checks, so that nothing is read or written elsewhere, and threads.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <sys/mman.h>

#include "gather_windows.h"
#include "kernels.h"

namespace {

using at::Tensor;
using Tensors = std::tuple<Tensor, Tensor, Tensor>;

constexpr int64_t ENOUGH = 1 << 17;  // multiply-adds for which another thread is worth waking, which takes some 10 us

template <typename T>
const T* from(const Tensor& x) { return x.const_data_ptr<T>(); }
template <typename T>
T* to(const Tensor& x) { return x.mutable_data_ptr<T>(); }

int64_t grain(int64_t each) { return std::max<int64_t>(1, ENOUGH / std::max<int64_t>(1, each)); }
Tensor rows_of(const Tensor& x) { return x.stride(-1) == 1 || x.size(-1) <= 1 ? x : x.contiguous(); }

// at::empty, the large in huge pages: page faults would take longer than the work
Tensor fresh(at::IntArrayRef shape, const at::TensorOptions& options) {
  const Tensor x = at::empty(shape, options);
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t PAGE = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(x.mutable_data_ptr());
  const uintptr_t first = (begin + PAGE - 1) / PAGE * PAGE, last = (begin + x.nbytes()) / PAGE * PAGE;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return x;
}

// ---- tokens

void check_ids(const Tensor& ids_BK, int64_t places) {
  TORCH_CHECK_TYPE(ids_BK.scalar_type() == at::kLong, "ids must be int64");
  const int64_t* id = from<int64_t>(ids_BK);
  for (int64_t i = 0; i < ids_BK.numel(); i++)
    TORCH_CHECK_INDEX(id[i] >= 0 && id[i] < places, "token ", id[i], " of ", places);
}

template <typename X, typename C, typename Z>
Tensor embed(const Tensor& x_BXD, const Tensor& space_BCD, const Tensor& time_PD, const Tensor& ids_BK, bool taken, Tensor z_BKD) {
  const TokenCall<X, C, Z> call{from<X>(x_BXD), x_BXD.stride(0), x_BXD.stride(1), from<C>(space_BCD), from<C>(time_PD),
                                from<int64_t>(ids_BK), to<Z>(z_BKD), ids_BK.size(1), space_BCD.size(1), time_PD.size(0),
                                time_PD.size(1), taken};
  at::parallel_for(0, ids_BK.numel(), grain(4 * call.width), [&](int64_t a, int64_t b) {
    CALL(embed_rows, call, a, b);
  });
  return z_BKD;
}

Tensor embed_tokens(const Tensor& x_BXD, const Tensor& space_BCD, const Tensor& time_PD, const Tensor& ids_BK, bool taken) {
  TORCH_CHECK_VALUE(x_BXD.dim() == 3 && space_BCD.dim() == 3 && time_PD.dim() == 2 && ids_BK.dim() == 2, "x B x X x D, space B x C x D, "
                    "time P x D, ids B x K");
  const int64_t windows = ids_BK.size(0), width = time_PD.size(1), places = space_BCD.size(1) * time_PD.size(0);
  TORCH_CHECK_VALUE(x_BXD.size(0) == windows && space_BCD.size(0) == windows, "x, space and ids must be of as many windows");
  TORCH_CHECK_VALUE(x_BXD.size(2) == width && space_BCD.size(2) == width, "x, space and time must be equally wide");
  TORCH_CHECK_VALUE(x_BXD.size(1) == (taken ? ids_BK.size(1) : places), "x must have ", taken ? ids_BK.size(1) : places,
                    " tokens a window, not ", x_BXD.size(1));
  const Tensor ids = ids_BK.contiguous(), x = rows_of(x_BXD);
  check_ids(ids, places);
  const auto wide = c10::promoteTypes(space_BCD.scalar_type(), time_PD.scalar_type());
  const auto result = c10::promoteTypes(x.scalar_type(), wide), sums = c10::promoteTypes(result, at::kFloat);
  const Tensor space = space_BCD.to(sums).contiguous(), time = time_PD.to(sums).contiguous();
  const Tensor z = fresh({windows, ids.size(1), width}, x.options().dtype(result));
  const bool half = x.scalar_type() == at::kBFloat16;
  if (sums == at::kDouble) return embed<double, double, double>(x.to(sums), space, time, ids, taken, z);
  if (half && result == at::kBFloat16) return embed<c10::BFloat16, float, c10::BFloat16>(x, space, time, ids, taken, z);
  if (half && result == at::kFloat) return embed<c10::BFloat16, float, float>(x, space, time, ids, taken, z);
  const Tensor plain = embed<float, float, float>(x.to(at::kFloat), space, time, ids, taken, result == at::kFloat ? z : z.to(at::kFloat));
  return plain.to(result);
}

template <typename T, typename A>
Tensors embed_back(const Tensor& grad, const Tensor& ids, int64_t channels, int64_t patches, bool need_x, bool need_space, bool need_time) {
  const int64_t windows = grad.size(0), tokens = grad.size(1), width = grad.size(2), places = channels * patches;
  const auto room = [&](bool need, at::IntArrayRef shape) { return fresh(need ? shape : at::IntArrayRef{0}, grad.options()); };
  Tensors g{room(need_x, {windows, places, width}), room(need_space, {windows, channels, width}), room(need_time, {patches, width})};
  std::vector<A> times(need_time ? windows * patches * width : 0);  // of every window, so that any number of threads gives the same sum
  at::parallel_for(0, windows, grain(2 * tokens * width), [&](int64_t first, int64_t last) {
    std::vector<int64_t> numbers(places + 1 + tokens);
    std::vector<A> sums(2 * width);
    for (int64_t w = first; w < last; w++)
      CALL(gather_gradients, from<T>(grad) + w * tokens * width, from<int64_t>(ids) + w * tokens, tokens, channels, patches, width,
           numbers.data(), sums.data(), need_x ? to<T>(std::get<0>(g)) + w * places * width : nullptr,
           need_space ? to<T>(std::get<1>(g)) + w * channels * width : nullptr, need_time ? times.data() + w * patches * width : nullptr);
  });
  if (need_time) {
    for (int64_t w = 1; w < windows; w++)
      for (int64_t i = 0; i < patches * width; i++) times[i] += times[w * patches * width + i];
    T* result = to<T>(std::get<2>(g));
    if (windows) std::copy_n(times.begin(), patches * width, result);
    else std::fill_n(result, patches * width, T(0));
  }
  return g;
}

Tensors embed_tokens_backward(const Tensor& grad_BKD, const Tensor& ids_BK, int64_t channels, int64_t patches, bool need_x,
                              bool need_space, bool need_time) {
  TORCH_CHECK_VALUE(grad_BKD.dim() == 3 && ids_BK.sizes() == grad_BKD.sizes().slice(0, 2), "grad B x K x D, ids B x K");
  TORCH_CHECK_VALUE(channels >= 0 && patches >= 0, channels, " channels of ", patches, " patches");
  const Tensor ids = ids_BK.contiguous(), grad = grad_BKD.contiguous();
  check_ids(ids, channels * patches);
  const auto run = [&](auto embed_back, const Tensor& grad) { return embed_back(grad, ids, channels, patches, need_x, need_space, need_time); };
  if (grad.scalar_type() == at::kDouble) return run(embed_back<double, double>, grad);
  if (grad.scalar_type() == at::kBFloat16) return run(embed_back<c10::BFloat16, float>, grad);
  const auto [x, space, time] = run(embed_back<float, float>, grad.to(at::kFloat));
  return {x.to(grad.scalar_type()), space.to(grad.scalar_type()), time.to(grad.scalar_type())};
}

// ---- moving average

template <typename T, typename S, typename C>
void average(const Tensor& teacher, const Tensor& student, const std::optional<Tensor>& copy, double momentum) {
  T* t = to<T>(teacher);
  const S* s = from<S>(student);
  C* c = copy ? to<C>(*copy) : nullptr;
  at::parallel_for(0, teacher.numel(), ENOUGH, [&](int64_t a, int64_t b) {
    for (int64_t i = a; i < b; i += 2048)  // of which the copy is made while they are in L1
      CALL(average, t + i, s + i, c ? c + i : c, std::min<int64_t>(2048, b - i), static_cast<T>(1 - momentum));
  });
}

void ema_(at::TensorList teacher, at::TensorList student, double momentum, at::TensorList copies) {
  TORCH_CHECK_VALUE(teacher.size() == student.size() && (copies.empty() || copies.size() == teacher.size()), "as many tensors each");
  for (size_t i = 0; i < teacher.size(); i++) {
    const Tensor &t = teacher[i], s = student[i];
    const std::optional<Tensor> c = copies.empty() ? std::nullopt : std::optional<Tensor>(copies[i]);
    TORCH_CHECK_VALUE(t.sizes() == s.sizes() && (!c || t.sizes() == c->sizes()), "tensors ", i, " must be of one shape");
    const bool dense = t.is_contiguous() && s.is_contiguous() && (!c || c->is_contiguous());
    const auto is = [&](at::ScalarType a, at::ScalarType b) {
      return dense && t.scalar_type() == a && s.scalar_type() == b && (!c || c->scalar_type() == a || c->scalar_type() == at::kBFloat16);
    };
    const bool half = c && c->scalar_type() == at::kBFloat16;
    if (is(at::kFloat, at::kFloat)) (half ? average<float, float, c10::BFloat16> : average<float, float, float>)(t, s, c, momentum);
    else if (is(at::kFloat, at::kBFloat16)) (half ? average<float, c10::BFloat16, c10::BFloat16> : average<float, c10::BFloat16, float>)(t, s, c, momentum);
    else if (is(at::kDouble, at::kDouble) && !half) average<double, double, double>(t, s, c, momentum);
    else {
      t.lerp_(s.to(t.scalar_type()), 1 - momentum);
      if (c) c->copy_(t);
    }
  }
}

// ---- streaming filter

template <typename T>
Tensor filter(const Tensor& x, const Tensor& sos, const Tensor& state) {
  const int64_t channels = x.size(0), steps = x.size(1), sections = sos.size(0);
  const Tensor y = at::empty({channels, steps}, x.options());
  const T* x_CT = from<T>(x);
  T* y_CT = to<T>(y);
  const double* f = from<double>(sos);
  double* z = to<double>(state);
  constexpr int64_t GROUP = 24;  // channels: as many as the loop takes at a time, with AVX2
  const auto run = [&](int64_t a, int64_t b) {
    CALL(filter_channels, x_CT, steps, y_CT, steps, steps, f, sections, z, channels, GROUP * a, std::min(GROUP * b, channels));
  };
  const int64_t groups = (channels + GROUP - 1) / GROUP, least = grain(GROUP * 5 * sections * steps);
  if (groups <= least) run(0, groups);  // a live chunk: not even the question how many threads there are
  else at::parallel_for(0, groups, least, run);
  return y;
}

Tensor sos_stream(const Tensor& x_CT, const Tensor& sos_S6, const Tensor& state_S2C) {
  TORCH_CHECK_VALUE(x_CT.dim() == 2 && sos_S6.dim() == 2 && sos_S6.size(1) == 6, "x must be C x T and sos S x 6");
  TORCH_CHECK_VALUE(sos_S6.size(0) <= MOST_SECTIONS, sos_S6.size(0), " sections are more than ", MOST_SECTIONS);
  TORCH_CHECK_VALUE(state_S2C.dim() == 3 && state_S2C.size(0) == sos_S6.size(0) && state_S2C.size(1) == 2 &&
                    state_S2C.size(2) == x_CT.size(0) && state_S2C.is_contiguous(), "state must be a contiguous S x 2 x C");
  TORCH_CHECK_TYPE(sos_S6.scalar_type() == at::kDouble && state_S2C.scalar_type() == at::kDouble, "sos and state must be float64");
  TORCH_CHECK_TYPE(x_CT.scalar_type() == at::kFloat || x_CT.scalar_type() == at::kDouble, "x must be float32 or float64");
  const Tensor x = x_CT.contiguous(), sos = sos_S6.contiguous();
  for (int64_t s = 0; s < sos.size(0); s++)
    TORCH_CHECK_VALUE(from<double>(sos)[6 * s + 3] == 1, "section ", s, " isn't b0 b1 b2 1 a1 a2: divide it by its fourth number");
  state_S2C.unsafeGetTensorImpl()->bump_version();  // or a backward pass would take the new for the old
  return x.scalar_type() == at::kDouble ? filter<double>(x, sos, state_S2C) : filter<float>(x, sos, state_S2C);
}

// ---- selective scan

void check_scan(const Tensor& u, const Tensor& fade, const Tensor& b, const Tensor& c, int64_t ahead) {
  TORCH_CHECK_VALUE(u.dim() == 3 && b.dim() == 3 && fade.sizes() == u.sizes() && c.sizes() == b.sizes() &&
                    b.sizes().slice(0, 2) == u.sizes().slice(0, 2), "u and fade must be R x L x E, b and c R x L x S");
  TORCH_CHECK_VALUE(ahead >= 0 && ahead <= u.size(2), ahead, " channels ahead of ", u.size(2));
  for (const Tensor& x : {u, fade, b, c})
    TORCH_CHECK_TYPE(x.scalar_type() == u.scalar_type() && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble),
                     "u, fade, b and c must be all float32 or all float64");
}

template <typename T>
ScanCall<T> scan_call(const Tensor& u, const Tensor& fade, const Tensor& b, const Tensor& c, const Tensor& y, int64_t ahead) {
  return {{u.size(1), u.size(2), b.size(2), ahead},
          {from<T>(u), from<T>(fade), from<T>(b), from<T>(c), u.stride(1), fade.stride(1), b.stride(1), c.stride(1)},
          u.stride(0), fade.stride(0), b.stride(0), c.stride(0), to<T>(y)};
}

int64_t scan_grain(const Tensor& u, const Tensor& b) { return grain(u.size(1) * u.size(2) * (b.size(2) + 16)); }

template <typename T>
Tensor scan(const Tensor& u, const Tensor& fade, const Tensor& b, const Tensor& c, int64_t ahead) {
  const Tensor y = fresh(u.sizes(), u.options());
  const auto call = scan_call<T>(u, fade, b, c, y, ahead);
  at::parallel_for(0, u.size(0), scan_grain(u, b), [&](int64_t i, int64_t j) { CALL(scan_rows, call, i, j); });
  return y;
}

Tensor selective_scan(const Tensor& u, const Tensor& fade, const Tensor& b, const Tensor& c, int64_t ahead) {
  check_scan(u, fade, b, c, ahead);
  const auto run = u.scalar_type() == at::kDouble ? scan<double> : scan<float>;
  return run(rows_of(u), rows_of(fade), rows_of(b), rows_of(c), ahead);
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor> scan_back(const Tensor& g, const Tensor& u, const Tensor& fade, const Tensor& b,
                                                     const Tensor& c, const Tensor& y, int64_t ahead) {
  const Tensor gu = fresh(u.sizes(), u.options()), gfade = fresh(u.sizes(), u.options());
  const Tensor gb = fresh(b.sizes(), b.options()), gc = fresh(b.sizes(), b.options());
  auto call = scan_call<T>(u, fade, b, c, y, ahead);
  call.g = from<T>(g), call.g_row = g.stride(0), call.g_step = g.stride(1);
  call.gu = to<T>(gu), call.gfade = to<T>(gfade), call.gb = to<T>(gb), call.gc = to<T>(gc);
  at::parallel_for(0, u.size(0), scan_grain(u, b), [&](int64_t i, int64_t j) { CALL(scan_rows_backward, call, i, j); });
  return {gu, gfade, gb, gc};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> selective_scan_backward(const Tensor& g, const Tensor& u, const Tensor& fade, const Tensor& b,
                                                                   const Tensor& c, const Tensor& y, int64_t ahead) {
  check_scan(u, fade, b, c, ahead);
  TORCH_CHECK_VALUE(g.sizes() == u.sizes() && y.sizes() == u.sizes(), "the gradient and y must have the shape of u");
  TORCH_CHECK_TYPE(g.scalar_type() == u.scalar_type() && y.scalar_type() == u.scalar_type(), "the gradient and y must be of u's dtype");
  const auto run = u.scalar_type() == at::kDouble ? scan_back<double> : scan_back<float>;
  return run(rows_of(g), rows_of(u), rows_of(fade), rows_of(b), rows_of(c), y.contiguous(), ahead);
}

// ---- attention

void check_attend(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& real) {
  TORCH_CHECK_VALUE(q.dim() == 4 && k.dim() == 4 && k.sizes() == v.sizes() && q.sizes().slice(0, 2) == k.sizes().slice(0, 2) &&
                    q.size(3) == k.size(3), "q must be B x H x Q x W, k and v B x H x K x W");
  for (const Tensor& x : {q, k, v})
    TORCH_CHECK_TYPE(x.scalar_type() == q.scalar_type() && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble ||
                     x.scalar_type() == at::kBFloat16), "q, k and v must be all float32, all float64 or all bfloat16");
  if (!real) return;
  TORCH_CHECK_VALUE(real->dim() == 2 && real->size(0) == k.size(0) && real->size(1) == k.size(2), "real must be B x K");
  TORCH_CHECK_TYPE(real->scalar_type() == at::kBool, "real must be bool");
}

// B x H x rows x W, of which a row's heads lie beside each other, as layers want them
Tensor heads_beside(const Tensor& like) {
  return fresh({like.size(0), like.size(2), like.size(1), like.size(3)}, like.options()).transpose(1, 2);
}

template <typename C, typename T, typename A>
struct Attending {
  static typename AttendCall<T, A>::Rows rows(const Tensor& x) {
    return {reinterpret_cast<T*>(const_cast<C*>(from<C>(x))), x.stride(0), x.stride(1), x.stride(2)};
  }
  static AttendCall<T, A> call(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& real, const Tensor& y,
                               const Tensor& level) {
    return {q.size(1), q.size(2), k.size(2), q.size(3), rows(q), rows(k), rows(v), rows(y), real ? from<bool>(*real) : nullptr,
            const_cast<A*>(from<A>(level))};
  }
  static int64_t each(const Tensor& q, const Tensor& k) { return grain(2 * q.size(2) * k.size(2) * (q.size(3) + 8)); }

  static std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& real) {
    const Tensor y = heads_beside(q);
    const Tensor level = at::empty({q.size(0), q.size(1), q.size(2)}, q.options().dtype(c10::CppTypeToScalarType<A>::value));
    const auto n = call(q, k, v, real, y, level);
    at::parallel_for(0, q.size(0) * q.size(1), each(q, k), [&](int64_t i, int64_t j) { CALL(attend_heads, n, i, j); });
    return {y, level};
  }
  static Tensors backward(const Tensor& g, const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& real,
                          const Tensor& y, const Tensor& level) {
    const Tensor gq = heads_beside(q), gk = heads_beside(k), gv = heads_beside(v);
    auto n = call(q, k, v, real, y, level);
    n.g = rows(g), n.gq = rows(gq), n.gk = rows(gk), n.gv = rows(gv);
    at::parallel_for(0, q.size(0) * q.size(1), each(q, k), [&](int64_t i, int64_t j) { CALL(attend_heads_backward, n, i, j); });
    return {gq, gk, gv};
  }
};
using AttendHalf = Attending<c10::BFloat16, uint16_t, float>;
using AttendFloat = Attending<float, float, float>;
using AttendDouble = Attending<double, double, double>;

std::tuple<Tensor, Tensor> attend(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& real) {
  check_attend(q, k, v, real);
  const auto dtype = q.scalar_type();
  const auto run = dtype == at::kDouble ? AttendDouble::forward : dtype == at::kFloat ? AttendFloat::forward : AttendHalf::forward;
  return run(rows_of(q), rows_of(k), rows_of(v), real ? std::optional(real->contiguous()) : real);
}

Tensors attend_backward(const Tensor& g, const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& real,
                        const Tensor& y, const Tensor& level) {
  check_attend(q, k, v, real);
  TORCH_CHECK_VALUE(g.sizes() == q.sizes() && y.sizes() == q.sizes() && level.sizes() == q.sizes().slice(0, 3) && level.is_contiguous(),
                    "the gradient and y must have the shape of q, level all but its last axis");
  const auto dtype = q.scalar_type();
  TORCH_CHECK_TYPE(g.scalar_type() == dtype && y.scalar_type() == dtype &&
                   level.scalar_type() == (dtype == at::kDouble ? at::kDouble : at::kFloat), "the gradient and y must be of q's dtype");
  const auto run = dtype == at::kDouble ? AttendDouble::backward : dtype == at::kFloat ? AttendFloat::backward : AttendHalf::backward;
  return run(rows_of(g), rows_of(q), rows_of(k), rows_of(v), real ? std::optional(real->contiguous()) : real, rows_of(y), level);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(berger, m) {
  m.def("processor_path() -> str", [] { return std::string(PROCESSORS[static_cast<int>(processor())]); });
  m.def("threads() -> int", [] {  // that take part in a loop of these operators
    std::atomic<int64_t> parts{0};
    at::parallel_for(0, 1 << 10, 1, [&](int64_t, int64_t) { parts++; });
    return parts.load();
  });
}
TORCH_LIBRARY_IMPL(berger, CPU, m) {
  m.impl("gather_windows", gather_windows);
  m.impl("embed_tokens", embed_tokens);
  m.impl("embed_tokens_backward", embed_tokens_backward);
  m.impl("ema_", ema_);
  m.impl("sos_stream", sos_stream);
  m.impl("selective_scan", selective_scan);
  m.impl("selective_scan_backward", selective_scan_backward);
  m.impl("attend", attend);
  m.impl("attend_backward", attend_backward);
}
