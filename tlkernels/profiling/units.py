"""A head and its loss as one unit, and `linear_cross_entropy` in its place."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tlkernels._core.dispatch import Implementation, resolve
from tlkernels.losses.cross_entropy.call import plain_options
from tlkernels.losses.linear_cross_entropy.call import Arguments, check
from tlkernels.losses.linear_cross_entropy.ops import IMPLEMENTATIONS
from tlkernels.profiling.calls import EAGER, Call, Logits, OurCall, Way, logits_of
from tlkernels.profiling.heads import Heads, NotTried
from tlkernels.profiling.recorded import Recorded, autocast_of, detached
from tlkernels.profiling.torch_calls import TorchCall

_LOSS = "linear_cross_entropy"
_LOSSES = ("F.cross_entropy", "cross_entropy")
_DEFAULTS = plain_options(None, -100, 0.0, 1.0, None, 0.0)
_Key = tuple[str, torch.dtype]


class UnitCall:
    """The arguments of `linear_cross_entropy`. Its ways are that loss, and the head with a loss after it.

    Args:
        ours: a call of `linear_cross_entropy`, whose `own` is what "auto" chooses.
        name: the head and the loss.
        chosen: the implementation of `tlkernels.cross_entropy` that the loop takes; None for PyTorch's.
    """

    def __init__(self, ours: OurCall, name: str, chosen: Implementation | None) -> None:
        self.name, self.arguments, self.auto, self.refused = name, ours.arguments, ours.own, ours.refused
        self.own = EAGER if chosen is None else f"head, then {chosen.name}"
        own: dict[str, Way] = {} if chosen is None else {self.own: partial(_head_and_loss, chosen)}
        self.ways: Mapping[str, Way] = own | ours.ways


def _head_and_loss(chosen: Implementation, call: Arguments) -> Any:
    return chosen.run(call.on(F.linear(call.input, call.linear_weight, call.linear_bias)))


@dataclass
class _Unit:
    """The calls of a loss; of several, the one with the most logits."""

    head: nn.Linear
    head_autocast: torch.dtype | None
    autocast: torch.dtype | None
    arguments: Arguments
    chosen: Implementation | None
    logits: Logits
    calls: int
    elements: int
    """Of all calls."""
    takers: list[list[str]]
    """For the output of each call of the head, the losses that take it."""


class Units:
    """The units of a step. If one call of a loss cannot be replaced, the loss is not tried."""

    def __init__(self, heads: Heads, roots: Sequence[nn.Module]) -> None:
        self._heads, self._roots = heads, roots
        self._units: dict[_Key, _Unit] = {}
        self._why_not: dict[_Key, str] = {}

    def clear(self) -> None:
        """Forget the units, with their tensors."""
        self._units.clear()
        self._why_not.clear()

    def loss(self, key: _Key, call: Call, tensors: Sequence[Tensor]) -> None:
        """Note a call, which takes `tensors`."""
        runs = {id(run): run for tensor in tensors if (run := self._heads.taken(tensor)) is not None}
        for run in runs.values():
            run.losses.append(call.name)
        if call.name in _LOSSES:
            try:
                self._add(key, call)
            except (NotTried, TypeError, ValueError) as error:
                self._why_not.setdefault(key, str(error))

    def _add(self, key: _Key, call: Call) -> None:
        logits, given = _read(call)
        run, known = self._heads.unchanged(logits), self._units.get(key)
        head, elements = run.module, logits.numel()
        if known is not None and known.head is not head:
            raise NotTried("the calls of the loss have different heads")
        if known is None or elements > known.logits.elements:
            hidden = run.input.reshape(-1, head.in_features).detach().requires_grad_(run.input.requires_grad)
            earlier = (known.calls, known.elements, known.takers) if known else (0, 0, [])
            chosen = call.chosen if isinstance(call, OurCall) else None
            arguments = tree_map(detached, given(hidden, head.weight, head.bias))
            described = logits_of(logits, 1)
            self._units[key] = _Unit(head, run.autocast, autocast_of(logits), arguments, chosen, described, *earlier)
        unit = self._units[key]
        unit.calls, unit.elements = unit.calls + 1, unit.elements + elements
        unit.takers.append(run.losses)

    def recorded(self) -> list[tuple[dict[str, Any], Recorded | None]]:
        """Return what profile.json says of each unit before it is measured, and what `replay` takes."""
        keys = dict.fromkeys([*self._units, *self._why_not])
        return [self._recorded(key) for key in keys]

    def _recorded(self, key: _Key) -> tuple[dict[str, Any], Recorded | None]:
        loss, _ = key
        found: dict[str, Any] = {"loss": loss, "head": None, "auto": None, "swap": None, "why_not": None, "unit": None}
        try:
            if key in self._why_not:
                raise NotTried(self._why_not[key])
            unit = self._units[key]
            losses = next((losses for losses in unit.takers if len(losses) > 1), None)
            if losses is not None:
                raise NotTried(f"{len(losses)} losses take the same logits: {', '.join(losses)}")
            ours = _ours(unit)
        except (NotTried, TypeError, ValueError, NotImplementedError) as error:
            return found | {"why_not": str(error).partition("\n")[0]}, None
        name = _name(self._roots, unit.head)
        call = UnitCall(ours, f"{name} and {loss}", unit.chosen)
        found |= {"head": name, "auto": call.auto, "swap": _swap(name, ours.arguments)}
        return found, Recorded(
            call, unit.calls, unit.elements, unit.logits.elements, unit.autocast, unit.logits, spans_processes=False,
            parts=_parts(ours.arguments),
        )  # fmt: skip


def _read(call: Call) -> tuple[Tensor, Callable[[Tensor, Tensor, Tensor | None], Arguments]]:
    """Return the logits, and what makes the arguments of `linear_cross_entropy` for a layer.

    Raises:
        TypeError, ValueError: the call has an option that `linear_cross_entropy` has not.
    """
    if isinstance(call, TorchCall):
        given = call.named(call.arguments)
        options = plain_options(
            given.get("weight"), given.get("ignore_index", -100), given.get("label_smoothing", 0.0), 1.0, None, 0.0
        )
        target, reduction, row_weight = given["target"], given.get("reduction", "mean"), None
    else:
        own = call.arguments
        if own.vocab_group is not None:
            raise ValueError("vocab_group: the classes are spread over processes")
        given, options = {"input": own.input}, own.options
        target, reduction, row_weight = own.target, own.reduction, own.row_weight
    return given["input"], lambda hidden, weight, bias: Arguments(
        hidden, weight, bias, target, options, reduction, False, row_weight
    )


def _ours(unit: _Unit) -> OurCall:
    """Return the call of `linear_cross_entropy`, with the layer as the head's autocast casts it."""
    autocast, kind = unit.head_autocast, unit.arguments.input.device.type
    with torch.enable_grad(), torch.autocast(kind, autocast, enabled=autocast is not None):
        arguments = tree_map(detached, check(unit.arguments))
    return OurCall(_LOSS, IMPLEMENTATIONS, arguments, resolve(_LOSS, IMPLEMENTATIONS, arguments, "auto"))


def _parts(call: Arguments) -> tuple[str, ...]:
    """Return the names of the tensors whose gradients are compared, in the order of the arguments."""
    named = {"hidden": call.input, "weight": call.linear_weight, "bias": call.linear_bias, "target": call.target,
             "class weight": call.options.weight, "row_weight": call.row_weight}  # fmt: skip
    return tuple(name for name, tensor in named.items() if tensor is not None and tensor.requires_grad)


def _name(roots: Sequence[nn.Module], head: nn.Module) -> str:
    names = (name for root in roots for name, module in root.named_modules() if module is head)
    return next(names, "") or "head"


def _swap(name: str, call: Arguments) -> str:
    """Return the call of `linear_cross_entropy` as one writes it."""
    head = re.sub(r"\.(\d+)\b", r"[\1]", f"model.{name}")
    words = ["hidden", f"{head}.weight", "target"]
    words += [f"linear_bias={head}.bias"] if call.linear_bias is not None else []
    for option, value in call.options._asdict().items():
        if value is not getattr(_DEFAULTS, option) and isinstance(value, Tensor):
            words.append(f"{option}={option}")
        elif value != getattr(_DEFAULTS, option):
            words.append(f"{option}={value!r}")
    words += [f"reduction={call.reduction!r}"] if call.reduction != "mean" else []
    words += ["row_weight=row_weight"] if call.row_weight is not None else []
    return f"tlkernels.linear_cross_entropy({', '.join(words)})"
