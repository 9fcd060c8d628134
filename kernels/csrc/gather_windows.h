// Windows out of time-major float16 files, as one channel-major batch. The meaning is gather_windows in kernels/reference.py.
//
// A window is read in blocks that stay in L2, and a block goes out in tiles of 16 steps x 8 channels of the file: turned in registers,
// converted, and written as the cache lines they are. The tiles run over the file's channels and know which rows of the batch want each of
// them, so that identity, permutation, repeats and gaps are one code path, and a tile that nobody wants is left out. Every result is
// bit-equal to the reference: no fused multiply-add.
//
// Measured and left out: mmap instead of pread (1.5 x on one thread while the file is in memory, but a truncated shard or a failing
// disk then kills the process), OpenMP's threads (they spin for milliseconds after each batch, at the cost of the training step beside
// the loader, and hang in a forked process).

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <fcntl.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#define WITH_AVX2 __attribute__((target("avx2,f16c")))  // these functions only: the rest of the binary runs on any x86-64
#endif

namespace {

constexpr int64_t STEPS = 16, LANES = 8;  // time steps and channels of a tile
constexpr int64_t BLOCK_BYTES = 64 << 10;
constexpr int64_t STREAMED_BYTES = 16 << 20;  // a batch from this size on is written past the caches, which it would only flush
// Bytes are read to where they sit in a cache line of their file: a copy to 1-63 bytes further on than its source, modulo a page,
// is three times slower on processors that copy by `rep movsb`.
constexpr int64_t LINE = 64;
constexpr int64_t PER_THREAD = 128 << 10;  // values; waking a thread takes as long as some 10,000
constexpr int64_t MOST_CHANNELS = 1 << 20;

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct Row {  // one of the batch: which channel of the file it wants, and what becomes of it
  int64_t channel, at;
  float gain, bias;
};

// ---- a block: steps x channels of the file, to rows y of `samples`; sorted by channel. Reads whole tiles, so past both ends.

template <typename out_t>
struct Block {
  const uint16_t* x;
  int64_t steps, channels, samples;
  const Row *first, *last;
  float clip;
  bool streamed;
  out_t* y;
};

template <typename out_t>
void write_block(const Block<out_t>& n) {
  for (const Row* row = n.first; row < n.last; row++)
    for (int64_t t = 0; t < n.steps; t++) {
      float v = c10::Half(n.x[t * n.channels + row->channel], c10::Half::from_bits());
      v = v < -n.clip ? -n.clip : v > n.clip ? n.clip : v;  // NaN compares false and passes, as in torch.clamp
      v = v * row->gain;
      n.y[row->at * n.samples + t] = static_cast<out_t>(v + row->bias);
    }
}

#ifdef WITH_AVX2
// sixteen steps of eight channels, `x` at the first of both
WITH_AVX2 inline void turn(const uint16_t* x, int64_t channels, __m256i* y) {
  __m256i r[8], a[8], b[8];
  for (int i = 0; i < 8; i++) {  // lower half step i, upper half step i + 8
    const auto* low = reinterpret_cast<const __m128i*>(x + i * channels);
    const auto* high = reinterpret_cast<const __m128i*>(x + (i + 8) * channels);
    r[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(low)), _mm_loadu_si128(high), 1);
  }
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_epi16(r[i], r[i + 1]);
    a[i + 1] = _mm256_unpackhi_epi16(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      b[i + 2 * j] = _mm256_unpacklo_epi32(a[i + j], a[i + j + 2]);
      b[i + 2 * j + 1] = _mm256_unpackhi_epi32(a[i + j], a[i + j + 2]);
    }
  for (int i = 0; i < 4; i++) {
    y[2 * i] = _mm256_unpacklo_epi64(b[i], b[i + 4]);
    y[2 * i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 4]);
  }
}

WITH_AVX2 inline __m256i rounded(__m256 v) {  // to bfloat16, nearest even, in the low half; any NaN becomes 0x7fc0, as c10 does it
  const __m256i bits = _mm256_castps_si256(v), one = _mm256_set1_epi32(1), half = _mm256_set1_epi32(0x7fff);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
  const __m256i upper = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, half)), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(upper, _mm256_set1_epi32(0x7fc0), nan);
}

WITH_AVX2 inline void put(__m256i v, void* y, bool past_caches) {
  if (past_caches) _mm256_stream_si256(static_cast<__m256i*>(y), v);
  else _mm256_storeu_si256(static_cast<__m256i*>(y), v);
}
WITH_AVX2 inline void put(__m256 a, __m256 b, float* y, bool past_caches) {
  put(_mm256_castps_si256(a), y, past_caches);
  put(_mm256_castps_si256(b), y + 8, past_caches);
}
WITH_AVX2 inline void put(__m256 a, __m256 b, c10::BFloat16* y, bool past_caches) {
  put(_mm256_permute4x64_epi64(_mm256_packus_epi32(rounded(a), rounded(b)), 0xd8), y, past_caches);
}

template <typename out_t>
WITH_AVX2 void write_block_avx2(const Block<out_t>& n) {
  const __m256 high = _mm256_set1_ps(n.clip), low = _mm256_set1_ps(-n.clip);
  const auto finish = [&](__m128i half, const Row& row) WITH_AVX2 {
    const __m256 v = _mm256_max_ps(low, _mm256_min_ps(high, _mm256_cvtph_ps(half)));  // the second operand, when it is NaN
    return _mm256_add_ps(_mm256_mul_ps(v, _mm256_set1_ps(row.gain)), _mm256_set1_ps(row.bias));
  };
  for (const Row *row = n.first, *next; row < n.last; row = next) {
    const int64_t from = row->channel / LANES * LANES;
    for (next = row; next < n.last && next->channel < from + LANES;) next++;
    for (int64_t t = 0; t < n.steps; t += STEPS) {
      __m256i tile[LANES];
      turn(n.x + t * n.channels + from, n.channels, tile);
      for (const Row* r = row; r < next; r++) {
        const __m256i* halves = tile + (r->channel - from);
        const __m256 a = finish(_mm256_castsi256_si128(*halves), *r), b = finish(_mm256_extracti128_si256(*halves, 1), *r);
        out_t* y = n.y + r->at * n.samples + t;
        if (t + STEPS <= n.steps) {
          put(a, b, y, n.streamed && reinterpret_cast<uintptr_t>(y) % 32 == 0);
        } else {
          out_t some[STEPS];
          put(a, b, some, false);
          std::copy_n(some, n.steps - t, y);
        }
      }
    }
  }
  if (n.streamed) _mm_sfence();  // before anyone hears that the block is there
}
#endif

// ---- which of the two runs on this processor

bool fast_gather() {
#ifdef WITH_AVX2
  static const bool chosen = [] {
    const char* wanted = std::getenv("BERGER_KERNELS");
    const bool generic = wanted != nullptr && std::string_view(wanted) == "generic";
    return !generic && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  }();
  return chosen;
#else
  return false;
#endif
}

template <typename out_t>
void write(const Block<out_t>& block) {
#ifdef WITH_AVX2
  if (fast_gather()) return write_block_avx2(block);
#endif
  write_block(block);
}

// ---- reading

struct Read {
  int error = 0;  // errno; 0 with too few bytes means that the file ended
  int64_t bytes = 0;
};

// Without `wait` only what is in the page cache: anything else is a short read.
Read read_at(int fd, char* to, int64_t bytes, int64_t offset, bool wait) {
  Read got;
  while (got.bytes < bytes) {
    iovec part{to + got.bytes, static_cast<size_t>(bytes - got.bytes)};
#ifdef RWF_NOWAIT
    const ssize_t n = preadv2(fd, &part, 1, offset + got.bytes, wait ? 0 : RWF_NOWAIT);
#else
    const ssize_t n = wait ? preadv(fd, &part, 1, offset + got.bytes) : 0;
#endif
    if (n > 0) got.bytes += n;
    if (n < 0 && errno != EINTR) got.error = errno;
    if (n == 0 || got.error != 0) break;
  }
  return got;
}

void announce(int fd, int64_t offset, int64_t bytes) {  // starts the disk read and returns
#ifdef POSIX_FADV_WILLNEED
  posix_fadvise(fd, offset, bytes, POSIX_FADV_WILLNEED);
#endif
}

// ---- one batch

template <typename out_t>
struct Batch {
  int64_t windows, channels, samples;
  const int64_t *fds, *offsets, *file_channels;
  const int32_t* map;
  const float *gain, *bias;  // may be null
  float clip;
  out_t* out;

  struct Scratch {
    std::unique_ptr<uint16_t[]> read;
    std::vector<Row> rows;
  };

  int64_t block_of(int64_t file_channels) const {
    return std::min(round_up(samples, STEPS), round_up(std::max(BLOCK_BYTES / 2 / file_channels, int64_t{1}), STEPS));
  }

  Scratch scratch() const {
    int64_t read = 0;
    for (int64_t b = 0; b < windows; b++)
      read = std::max(read, LINE / 2 + block_of(file_channels[b]) * file_channels[b] + LANES);
    return {std::make_unique<uint16_t[]>(read), {}};
  }

  bool streamed() const { return windows * channels * samples * int64_t{sizeof(out_t)} >= STREAMED_BYTES; }

  void choose_rows(int64_t b, std::vector<Row>& rows) const {
    rows.clear();
    for (int64_t at = b * channels; at < (b + 1) * channels; at++)
      if (map[at] < 0) std::fill_n(out + at * samples, samples, out_t(0));
      else rows.push_back({map[at], at, gain ? gain[at] : 1.0f, bias ? bias[at] : -0.0f});  // x + -0.0 is x, which x + 0.0 is not
    const auto by_channel = [](const Row& a, const Row& b) { return a.channel < b.channel; };
    if (!std::is_sorted(rows.begin(), rows.end(), by_channel)) std::sort(rows.begin(), rows.end(), by_channel);
  }

  Read window(int64_t b, bool wait, Scratch& scratch) const {
    const int64_t wide = file_channels[b], block = block_of(wide);
    const auto fd = static_cast<int>(fds[b]);
    Read got;
    for (int64_t t = 0; t < samples; t += block) {
      const int64_t steps = std::min(block, samples - t), bytes = steps * wide * 2, offset = offsets[b] + t * wide * 2;
      uint16_t* x = scratch.read.get();
      x += (static_cast<uint64_t>(offset) - reinterpret_cast<uintptr_t>(x)) % LINE / 2;  // see LINE
      const Read part = read_at(fd, reinterpret_cast<char*>(x), bytes, offset, wait);
      got.bytes += part.bytes;
      got.error = part.error;
      if (part.bytes < bytes) {
        if (!wait) announce(fd, offset, (samples - t) * wide * 2);
        return got;
      }
      if (t == 0) choose_rows(b, scratch.rows);
      const Row* first = scratch.rows.data();
      write(Block<out_t>{x, steps, wide, samples, first, first + scratch.rows.size(), clip, streamed(), out + t});
    }
    return got;
  }
};

// A forked process has none of its parent's threads, and the pool's lock may be held there by one of them for good.
inline std::atomic<bool> forked{false};
[[maybe_unused]] const int watching = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// Calls work(i, thread) for i in [0, n), on the caller's thread and on others of the inter-op pool. It waits for work that has
// begun, never for a helper to come, so that it can't hang beside other callers.
template <typename Work>
void spread(int64_t n, int64_t threads, const Work& work) {
  struct Progress {
    std::atomic<int64_t> next{0}, done{0};
  };
  const auto progress = std::make_shared<Progress>();  // a helper may look at it after the caller has left
  const auto loop = [n, progress, &work](int64_t thread) {
    for (int64_t i = progress->next++; i < n; i = progress->next++) {
      work(i, thread);
      if (++progress->done == n) progress->done.notify_all();
    }
  };
  for (int64_t thread = 1; thread < std::min(threads, n); thread++) at::launch([loop, thread] { loop(thread); });
  loop(0);
  // a helper's last item is a matter of microseconds, and who sleeps on a busy machine gets its core back milliseconds later
  for (int spin = 0; spin < 20000 && progress->done < n; spin++) continue;
  for (int64_t done = progress->done; done < n; done = progress->done) progress->done.wait(done);
}

struct Failure {
  int64_t window = std::numeric_limits<int64_t>::max();
  Read got;
};

// First every window that is in the page cache; the others' disk reads are all under way before the first of them is waited for.
template <typename out_t>
Failure read_all(const Batch<out_t>& batch) {
  const auto whole = [&](int64_t b) { return batch.samples * batch.file_channels[b] * 2; };
  const int64_t worth = 1 + batch.windows * batch.channels * batch.samples / PER_THREAD;
  const int64_t most = forked ? 1 : at::get_num_threads();
  const int64_t threads = std::max<int64_t>(1, std::min({most, batch.windows, worth}));
  std::vector<typename Batch<out_t>::Scratch> scratch;
  for (int64_t thread = 0; thread < threads; thread++) scratch.push_back(batch.scratch());

  std::vector<char> read(batch.windows);
  spread(batch.windows, threads, [&](int64_t b, int64_t thread) {
    read[b] = batch.window(b, false, scratch[thread]).bytes == whole(b);
  });
  std::vector<int64_t> cold;
  for (int64_t b = 0; b < batch.windows; b++)
    if (!read[b]) cold.push_back(b);

  Failure first;
  std::mutex mutex;
  spread(cold.size(), threads, [&](int64_t i, int64_t thread) {
    const Read got = batch.window(cold[i], true, scratch[thread]);
    if (got.bytes == whole(cold[i])) return;
    const std::lock_guard<std::mutex> lock(mutex);
    if (cold[i] < first.window) first = {cold[i], got};
  });
  return first;
}

// ---- the operator

template <typename out_t>
void check(const Batch<out_t>& batch) {
  constexpr int64_t most = std::numeric_limits<int64_t>::max() / 4;
  for (int64_t b = 0; b < batch.windows; b++) {
    const int64_t wide = batch.file_channels[b], offset = batch.offsets[b], fd = batch.fds[b];
    TORCH_CHECK_VALUE(fd == static_cast<int>(fd), "window ", b, ": ", fd, " is not a file descriptor");
    TORCH_CHECK_VALUE(wide >= 1 && wide <= MOST_CHANNELS && wide <= most / 2 / std::max<int64_t>(batch.samples, 1), "window ", b,
                      ": a file of ", wide, " channels");
    TORCH_CHECK_VALUE(offset >= 0 && offset <= most, "window ", b, ": byte offset ", offset);
    for (int64_t c = 0; c < batch.channels; c++) {
      const int32_t row = batch.map[b * batch.channels + c];
      TORCH_CHECK_VALUE(row >= -1 && row < wide, "window ", b, ": channel ", row, " of a file of ", wide, " channels");
    }
  }
}

// Returns (window, errno, bytes read) of the first window that could not be read, or (-1, 0, 0).
at::Tensor gather_windows(const at::Tensor& fds_B, const at::Tensor& offsets_B, const at::Tensor& file_channels_B,
                          const at::Tensor& map_BC, const std::optional<at::Tensor>& gain_BC,
                          const std::optional<at::Tensor>& bias_BC, double clip, at::Tensor out_BCT) {
  TORCH_CHECK_VALUE(out_BCT.dim() == 3 && out_BCT.is_contiguous(), "out must be a contiguous B x C x T tensor");
  const int64_t windows = out_BCT.size(0), channels = out_BCT.size(1);
  for (const at::Tensor& x_B : {fds_B, offsets_B, file_channels_B})
    TORCH_CHECK_VALUE(x_B.dim() == 1 && x_B.size(0) == windows, "fds, offsets and file channels must have one entry per window");
  TORCH_CHECK_VALUE(map_BC.dim() == 2 && map_BC.size(0) == windows && map_BC.size(1) == channels, "map must be B x C");
  TORCH_CHECK_VALUE(clip > 0, "clip must be positive, not ", clip);
  TORCH_CHECK_VALUE(!gain_BC || gain_BC->sizes() == map_BC.sizes(), "gain must be B x C");
  TORCH_CHECK_VALUE(!bias_BC || bias_BC->sizes() == map_BC.sizes(), "bias must be B x C");

  out_BCT.unsafeGetTensorImpl()->bump_version();
  const auto fds = fds_B.contiguous(), offsets = offsets_B.contiguous(), wide = file_channels_B.contiguous(), map = map_BC.contiguous();
  const auto gain = gain_BC ? gain_BC->contiguous() : at::Tensor(), bias = bias_BC ? bias_BC->contiguous() : at::Tensor();
  const auto run = [&](auto* out) {
    const Batch batch{windows, channels, out_BCT.size(2), fds.const_data_ptr<int64_t>(), offsets.const_data_ptr<int64_t>(),
                      wide.const_data_ptr<int64_t>(), map.const_data_ptr<int32_t>(),
                      gain.defined() ? gain.const_data_ptr<float>() : nullptr,
                      bias.defined() ? bias.const_data_ptr<float>() : nullptr, static_cast<float>(clip), out};
    check(batch);
    return read_all(batch);
  };
  const Failure first = out_BCT.scalar_type() == at::kBFloat16 ? run(out_BCT.mutable_data_ptr<c10::BFloat16>())
                                                               : run(out_BCT.mutable_data_ptr<float>());
  at::Tensor status = fds_B.new_zeros({3}, fds_B.options().dtype(at::kLong));
  int64_t* to = status.mutable_data_ptr<int64_t>();
  to[0] = first.window < windows ? first.window : -1;
  to[1] = first.got.error;
  to[2] = first.got.bytes;
  return status;
}

}  // namespace
