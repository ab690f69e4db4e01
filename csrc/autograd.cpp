// A loss's node in autograd's graph, for the plain case: Python's own Function costs a small call as much as its
// kernel.
#include <ATen/core/dispatch/Dispatcher.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "autograd.h"

namespace tlk {
namespace {

namespace py = pybind11;
using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using Tensors = std::vector<std::optional<Tensor>>;

// Multiplies by the op that reads the upstream value on the device.
void scale_on_device(Tensor& grad, const Tensor& upstream) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("tlkernels::scale_", "").typed<void(Tensor&, const Tensor&)>();
  op.call(grad, upstream);
}

// Gradients that are here already are given away by the first backward, so that theirs is the only memory. What is not
// here, or not any more, or is to be differentiated itself, the Python function `compute` finds.
struct LossBackward : torch::autograd::Node {
  std::vector<SavedVariable> tensors;
  Tensors grads;
  bool on_device = false;  // whether the upstream value must not be read on the host
  std::optional<c10::SafePyObject> compute;

  variable_list apply(variable_list&& upstreams) override {
    const Tensor& upstream = upstreams[0];
    variable_list results(tensors.size());
    if (!upstream.defined()) return results;
    if (!grads.empty() && !at::GradMode::is_enabled()) {
      Tensors ready = std::exchange(grads, {});
      const bool one = !on_device && upstream.item<double>() == 1;
      for (size_t i = 0; i < ready.size(); ++i) {
        if (!ready[i] || !task_should_compute_output(i)) continue;
        if (on_device)
          scale_on_device(*ready[i], upstream);
        else if (!one)
          ready[i]->mul_(upstream);
        results[i] = std::move(*ready[i]);
      }
      return results;
    }
    py::gil_scoped_acquire gil;
    py::list inputs, needs;
    for (size_t i = 0; i < tensors.size(); ++i) {
      const Tensor tensor = tensors[i].unpack();  // raises where backward has been here before, or tensor was changed
      inputs.append(tensor.defined() ? py::cast(tensor) : py::none());
      needs.append(task_should_compute_output(i));
    }
    const py::function function = py::reinterpret_borrow<py::function>(compute->ptr(getPyInterpreter()));
    const py::list found = function(upstream, inputs, needs, at::GradMode::is_enabled());
    for (size_t i = 0; i < results.size(); ++i)
      if (!found[i].is_none() && task_should_compute_output(i)) results[i] = found[i].cast<Tensor>();
    return results;
  }

  void release_variables() override {
    for (SavedVariable& tensor : tensors) tensor.reset_data();
    grads.clear();
    compute.reset();
  }

  std::string name() const override { return "tlkernels::LossBackward"; }
};

// torch 2.13 counts references to a node in the node, earlier ones in a shared_ptr.
using NodePointer = decltype(torch::autograd::Edge::function);
template <class Made, class Pointer = NodePointer>
auto make_node() {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>)
    return std::make_shared<Made>();
  else
    return c10::make_intrusive<Made>();
}

void attach(const Tensor& loss, const Tensors& inputs, Tensors grads, const py::function& compute, bool on_device) {
  const auto node = make_node<LossBackward>();
  torch::autograd::edge_list edges;
  for (const std::optional<Tensor>& input : inputs) {
    edges.push_back(input ? torch::autograd::impl::gradient_edge(*input) : torch::autograd::Edge());
    node->tensors.emplace_back(input.value_or(Tensor()), /*is_output=*/false);
  }
  node->set_next_edges(std::move(edges));
  node->grads = std::move(grads);
  node->on_device = on_device;
  node->compute.emplace(compute.inc_ref().ptr(), getPyInterpreter());
  torch::autograd::set_history(loss, node);
}

}  // namespace

void bind_autograd(py::module_& m) {
  m.def("attach", &attach, py::arg("loss"), py::arg("inputs"), py::arg("grads"), py::arg("compute"),
        py::arg("on_device"),
        "Make `loss` the result of `inputs` in autograd's graph; tlkernels/_core/autograd.py says the rest.");
}

}  // namespace tlk
