// Lets a CPU build of torch make autograd nodes of fake tensors on CUDA devices: they ask for a stream of the device.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>)
}
