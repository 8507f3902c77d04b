#pragma once
#include <pybind11/pybind11.h>

namespace crossfade {

void bind_tape(pybind11::module_& m);

}  // namespace crossfade
