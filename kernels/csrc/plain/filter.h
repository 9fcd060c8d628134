// What kernels/plain.py hands to the streaming filter.

#pragma once

#include <cstdint>

struct Filter {  // what stays from chunk to chunk, in one argument: each of them costs Python a tenth of a microsecond
  int64_t channels, sections;
  const double* sos;
  double* state;
};

extern "C" void berger_filter(const double* x, double* y, int64_t steps, const Filter* f);
