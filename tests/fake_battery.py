"""Runs the battery's calls with fake CUDA tensors, to check that the host never waits for a GPU or mixes devices.

    python -m tests.fake_battery            all cases, by triton and by reference
    python -m tests.fake_battery info_nce   those of one loss

A fake tensor has a shape, a dtype and a device, but no values. Reading a value (`float`, `bool`, `item`, a shape that
depends on it) raises; on a GPU the host would wait, and no graph could be captured. Triton's launches are recorded. The
extension's CUDA kernels are not run.
"""

import argparse
import collections
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import tlkernels as tlk
from tlkernels._core import triton as core
from tlkernels._core.triton.launch import recorded

sys.path.append(str(Path(__file__).parent))  # of `python -m`, which adds the current folder alone
import harness

HERE = Path(__file__).parent
GPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


def make_cuda_known():
    """Let autograd of a CPU build of torch accept CUDA tensors, by a library of a few lines."""
    if torch.backends.cuda.is_built():
        return
    root = Path(torch.__file__).parent
    compiler = os.environ.get("CXX", "c++")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "fake_cuda.so"
        command = [
            *compiler.split(),
            "-std=c++20",
            "-shared",
            "-fPIC",
            f"-I{root}/include",
            str(HERE / "fake_cuda.cpp"),
        ]
        subprocess.run([*command, f"-L{root}/lib", "-lc10", "-o", str(library)], check=True)
        torch.ops.load_library(library)


class Implementations(TorchDispatchMode):
    """Runs the GPU implementation of Triton's ops; fake tensors would run the op's fake."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "tlkernels" and func._schema.name.endswith("_triton"):
            with self:
                return func.redispatch(GPU, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def backward(loss):
    """Call the nodes of a loss's graph as autograd's engine does; a CPU build has no engine thread for a GPU."""
    waiting, order, todo = collections.Counter(), set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node in order:
            continue
        order.add(node)
        for following, _ in node.next_functions:
            if following is not None:
                waiting[following] += 1
                todo.append(following)
    grads = collections.defaultdict(dict)
    grads[loss.grad_fn][0] = torch.ones_like(loss)
    ready = [loss.grad_fn]
    while ready:
        node = ready.pop()
        if type(node).__name__ != "AccumulateGrad":
            given = [grads[node].get(k) for k in range(len(node._input_metadata))]
            with torch.no_grad():
                grads_of_node = (node if callable(node) else node.apply)(*given)
            grads_of_node, places = (
                grads_of_node if isinstance(grads_of_node, tuple) else (grads_of_node,),
                node.next_functions,
            )
            if not callable(node):  # a Python node also returns None for arguments that are not tensors
                places = [place for place in places if place[0] is not None]
                grads_of_node = [grad for grad in grads_of_node if grad is not None]
            for (following, k), grad in zip(places, grads_of_node, strict=True):
                if following is None or grad is None:
                    continue
                assert grad.device.type == "cuda", f"{type(node).__name__} gives a gradient on {grad.device}"
                before = grads[following].get(k)
                grads[following][k] = grad if before is None else before + grad
        for following, _ in node.next_functions:
            if following is not None:
                waiting[following] -= 1
                if not waiting[following]:
                    ready.append(following)


def call(name, loss, case, impl):
    """Make the calls of a case: value and gradients, the value alone, and statistics."""
    # Some cases read values while they create their tensors.
    known = (
        patch.object(torch.Tensor, "__bool__", lambda tensor: False),
        patch.object(torch.Tensor, "item", lambda _: 1.0),
    )
    with torch.device("cuda"), known[0], known[1]:
        arguments = case.make(0)
    tensors, put = harness.split(arguments, case.wants_grad)
    inputs = [tensor.detach().requires_grad_() for tensor in tensors]
    value = loss.function(**put(*inputs), impl=impl)
    assert value.device.type == "cuda", f"the loss is on {value.device}"
    backward(value)
    loss.function(**put(*tensors), impl=impl)
    if name == "cross_entropy":
        tlk.cross_entropy_stats(**arguments, impl=impl)


def place_of(error):
    """Return where in the package, or in the tests, an error came from."""
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if HERE.parent in Path(frame.filename).parents
    ]
    return " <- ".join(f"{Path(f.filename).name}:{f.lineno} {f.line}" for f in reversed(frames[-2:]))


def check_devices(launch):
    """Raise if a kernel would get a tensor that is not on the GPU."""
    for name, value in launch.args.items():
        if isinstance(value, torch.Tensor):
            assert value.device.type == "cuda", f"{launch.kernel.__name__}: {name} is on {value.device}"


def main(arguments):
    parser = argparse.ArgumentParser()
    parser.add_argument("losses", nargs="*", help="all, if none is given")
    options = parser.parse_args(arguments)
    if core.INTERPRETED:
        parser.error("TRITON_INTERPRET is set: its ops would be those of CPU tensors")
    make_cuda_known()
    from battery import LOSSES

    core._too_old = lambda index: False
    harness.generator = lambda seed: None
    for module in list(sys.modules.values()):  # `plain` returns False for fake tensors
        if module.__name__.startswith("tlkernels.") and hasattr(module, "plain"):
            module.plain = lambda *tensors: True
    failures, made = collections.defaultdict(list), 0
    for impl in ("triton", "reference"):
        for name in options.losses or LOSSES:
            for case in LOSSES[name].cases:
                made += 1
                try:
                    with FakeTensorMode(), Implementations(), recorded("sm_90", check_devices):
                        call(name, LOSSES[name], case, impl)
                except Exception as error:
                    failures[name, impl, type(error).__name__, str(error), place_of(error)].append(case.id)
    for (*what, place), cases in failures.items():
        print(*what, f"{len(cases)} of {cases[:3]}", place, sep="\n    ")
    print(f"{made} calls with fake CUDA tensors, {sum(map(len, failures.values()))} failed")
    return bool(failures) or not made


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
