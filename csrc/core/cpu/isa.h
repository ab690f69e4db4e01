// Which instruction set the CPU kernels use: the best that this machine supports, unless one is forced.
#pragma once
#include <string>
#include <vector>

namespace tlk {

std::vector<std::string> isa_list();      // what this machine can run, best first
std::string isa_get();                    // the one in use
void isa_force(const std::string& name);  // throws std::invalid_argument naming the choices

int isa_index();  // the position of the one in use among all, in the order of TLK_KERNELS

}  // namespace tlk

// A loss's kernels. setup.py compiles the loss's cpu.inl once for each instruction set, and each defines a function
// `name` of type `Table` in the namespace of the instruction set. This declares them, and defines `name##_kernels()`,
// which returns the function of the instruction set in use. Use it in namespace tlk.
#if defined(__x86_64__)
#define TLK_KERNELS(Table, name)                                                \
  namespace avx512 {                                                            \
  Table name;                                                                   \
  }                                                                             \
  namespace avx2 {                                                              \
  Table name;                                                                   \
  }                                                                             \
  namespace baseline {                                                          \
  Table name;                                                                   \
  }                                                                             \
  inline Table* name##_kernels() {                                              \
    static constexpr Table* all[] = {avx512::name, avx2::name, baseline::name}; \
    return all[isa_index()];                                                    \
  }
#else
#define TLK_KERNELS(Table, name) \
  namespace baseline {           \
  Table name;                    \
  }                              \
  inline Table* name##_kernels() { return baseline::name; }
#endif
