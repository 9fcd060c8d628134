// The streaming filter for NumPy arrays (kernels/plain.py): filter_sections.h with C names.

#include "../kernels.h"

struct Filter {  // what stays from chunk to chunk, in one argument: each of them costs Python a tenth of a microsecond
  int64_t channels, sections;
  const double* sos;
  double* state;
};

extern "C" void berger_filter(double* x, int64_t steps, const Filter* f) {
  CALL(filter_channels, x, steps, x, steps, steps, f->sos, f->sections, f->state, f->channels, int64_t{0}, f->channels);
}

extern "C" int64_t berger_take(const float* x, int64_t steps, float* raw, double* y, const LiveSignal* f) {
  return CALL(take_chunk, x, steps, *f, raw, y);
}

extern "C" void berger_cut(const double* y, int64_t steps, const LiveWindow* w, float* x) { CALL(cut_window, y, steps, *w, x); }
