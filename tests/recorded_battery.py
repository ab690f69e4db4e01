"""Records the Triton launches of the battery's cases, on CPU tensors, and compiles them as for a GPU.

    python -m tests.recorded_battery                    all cases, the front end of every kernel
    python -m tests.recorded_battery --quick            the front end of a kernel of each kind
    python -m tests.recorded_battery --compile mse      the kernels of a loss, to machine code

Triton specialises a launch by its values: an integer of 1 becomes a constant, and a multiple of 16 another kernel. So
the arguments are those of real calls, and Triton's own functions decide what each launch compiles. TRITON_INTERPRET
must not be set: an interpreted kernel is not compiled.
"""

import argparse
import collections
import sys
import time
from pathlib import Path

import torch

import tlkernels as tlk
from tlkernels._core import triton as core
from tlkernels._core.triton import launch

sys.path.append(str(Path(__file__).parent))  # of `python -m`, which adds the current folder alone
import harness

GPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


def serve_cpu_tensors():
    """Make Triton's ops run their GPU implementation on CPU tensors, for the rest of the process."""
    library = torch.library.Library("tlkernels", "IMPL")
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("tlkernels::") and name.endswith("_triton"):
            op = getattr(torch.ops.tlkernels, name.removeprefix("tlkernels::")).default
            library.impl(op, lambda *args, op=op: op.redispatch(GPU, *args), "CPU")
    core.DEVICE = "cpu"
    core._too_old = lambda index: False
    return library


def calls(name, loss, case):
    """Yield functions that make the calls of a case: value and gradients, value alone, second derivatives, variants."""
    arguments = case.make(0)
    tensors, put = harness.split(arguments, case.wants_grad)

    def value_of(inputs):
        return loss.function(**put(*inputs), impl="triton")

    def leaves():
        return [tensor.detach().requires_grad_() for tensor in tensors]

    def gradients():
        inputs = leaves()
        value = value_of(inputs)
        torch.autograd.grad(value, inputs, torch.full_like(value, 0.5))

    def second():
        inputs = leaves()
        value = value_of(inputs)
        upstream = torch.ones_like(value).requires_grad_()
        grads = torch.autograd.grad(value, inputs, upstream, create_graph=True)
        torch.autograd.grad(sum(grad.sum() for grad in grads), [*inputs, upstream], allow_unused=True)

    def in_place():
        leaf = arguments["input"].detach().requires_grad_()
        changed = {**arguments, "input": leaf * 1, "inplace_grad": True}
        value = tlk.cross_entropy(**changed, impl="triton")
        torch.autograd.grad(value, leaf, torch.ones_like(value))

    yield gradients
    yield lambda: value_of(tensors)
    if case.small:
        yield second
    if name == "cross_entropy":
        yield lambda: tlk.cross_entropy_stats(**arguments, impl="triton")
        if not arguments["target"].is_floating_point():
            yield in_place
    if name == "linear_cross_entropy":
        options = {key: value for key, value in arguments.items() if key not in ("reduction", "z_loss")}
        yield lambda: tlk.linear_cross_entropy_stats(**options, impl="triton")


def ops(loss):
    """Yield calls of Triton's ops."""
    for op, arguments in loss.ops():
        if op.name().endswith("_triton"):
            copies = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in arguments]
            yield lambda op=op, copies=copies: op(*copies)


def recorded(losses, architecture):
    """Return each kernel that the losses' cases launch, with a case that launches it, and the number of launches.

    `losses` are pairs of a name and a loss.
    """
    from bench.triton_launches import specialised

    kernels, counts = {}, collections.Counter()
    caller = ""

    def record(launch):
        kernel = specialised(launch, architecture)
        counts[kernel.name] += 1
        kernels.setdefault(kernel.key, (kernel, caller))

    with launch.recorded(architecture, record):
        for name, loss in losses:
            for case in loss.cases:
                caller = f"{name}-{case.id}"
                for call in calls(name, loss, case):
                    call()
            caller = f"{name}-ops"
            for call in ops(loss):
                call()
    return list(kernels.values()), counts


def thinned(kernels):
    """Return the kernels in which some parameter has a type or constant that no kernel before had.

    A constant is None, the value of an option, or an integer of 1; all block sizes count as one.
    """
    seen, selected = set(), []
    for kernel, caller in kernels:
        kinds = set()
        for parameter, (place, kind) in zip(kernel.kernel.params, enumerate(kernel.signature.values()), strict=True):
            value = kernel.constants.get((place,))
            size = parameter.is_constexpr and type(value) is int and value > 3
            kinds.add((kernel.kernel, place, kind, "size" if size else repr(value)))
        if not kinds <= seen:
            seen |= kinds
            selected.append((kernel, caller))
    return selected


def cause_of(error):
    """Return the first error; Triton wraps it in another for each function that calls the failing one."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def main(arguments):
    parser = argparse.ArgumentParser()
    parser.add_argument("losses", nargs="*", help="all, if none is given")
    parser.add_argument("--quick", action="store_true", help="the front end of a thinned selection of kernels")
    parser.add_argument("--compile", action="store_true", help="to machine code")
    parser.add_argument("--architecture", default="sm_90")
    options = parser.parse_args(arguments)
    if core.INTERPRETED:
        parser.error("TRITON_INTERPRET is set: nothing would be compiled")
    library = serve_cpu_tensors()
    import triton
    from battery import LOSSES

    from bench.triton_launches import compiled, front_end

    start = time.process_time()
    names = options.losses or list(LOSSES)
    kernels, counts = recorded([(name, LOSSES[name]) for name in names], options.architecture)
    del library
    selected = thinned(kernels) if options.quick else kernels
    failures = collections.defaultdict(list)
    for kernel, caller in selected:
        try:
            (compiled if options.compile else front_end)(kernel, options.architecture)
        except Exception as error:
            failures[kernel.name, cause_of(error)].append(caller)
    for (kernel, error), callers in failures.items():
        print(f"{kernel}: {len(callers)} of {callers[:3]}: {error}")
    summary = ", ".join(f"{kernel} {number}" for kernel, number in sorted(counts.items()))
    print(
        f"Triton {triton.__version__}, {options.architecture}: {counts.total()} launches of {len(kernels)} kernels "
        f"({summary}); {'compiled' if options.compile else 'front end of'} {len(selected)}, "
        f"{sum(map(len, failures.values()))} failed; {time.process_time() - start:.0f} s"
    )
    return bool(failures) or not selected


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
