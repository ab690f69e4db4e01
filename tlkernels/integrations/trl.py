"""tlkernels in TRL's trainers: `patch()` replaces TRL's loss functions, `unpatch()` restores them."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from types import SimpleNamespace
from typing import Any

import trl
from torch import Tensor
from trl.trainer import distillation_trainer, utils

from tlkernels.integrations.trl_losses import Loss, chunked_divergence, fused_head, generalized_jsd, of_logits, tell

with warnings.catch_warnings(action="ignore"):  # that the package is experimental; patch() checks what it replaces
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

_replaced: list[tuple[Any, Any]] = []


def patch() -> None:
    """Let TRL's trainers compute their losses with tlkernels. Running it again does nothing.

    Replaces, in all modules of TRL, also in those that are imported later::

        trl.trainer.utils._ChunkedLogProbFunction             # the fused head of SFT, DPO, KTO, GRPO, RLOO, async GRPO
        trl.trainer.utils.selective_log_softmax               # in CPO, ORPO, SDPO, SDFT, A2PO
        trl.trainer.utils.selective_log_softmax_and_entropy   # in TPO
        trl.trainer.utils.entropy_from_logits
        trl.trainer.distillation_trainer._chunked_divergence_loss
        trl.experimental.gkd.GKDTrainer.generalized_jsd_loss

    Arguments, shapes and results are TRL's; but what TRL computes in float32 even for float64 is float64. Trainers that
    exist already take part. What someone else has put in the place of TRL's function stays, as do modules outside of
    TRL. If TRL's own code must still compute something, a warning says so once; docs/hosts/trl.md lists the cases.

    Raises:
        AttributeError: this version of TRL lacks one of these functions. Nothing is replaced.
    """
    if _replaced:
        return
    missing = [f"{owner.__name__}.{name}" for owner, name, _ in _SEAMS if name not in vars(owner)]
    if missing:
        raise AttributeError(f"TRL {trl.__version__} has no {', '.join(missing)}; expected them as in TRL 1.16")
    _replaced.extend([(vars(owner)[name], serve(vars(owner)[name])) for owner, name, serve in _SEAMS])
    for (owner, name, _), pair in zip(_SEAMS, _replaced, strict=True):
        # TRL's kernels ask _use_triton too, whether to launch: theirs stays
        _swap([owner] if name == "_use_triton" else _owners(), *pair)


def unpatch() -> None:
    """Restore TRL's functions, also in modules imported since. Without a `patch()` before, it does nothing."""
    while _replaced:
        theirs, ours = _replaced.pop()
        _swap(_owners(), ours, theirs)
    tell.cache_clear()


def _owners() -> list[Any]:
    modules = [module for name, module in list(sys.modules.items()) if name.split(".")[0] == "trl" and module]
    return [*modules, GKDTrainer]


def _swap(owners: list[Any], old: Any, new: Any) -> None:
    for owner in owners:
        for name in [name for name, value in vars(owner).items() if value is old]:
            setattr(owner, name, new)


def _keeps(argument: Any) -> bool:
    """Return whether TRL's own code must serve a call with this argument, and say why."""
    if partitioned := hasattr(argument, "ds_id"):  # freed after the forward; only TRL's backward gathers it again
        tell("the losses of a vocabulary head that DeepSpeed ZeRO-3 partitions")
    if elsewhere := isinstance(argument, Tensor) and argument.device.type not in ("cpu", "cuda"):
        tell(f"the losses on {argument.device.type}, where tlkernels has no kernels")
    return partitioned or elsewhere


def _called(theirs: Any, signature: inspect.Signature, loss: Loss) -> Callable[..., Any]:
    """Return a function with the signature of TRL's that gives its arguments to `loss`, by name and with defaults."""

    @wraps(theirs)
    def ours(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        if any([_keeps(argument) for argument in call.arguments.values()]):
            return theirs(*args, **kwargs)
        return loss(theirs, call.arguments)

    return ours


def _function(loss: Loss) -> Callable[[Any], Any]:
    return lambda theirs: _called(theirs, inspect.signature(theirs), loss)


def _static_method(loss: Loss) -> Callable[[Any], Any]:
    return lambda theirs: staticmethod(_called(theirs.__func__, inspect.signature(theirs.__func__), loss))


def _autograd_function(loss: Loss) -> Callable[[Any], Any]:
    def serve(theirs: Any) -> Any:
        _, *parameters = inspect.signature(theirs.forward).parameters.values()  # without ctx
        return SimpleNamespace(apply=_called(theirs.apply, inspect.Signature(parameters), loss))

    return serve


_SEAMS: tuple[tuple[Any, str, Callable[[Any], Any]], ...] = (
    (utils, "_ChunkedLogProbFunction", _autograd_function(fused_head)),
    # whether to leave out the positions without a label: on a CPU that saves their products too
    (utils, "_use_triton", lambda theirs: lambda device: device.type == "cpu" or theirs(device)),
    (utils, "selective_log_softmax", _function(of_logits)),
    (utils, "selective_log_softmax_and_entropy", _function(of_logits)),
    (utils, "entropy_from_logits", _function(of_logits)),
    (distillation_trainer, "_chunked_divergence_loss", _function(chunked_divergence)),
    (GKDTrainer, "generalized_jsd_loss", _static_method(generalized_jsd)),
)
