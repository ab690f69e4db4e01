"""Records what the battery's cases launch in Triton, on CPU tensors, and compiles it as the launcher would on a GPU.

    python -m tests.recorded_battery                    all cases, the front end of every kernel
    python -m tests.recorded_battery --quick            the front end of a kernel of each kind
    python -m tests.recorded_battery --compile mse      the kernels of a loss, to machine code

A launch is specialised by its values: an integer of 1 becomes a constant, what 16 divides becomes another kernel. So
the arguments are those of real calls, and Triton's own functions say what each launch compiles. In a process of its
own, without TRITON_INTERPRET, since an interpreted kernel compiles to nothing.
"""

import argparse
import collections
import sys
import time
from pathlib import Path

import harness
import torch

import tlkernels as tlk
from tlkernels._core import triton as core
from tlkernels._core.triton import launch

GPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


def serve_cpu_tensors():
    """Let calls with CPU tensors take the implementation that Triton's ops have for a GPU. Nothing sets this back."""
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
    """Yield the calls of Triton's ops themselves."""
    for op, arguments in loss.ops():
        if op.name().endswith("_triton"):
            copies = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in arguments]
            yield lambda op=op, copies=copies: op(*copies)


def recorded(losses, architecture):
    """Return what the losses' cases launch: each specialisation with a call that needs it; and the number of launches.

    `losses` are pairs of a name and a loss.
    """
    from bench.triton_launches import specialised

    found, launched = {}, collections.Counter()
    where = ""

    def take(launch):
        of = specialised(launch, architecture)
        launched[of.name] += 1
        found.setdefault(of.key, (of, where))

    with launch.recorded(architecture, take):
        for name, loss in losses:
            for case in loss.cases:
                where = f"{name}-{case.id}"
                for call in calls(name, loss, case):
                    call()
            where = f"{name}-ops"
            for call in ops(loss):
                call()
    return list(found.values()), launched


def thinned(found):
    """Return some of the specialisations: those in which a parameter of a kernel is what it was in none before.

    A parameter is of a type, or a constant: None, an option's value, the 1 that an integer happens to be; block sizes
    are all alike.
    """
    seen, chosen = set(), []
    for of, where in found:
        kinds = set()
        for parameter, (place, kind) in zip(of.kernel.params, enumerate(of.signature.values()), strict=True):
            value = of.constants.get((place,))
            size = parameter.is_constexpr and type(value) is int and value > 3
            kinds.add((of.kernel, place, kind, "size" if size else repr(value)))
        if not kinds <= seen:
            seen |= kinds
            chosen.append((of, where))
    return chosen


def cause_of(error):
    """Return the error that began it; Triton wraps it in one for each function that it was in."""
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
    sys.path.append(str(Path(__file__).parent))
    import triton
    from battery import LOSSES

    from bench.triton_launches import compiled, front_end

    start = time.process_time()
    names = options.losses or list(LOSSES)
    found, launched = recorded([(name, LOSSES[name]) for name in names], options.architecture)
    del library
    chosen = thinned(found) if options.quick else found
    failures = collections.defaultdict(list)
    for of, where in chosen:
        try:
            (compiled if options.compile else front_end)(of, options.architecture)
        except Exception as error:
            failures[of.name, cause_of(error)].append(where)
    for (kernel, error), where in failures.items():
        print(f"{kernel}: {len(where)} of {where[:3]}: {error}")
    counted = ", ".join(f"{kernel} {number}" for kernel, number in sorted(launched.items()))
    print(
        f"Triton {triton.__version__}, {options.architecture}: {launched.total()} launches of {len(found)} kernels "
        f"({counted}); {'compiled' if options.compile else 'front end of'} {len(chosen)}, "
        f"{sum(map(len, failures.values()))} failed; {time.process_time() - start:.0f} s"
    )
    return bool(failures) or not chosen


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
