// The autograd node of the losses.
#pragma once
#include <pybind11/pybind11.h>

namespace tlk {

void bind_autograd(pybind11::module_& m);

}  // namespace tlk
