"""What several test files share: a fixture, PyTorch's samples, numbers of threads, peak memory."""

import subprocess
import sys

import harness
import pytest
import torch

IMPLEMENTATIONS = sorted({target.impl for target in harness.targets()})


def impl_fixture(loss=""):
    """Return a fixture: a test with it runs on each target of the loss, and gets the name for `impl=`."""

    @pytest.fixture(params=harness.targets(loss=loss), ids=str)
    def impl(request):
        with harness.forced(request.param) as name:
            yield name

    return impl


def pytorch_samples(name, dtype, requires_grad=False):
    """Return PyTorch's own sample inputs of its functions of that name."""
    from torch.testing._internal.common_methods_invocations import op_db

    return [sample for op in op_db if op.name == name for sample in op.sample_inputs("cpu", dtype, requires_grad)]


def at_thread_counts(counts, run):
    """Return the results of `run()` with each number of threads."""
    before, results = torch.get_num_threads(), []
    try:
        for count in counts:
            torch.set_num_threads(count)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    return results


PEAK = """
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

def peak(function):
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts again from the present size
    before = status("VmRSS")
    function()
    return status("VmHWM") - before
"""


def peak_memory(script, *arguments):
    """Run a script in a new process, and return the numbers that it prints.

    In it `peak(function)` returns by how many bytes a call raises the resident memory.
    """
    command = [sys.executable, "-c", PEAK + script, *map(str, arguments)]
    return [float(word) for word in subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()]
