// The streaming filter for NumPy arrays, in place (kernels/plain.py): filter_sections.h with a C name.

#include "../kernels.h"

struct Filter {  // what stays from chunk to chunk, in one argument: each of them costs Python a tenth of a microsecond
  int64_t channels, sections;
  const double* sos;
  double* state;
};

extern "C" void berger_filter(double* x, int64_t steps, const Filter* f) {
  CALL(filter_channels, x, steps, x, steps, steps, f->sos, f->sections, f->state, f->channels, int64_t{0}, f->channels);
}
