// tlkernels._C: what was built, which instruction set the CPU kernels use, and a node for autograd. The losses
// themselves are torch ops, registered when this library is loaded.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "autograd.h"
#include "cpu/isa.h"

#ifndef TLK_BUILD_TORCH
#error "setup.py says which torch this is built against"
#endif

namespace {

std::map<std::string, std::string> build_info() {
  return {{"torch", TLK_BUILD_TORCH},
          {"compiler", __VERSION__},
          {"sanitize", TLK_BUILD_SANITIZE},
          {"cuda", TLK_BUILD_CUDA}};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information, instruction-set choice and the autograd node of the native kernels.";
  m.def("build_info", &build_info, "What this extension was built with.");
  m.def("isa_list", &tlk::isa_list, "Instruction sets that this machine can run, best first.");
  m.def("isa_get", &tlk::isa_get, "The instruction set in use.");
  m.def("isa_force", &tlk::isa_force, pybind11::arg("name"),
        "Use this instruction set from the next call on; ValueError names the choices.");
  tlk::bind_autograd(m);
}
