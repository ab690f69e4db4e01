#include "isa.h"

#include <atomic>
#include <stdexcept>

#include "kernels.h"

namespace tlk {

// setup.py compiles each loss's .inl once for every instruction set, into that namespace.
#define TLK_DECLARE(isa)                                                                       \
  namespace isa {                                                                              \
  CrossEntropyTable cross_entropy;                                                             \
  DistillationTable distillation;                                                              \
  InfoNceTable info_nce;                                                                       \
  SigmoidContrastiveTable sigmoid_contrastive;                                                 \
  SquaredTable squared;                                                                        \
  const Kernels table = {cross_entropy, distillation, info_nce, sigmoid_contrastive, squared}; \
  }
TLK_DECLARE(baseline)
#if defined(__x86_64__)
TLK_DECLARE(avx2)
TLK_DECLARE(avx512)
#endif

namespace {

struct Isa {
  const char* name;
  const Kernels* kernels;
  bool (*supported)();
};

// Best first; the flags in setup.py are what `supported` asks for.
const Isa kIsas[] = {
#if defined(__x86_64__)
    {"avx512", &avx512::table,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
     }},
    {"avx2", &avx2::table,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }},
#endif
    {"baseline", &baseline::table, [] { return true; }},
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

const Kernels& kernels() { return *current().load(std::memory_order_relaxed)->kernels; }

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
