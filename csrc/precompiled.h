// The headers of torch that most sources include: compiled once (csrc/objects.py).
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>
