// The streaming filter for NumPy arrays (kernels/plain.py): filter_sections.h with C names.

#include "filter.h"

#include "../kernels.h"

extern "C" void berger_filter(const double* x, double* y, int64_t steps, const Filter* f) {
  CALL(filter_channels, x, steps, y, steps, steps, f->sos, f->sections, f->state, f->channels, int64_t{0}, f->channels);
}

extern "C" int64_t berger_take(const float* x, int64_t steps, float* raw, double* y, const LiveSignal* f) {
  return CALL(take_chunk, x, steps, *f, raw, y);
}

extern "C" void berger_cut(const double* y, int64_t steps, const LiveWindow* w, float* x) { CALL(cut_window, y, steps, *w, x); }
