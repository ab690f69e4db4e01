// The headers of torch that most sources begin with: compiled once for all of them (csrc/objects.py).
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>
