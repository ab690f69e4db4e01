// Which instruction set the CPU kernels use: the best that this machine has, unless one is forced.
#pragma once
#include <string>
#include <vector>

namespace tlk {

std::vector<std::string> isa_list();      // what this machine can run, best first
std::string isa_get();                    // the one in use
void isa_force(const std::string& name);  // throws std::invalid_argument naming the choices

}  // namespace tlk
