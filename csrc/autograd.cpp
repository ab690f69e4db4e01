// A loss's node in autograd's graph, for eager autograd. An autograd.Function in Python takes as long as the kernel of
// a small call.
#include <ATen/core/dispatch/Dispatcher.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
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
namespace compiled = torch::dynamo::autograd;
using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// grad *= upstream, by the op that reads the upstream value on the device.
void scale_on_device(Tensor& grad, const Tensor& upstream) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("tlkernels::scale_", "").typed<void(Tensor&, const Tensor&)>();
  op.call(grad, upstream);
}

// Whether this is a plain tensor: neither a batch of vmap nor traced by a compiler.
bool is_plain(const Tensor& tensor) {
  return !tensor.unsafeGetTensorImpl()->key_set().has_any(
      c10::DispatchKeySet({c10::DispatchKey::Batched, c10::DispatchKey::FuncTorchBatched,
                           c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::Python}));
}

py::module_ python() { return py::module_::import("tlkernels._core.autograd"); }

// The arguments of a loss: its tensors, their positions among all arguments, and the list of the others, with None in
// the place of a tensor.
struct Arguments {
  std::vector<Tensor> tensors;
  std::vector<int64_t> places;
  py::list rest;

  py::list whole() const {
    py::list args = py::reinterpret_steal<py::list>(PyList_GetSlice(rest.ptr(), 0, PY_SSIZE_T_MAX));
    for (size_t i = 0; i < tensors.size(); ++i) args[places[i]] = py::cast(tensors[i]);
    return args;
  }
};

variable_list gradients(const py::object& rule, const Tensor& upstream, const Arguments& args,
                        const std::vector<bool>& needs) {
  const py::sequence grads =
      python().attr("gradients")(rule, py::make_tuple(upstream), args.whole(), needs, at::GradMode::is_enabled());
  variable_list results(needs.size());
  for (size_t i = 0; i < needs.size(); ++i)
    if (needs[i] && !grads[i].is_none()) results[i] = grads[i].cast<Tensor>();
  return results;
}

// The first backward hands out the gradients that the forward stored, and no copy is kept. Python's `gradients`
// computes them where none are stored, in a later backward, and where create_graph=True differentiates them.
struct LossBackward : torch::autograd::Node {
  size_t inputs = 0;  // the number of arguments with an edge: the first ones
  std::vector<SavedVariable> saved;
  std::vector<Tensor> untracked;  // inference tensors, which have no version counter
  std::vector<int64_t> places;    // of `saved`, then of `untracked`, among the arguments
  std::vector<std::optional<Tensor>> grads;
  bool on_device = false;  // whether the upstream value must not be read on the host
  std::string range;       // the name in a profiler's trace; empty for the usual one
  c10::SafePyObject rule, rest;

  LossBackward(const py::object& rule, const py::list& rest)
      : rule(rule.inc_ref().ptr(), getPyInterpreter()), rest(rest.inc_ref().ptr(), getPyInterpreter()) {}

  py::object borrowed(const c10::SafePyObject& object) const {
    return py::reinterpret_borrow<py::object>(object.ptr(getPyInterpreter()));
  }

  std::vector<bool> needs() const {
    std::vector<bool> needs(inputs);
    for (size_t i = 0; i < inputs; ++i) needs[i] = task_should_compute_output(i);
    return needs;
  }

  variable_list apply(variable_list&& upstreams) override {
    const Tensor& upstream = upstreams[0];
    if (!upstream.defined()) return variable_list(inputs);
    if (!grads.empty() && !at::GradMode::is_enabled()) return stored(upstream);
    py::gil_scoped_acquire gil;
    return gradients(borrowed(rule), upstream, unpacked(), needs());
  }

  variable_list stored(const Tensor& upstream) {
    variable_list results(inputs);
    const bool batch = !is_plain(upstream);
    const bool is_one = !batch && !on_device && upstream.item<double>() == 1;
    for (size_t i = 0; i < inputs; ++i) {
      if (!grads[i] || !task_should_compute_output(i)) continue;
      if (batch) {
        results[i] = grads[i]->mul(upstream);
        continue;
      }
      if (on_device)
        scale_on_device(*grads[i], upstream);
      else if (!is_one)
        grads[i]->mul_(upstream);
      results[i] = std::move(*grads[i]);
    }
    if (!batch) grads.clear();
    return results;
  }

  Arguments unpacked() const {
    Arguments args{{}, places, borrowed(rest)};
    for (const SavedVariable& tensor : saved)
      args.tensors.push_back(tensor.unpack());  // raises if backward has run, or the tensor was changed
    args.tensors.insert(args.tensors.end(), untracked.begin(), untracked.end());
    return args;
  }

  void release_variables() override {
    for (SavedVariable& tensor : saved) tensor.reset_data();
    untracked.clear();
    grads.clear();
  }

  static constexpr const char* kName = "tlkernels::LossBackward";

  std::string name() const override { return range.empty() ? kName : range; }

  // Compiled autograd traces a backward once for each key. The traced graph calls `compiled_gradients`.
  void compiled_args(compiled::CompiledNodeArgs& args) const override {
    args.collect(static_cast<int64_t>(inputs));
    args.collect(saved, /*is_output=*/false);
    args.collect(untracked);
    args.collect(places);
    args.collect(grads);
    args.collect(number());
  }

  variable_list apply_with_saved(const variable_list& upstreams, compiled::SwapSavedVariables& swap) override {
    swap.before(saved);
    swap.before(untracked);
    swap.before(grads);
    compiled::PackedArgs packed;
    std::vector<Tensor> tensors, stored;
    std::vector<bool> has(inputs);
    for (const SavedVariable& tensor : saved) tensors.push_back(tensor.unpack());
    tensors.insert(tensors.end(), untracked.begin(), untracked.end());
    for (size_t i = 0; i < grads.size(); ++i)
      if ((has[i] = grads[i].has_value())) stored.push_back(*grads[i]);
    packed.pack(tensors);
    packed.pack(stored);
    packed.pack(has);
    packed.pack(places);
    packed.pack(needs());
    packed.pack(number());
    std::vector<at::TypePtr> schema;
    for (const at::IValue& value : packed.vec()) schema.push_back(value.type());
    const auto metadata = compiled::IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(
        compiled::get_input_metadata(next_edges()));
    const auto& python = compiled::getPyCompilerInterface();
    const auto function = python->bind_function(swap.get_py_compiler(), kName, compiled_gradients, schema,
                                                /*is_custom_function=*/true, /*is_traceable=*/true);
    auto results =
        python->call_function(swap.get_py_compiler(), "apply_functional", function, upstreams, packed.vec(), metadata);
    swap.after(saved);
    swap.after(untracked);
    swap.after(grads);
    return results;
  }

  int64_t number() const {
    py::gil_scoped_acquire gil;
    return python().attr("number_of")(borrowed(rule), borrowed(rest)).cast<int64_t>();
  }

  static variable_list compiled_gradients(const variable_list& upstreams, const std::vector<at::IValue>& values) {
    compiled::PackedArgs packed(values);
    auto tensors = packed.unpack<std::vector<Tensor>>();
    auto stored = packed.unpack<std::vector<Tensor>>();
    const auto has = packed.unpack<std::vector<bool>>();
    auto places = packed.unpack<std::vector<int64_t>>();
    const auto needs = packed.unpack<std::vector<bool>>();
    const auto number = packed.unpack<int64_t>();
    const Tensor& upstream = upstreams[0];
    variable_list results(needs.size());
    if (!upstream.defined()) return results;
    if (stored.empty() || at::GradMode::is_enabled()) {
      py::gil_scoped_acquire gil;
      const py::tuple constant = python().attr("by_number")(number);
      return gradients(constant[0], upstream, {std::move(tensors), std::move(places), constant[1]}, needs);
    }
    for (size_t i = 0, k = 0; i < needs.size(); ++i) {
      if (!has[i]) continue;
      const Tensor& grad = stored[k++];
      if (needs[i]) results[i] = grad.mul(upstream);
    }
    return results;
  }
};

// torch 2.13 holds a node in an intrusive_ptr, earlier versions in a shared_ptr.
using NodePointer = decltype(torch::autograd::Edge::function);
template <class Node, class Pointer = NodePointer, class... Args>
auto make_node(const Args&... args) {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>)
    return std::make_shared<Node>(args...);
  else
    return c10::make_intrusive<Node>(args...);
}

void attach(const Tensor& loss, const py::object& rule, const py::sequence& args,
            std::vector<std::optional<Tensor>> grads, bool on_device, std::string range) {
  py::list rest;
  std::vector<Tensor> tensors;
  std::vector<int64_t> tracked, untracked;
  for (size_t i = 0; i < args.size(); ++i) {
    const py::object arg = args[i];
    if (!THPVariable_Check(arg.ptr())) {
      tensors.emplace_back();
      rest.append(arg);
      continue;
    }
    tensors.push_back(THPVariable_Unpack(arg.ptr()));
    (tensors.back().is_inference() ? untracked : tracked).push_back(static_cast<int64_t>(i));
    rest.append(py::none());
  }
  const auto node = make_node<LossBackward>(rule, rest);
  node->inputs = rule.attr("inputs").cast<size_t>();
  for (const int64_t i : tracked) node->saved.emplace_back(tensors[i], /*is_output=*/false);
  for (const int64_t i : untracked) node->untracked.push_back(tensors[i]);
  node->places = std::move(tracked);
  node->places.insert(node->places.end(), untracked.begin(), untracked.end());
  torch::autograd::edge_list edges;
  for (size_t i = 0; i < node->inputs; ++i)
    edges.push_back(tensors[i].defined() ? torch::autograd::impl::gradient_edge(tensors[i]) : torch::autograd::Edge());
  node->set_next_edges(std::move(edges));
  node->grads = std::move(grads);
  node->on_device = on_device;
  node->range = std::move(range);
  torch::autograd::set_history(loss, node);
}

}  // namespace

void bind_autograd(py::module_& m) {
  m.def("attach", &attach, py::arg("loss"), py::arg("rule"), py::arg("args"), py::arg("grads"), py::arg("on_device"),
        py::arg("range"), "Make `loss` the result of `args` in autograd's graph; see tlkernels/_core/native.py.");
}

}  // namespace tlk
