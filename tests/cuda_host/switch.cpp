#include "switch.h"

#include <c10/util/Exception.h>

#include <memory>
#include <vector>

namespace {

std::vector<void (*)(torch::Library&)>& all() {
  static std::vector<void (*)(torch::Library&)> registrations;
  return registrations;
}
std::unique_ptr<torch::Library> library;

// The dispatcher's warning that an op has another implementation already, which is intended.
struct Quiet : c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

}  // namespace

cuda_host::Registration::Registration(void (*registers)(torch::Library&)) { all().push_back(registers); }

extern "C" __attribute__((visibility("default"))) void tlk_cuda_host_switch(bool on) {
  Quiet quiet;
  const c10::WarningUtils::WarningHandlerGuard guard(&quiet);
  library.reset();
  if (!on) return;
  library =
      std::make_unique<torch::Library>(torch::Library::IMPL, "tlkernels", c10::DispatchKey::CPU, __FILE__, __LINE__);
  for (auto registers : all()) registers(*library);
}
