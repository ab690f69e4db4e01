// tlkernels._C: build information, the choice of instruction set, and a node for autograd. The losses themselves are
// torch ops, which loading this library registers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <map>
#include <string>

#include "autograd.h"
#include "core/cpu/isa.h"

#ifndef TLK_BUILD_TORCH
#error "setup.py defines TLK_BUILD_TORCH, the version of torch"
#endif

namespace {

// An ELF note, which the linker puts at the head of the file. tlkernels/_core/native.py reads the version of torch from
// it without loading the library: with another torch it may fail to load, or crash.
struct Note {
  std::uint32_t name_size, torch_size, type;
  char name[12];
  char torch[sizeof(TLK_BUILD_TORCH)];
};
__attribute__((section(".note.tlkernels"), used, aligned(4)))
const Note note = {sizeof("tlkernels"), sizeof(TLK_BUILD_TORCH), 1, "tlkernels", TLK_BUILD_TORCH};

std::map<std::string, std::string> build_info() {
  return {{"torch", TLK_BUILD_TORCH},
          {"compiler", __VERSION__},
          {"sanitize", TLK_BUILD_SANITIZE},
          {"cuda", TLK_BUILD_CUDA},
          {"no_cuda", TLK_BUILD_NO_CUDA}};
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
