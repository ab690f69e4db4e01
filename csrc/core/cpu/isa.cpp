#include "isa.h"

#include <atomic>
#include <stdexcept>

namespace tlk {

namespace {

struct Isa {
  const char* name;
  bool (*supported)();
};

// In the order of TLK_KERNELS, best first. `supported` checks the features that setup.py compiles for.
const Isa kIsas[] = {
#if defined(__x86_64__)
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
     }},
    {"avx2",
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }},
#endif
    {"baseline", [] { return true; }},
};

const Isa* best() {
  for (const Isa& isa : kIsas)
    if (isa.supported()) return &isa;
  throw std::logic_error("the baseline is always supported");
}

std::atomic<const Isa*>& current() {
  static std::atomic<const Isa*> isa{best()};
  return isa;
}

}  // namespace

int isa_index() { return int(current().load(std::memory_order_relaxed) - kIsas); }

std::vector<std::string> isa_list() {
  std::vector<std::string> names;
  for (const Isa& isa : kIsas)
    if (isa.supported()) names.emplace_back(isa.name);
  return names;
}

std::string isa_get() { return current().load()->name; }

void isa_force(const std::string& name) {
  std::string choices;
  for (const Isa& isa : kIsas) {
    if (!isa.supported()) continue;
    if (name == isa.name) {
      current().store(&isa);
      return;
    }
    choices += choices.empty() ? isa.name : std::string(", ") + isa.name;
  }
  throw std::invalid_argument("ISA '" + name +
                              "' is unknown or not supported by this machine; choose one of: " + choices);
}

}  // namespace tlk
