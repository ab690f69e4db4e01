"""The package: the cost of its import, instruction sets, dispatch."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tlkernels as tlk
from tlkernels._core import native

X, Y = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )


def test_import_loads_nothing_heavy_and_is_quick(tmp_path):
    """The import takes at most 6 % of the processor time of torch's own; a slow or busy machine changes both.

    The first run compiles the bytecode for the others. A collection of garbage, which may come at any time, takes 80 ms
    for torch's objects.
    """
    code = """
import gc, sys, time
gc.disable()
times = [time.process_time()]
import torch
times.append(time.process_time())
loaded = set(sys.modules)
import tlkernels
times.append(time.process_time())
print((times[2] - times[1]) / (times[1] - times[0]))
new = {name.split(".")[0] for name in set(sys.modules) - loaded}
assert not new & {"transformers", "accelerate", "triton", "datasets", "jsonargparse", "matplotlib"}, new
assert not any(name.startswith(("tlkernels.train", "tlkernels.cli")) for name in sys.modules)
"""
    cached = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    runs = [python(code, **cached) for _ in range(4)]
    assert all(run.returncode == 0 for run in runs), runs[0].stderr
    assert min(float(run.stdout) for run in runs[1:]) < 0.06


def test_every_public_name_is_documented():
    for name in tlk.__all__:
        assert getattr(tlk, name).__doc__, name


@pytest.mark.usefixtures("needs_native")
class TestIsa:
    def test_list_get_force(self):
        assert native.isas()[-1] == "baseline"
        before = native.isa()
        for name in native.isas():
            native.force_isa(name)
            assert native.isa() == name
        native.force_isa(before)

    def test_unknown_name(self):
        before = native.isa()
        with pytest.raises(ValueError, match=rf"'sse9' is unknown or not supported.*{', '.join(native.isas())}"):
            native.force_isa("sse9")
        assert native.isa() == before

    @pytest.mark.full
    def test_environment(self):
        code = "import tlkernels; from tlkernels._core import native; print(native.isa())"
        for name in native.isas():
            assert python(code, TLKERNELS_ISA=name).stdout.strip() == name
        run = python(code, TLKERNELS_ISA="sse9")
        assert run.returncode != 0
        assert "TLKERNELS_ISA: ISA 'sse9' is unknown or not supported" in run.stderr
        assert all(name in run.stderr for name in native.isas())

    def test_only_the_targets_have_wide_instructions(self):
        """The linker could keep the AVX-512 copy of an inline function that targets share; older CPUs would crash."""
        from tlkernels import _C

        listing = subprocess.run(
            ["objdump", "-d", "-C", "--no-show-raw-insn", _C.__file__], check=True, capture_output=True, text=True
        ).stdout
        functions = re.findall(r"^[0-9a-f]+ <(.+)>:\n((?:.+\n)*)", listing, re.MULTILINE)
        wide = re.compile(r"\t(v[a-z0-9]+|k[a-z]+[bwdq])\s")
        baseline, allowed = 0, ("tlk::avx2::", "tlk::avx512::")
        seen = dict.fromkeys(allowed, 0)
        for name, body in functions:
            target = next((space for space in allowed if space in name), None)
            if target:
                seen[target] += bool(wide.search(body))
            else:
                assert not wide.search(body), f"{name}: {wide.search(body)[0]}"
                baseline += "tlk::baseline::" in name
        assert baseline > 10
        assert all(seen.values())  # the search does find such instructions


class TestDispatch:
    def test_explain(self):
        text = tlk.explain(tlk.cross_entropy, X, Y)
        assert text.startswith(
            f"cross_entropy(impl='auto'): served by {'native' if native.available() else 'reference'}"
        )
        assert re.search(r"triton: (not requested|supports|the package triton is not installed)", text)
        assert "served by reference" in tlk.explain(tlk.cross_entropy, X, Y, impl="reference")
        assert "cannot be served" in tlk.explain(tlk.cross_entropy, X.to("meta"), Y.to("meta"), impl="triton")
        assert "served by" in tlk.explain(tlk.CrossEntropyLoss(), X, Y)

    def test_explain_computes_nothing_and_leaves_no_trace(self):
        tlk.explain(tlk.cross_entropy, X, torch.full((4,), 99))
        assert tlk.cross_entropy(X, Y).isfinite()
        with pytest.raises(ValueError, match="reduction"):
            tlk.explain(tlk.cross_entropy, X, Y, reduction="median")
        assert tlk.cross_entropy(X, Y).isfinite()

    def test_explain_wants_a_loss(self):
        with pytest.raises(TypeError, match="expected a loss of tlkernels"):
            tlk.explain(torch.add, X, X)

    def test_a_named_implementation_is_never_replaced(self):
        with pytest.raises(NotImplementedError, match=r"triton: (supports|the package triton is not installed)"):
            tlk.cross_entropy(X.to("meta"), Y.to("meta"), impl="triton")
        with pytest.raises(NotImplementedError, match=r"supports CPU tensors only; got one on meta|does not load"):
            tlk.cross_entropy(X.to("meta"), Y.to("meta"), impl="native")

    def test_without_the_extension(self):
        code = """
import sys
sys.modules["tlkernels._C"] = None
import torch, tlkernels as tlk
x, y = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 1, 2, 3])
tlk.cross_entropy(x, y).backward()
print(tlk.explain(tlk.cross_entropy, x, y))
try:
    tlk.cross_entropy(x, y, impl="native")
except NotImplementedError as error:
    print(error)
"""
        run = python(code)
        assert run.returncode == 0, run.stderr
        assert "served by reference" in run.stdout
        assert run.stdout.count("tlkernels._C does not load") == 2


def test_no_path_of_a_machine_in_the_sources():
    root = Path(__file__).parent.parent
    for path in [*root.glob("*.*"), *root.glob("docs/*"), *root.glob("tlkernels/**/*.py"), *root.glob("bench/*.py")]:
        if path.is_file():
            text = path.read_text(errors="ignore")
            assert not re.search(r"/(home|root|Users)/\w", text), path
