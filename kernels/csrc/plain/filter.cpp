// The streaming filter for NumPy arrays, in place (kernels/plain.py): filter_sections.h with a C name.

#include "../kernels.h"

extern "C" void berger_filter(double* x, int64_t channels, int64_t steps, const double* sos, int64_t sections, double* state) {
  CALL(filter_channels, x, steps, x, steps, steps, sos, sections, state, channels, int64_t{0}, channels);
}
