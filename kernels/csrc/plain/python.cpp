// The streaming filter as a function that Python calls without ctypes, which takes longer than the arithmetic of a short chunk. Nothing
// where Python's headers aren't (kernels/build.py): then kernels/plain.py goes by ctypes.

#ifdef WITH_PYTHON
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <algorithm>

#include "filter.h"

namespace {

constexpr Py_ssize_t LONG = 64 << 10;  // bytes from which on other threads of Python may run meanwhile

// filter(x_CT, y_CT, address of a Filter): both float64 and contiguous
PyObject* filter(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 3) return PyErr_Format(PyExc_TypeError, "filter takes 3 arguments, not %zd", count);
  const auto* f = static_cast<const Filter*>(PyLong_AsVoidPtr(args[2]));
  if (f == nullptr) return PyErr_Occurred() ? nullptr : PyErr_Format(PyExc_ValueError, "no filter at address 0");
  Py_buffer x, y;
  if (PyObject_GetBuffer(args[0], &x, PyBUF_SIMPLE) != 0) return nullptr;
  if (PyObject_GetBuffer(args[1], &y, PyBUF_WRITABLE) != 0) return PyBuffer_Release(&x), nullptr;
  const int64_t steps = std::min(x.len, y.len) / (f->channels * static_cast<Py_ssize_t>(sizeof(double)));
  PyThreadState* others = y.len >= LONG ? PyEval_SaveThread() : nullptr;
  berger_filter(static_cast<const double*>(x.buf), static_cast<double*>(y.buf), steps, f);
  if (others != nullptr) PyEval_RestoreThread(others);
  PyBuffer_Release(&x), PyBuffer_Release(&y);
  Py_RETURN_NONE;
}

PyMethodDef functions[] = {{"filter", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(filter)), METH_FASTCALL, nullptr},
                           {nullptr, nullptr, 0, nullptr}};
PyModuleDef_Slot slots[] = {
#ifdef Py_MOD_GIL_NOT_USED
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_plain", nullptr, 0, functions, slots, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__plain() { return PyModuleDef_Init(&module); }
#endif
