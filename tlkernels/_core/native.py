"""The C++ extension: whether it is installed for this torch, and which instruction set it uses.

Environment: TLKERNELS_ISA chooses the instruction set when the package is imported: "avx512", "avx2" or "baseline".
"""

import importlib
import importlib.machinery
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # before the extension, whose libraries torch brings
from torch import Tensor

_ENVIRONMENT = "TLKERNELS_ISA"
_REMEDY = (
    "run `pip install --force-reinstall --no-deps --no-cache-dir SOURCE`, "
    "where SOURCE is the checkout, source archive or git address of tlkernels"
)


def _load() -> tuple[ModuleType | None, str]:
    # Searches only this package: an editable install adds a finder that may return another checkout's.
    spec = importlib.machinery.PathFinder.find_spec("tlkernels._C", [str(Path(__file__).parents[1])])
    if spec is None or spec.origin is None:
        return None, f"the extension tlkernels._C does not load (none is installed for this Python); {_REMEDY}"
    built_for = _torch_of(spec.origin)
    if built_for == str(torch.__version__):
        try:
            return importlib.import_module("tlkernels._C"), ""
        except ImportError as error:
            why = " ".join(str(error).split())
    else:
        why = f"it was built for torch {built_for}, this is torch {torch.__version__}"
    reason = f"the extension tlkernels._C does not load ({why}); {_REMEDY}"
    # No line of the user's code causes it, so the warning names none.
    warnings.warn_explicit(f"{reason}; until then impl='native' raises", RuntimeWarning, "tlkernels", 0)
    return None, reason


def _torch_of(file: str) -> str:
    """Return the version of torch that an extension was built for, without loading it (see csrc/module.cpp)."""
    with open(file, "rb") as extension:
        note = re.search(rb"\0tlkernels\0\0\0([^\0]+)\0", extension.read(1 << 16))
    return note[1].decode() if note else "of unknown version"


_extension, _reason = _load()


def available() -> bool:
    """Return whether the extension is loaded."""
    return _extension is not None


def why_not() -> str:
    """Return why the extension is not loaded, or an empty string."""
    return _reason


def _loaded() -> ModuleType:
    if _extension is None:
        raise RuntimeError(_reason)
    return _extension


def file() -> str:
    """Return the path of the extension."""
    return str(_loaded().__file__)


def served(op: str) -> tuple[str, ...]:
    """Return the device types, of "cpu" and "cuda", for which the extension implements `tlkernels::<op>`."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return tuple(key.lower() for key in ("CPU", "CUDA") if _extension and has(f"tlkernels::{op}", key))


def isas() -> tuple[str, ...]:
    """Return the instruction sets that this machine supports, best first; empty without the extension."""
    return tuple(_extension.isa_list()) if _extension else ()


def isa() -> str:
    """Return the instruction set in use; empty without the extension."""
    return str(_extension.isa_get()) if _extension else ""


def force_isa(name: str) -> None:
    """Use instruction set `name` from the next call on.

    Raises:
        ValueError: the name is unknown or this machine does not support it; the message names the choices.
        RuntimeError: the extension is not loaded.
    """
    _loaded().isa_force(name)


def attach(
    loss: Tensor, rule: Any, args: Sequence[Any], grads: Sequence[Tensor | None], on_device: bool, range: str
) -> None:
    """Make `loss` a function of `args` in autograd's graph, with `rule` as its backward. For `_core/autograd.py`.

    `grads` are the gradients for an upstream of 1, one for each of the rule's inputs, or empty. After their use, or
    with `create_graph=True`, `_core.autograd.gradients` computes them. With `on_device`, `tlkernels::scale_` multiplies
    them by the upstream, which needs no host sync. `range` is the backward's name in a profiler's trace, if not empty.
    """
    _loaded().attach(loss, rule, args, grads, on_device, range)


def build_info() -> dict[str, str]:
    """Return the extension's compiler, versions and options; empty without the extension."""
    return dict(_extension.build_info()) if _extension else {}


if _ENVIRONMENT in os.environ:
    try:
        force_isa(os.environ[_ENVIRONMENT])
    except (ValueError, RuntimeError) as error:
        raise type(error)(f"{_ENVIRONMENT}: {error}") from None
