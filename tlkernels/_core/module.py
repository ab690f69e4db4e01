"""The base class of loss modules: options are attributes; copies and pickles of a module support process groups."""

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import numpy
import torch
import torch.distributed as dist
from torch import Tensor

from tlkernels._core.group import SavedGroup


class LossModule(torch.nn.Module):
    """A loss function as a module. Its options are attributes, which the function validates in each forward.

    The options of `class SomeLoss(LossModule, function=some_loss)` are the arguments that `__init__` and the function
    share; `__init__` sets an attribute of the same name for each.
    """

    _names: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, *, function: Callable[..., Any] | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if function is not None:  # a user's subclass inherits the options
            taken = inspect.signature(cls.__init__).parameters
            cls._names = tuple(name for name in inspect.signature(function).parameters if name in taken)

    def __setattr__(self, name: str, value: Any) -> None:
        # torch.compile would turn a numpy scalar into a tensor.
        super().__setattr__(name, value.item() if isinstance(value, numpy.generic) else value)

    def _options(self) -> dict[str, Any]:
        """Return the current options."""
        return {name: getattr(self, name) for name in self._names}

    def extra_repr(self) -> str:
        """Return the options for `repr`; a tensor is shown by its shape."""
        return ", ".join(
            f"{name}=Tensor{tuple(value.shape)}" if isinstance(value, Tensor) else f"{name}={value!r}"
            for name, value in self._options().items()
        )

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()  # type: ignore[no-untyped-call]
        return {name: _Shared(value) if _is_group(value) else value for name, value in state.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(  # type: ignore[no-untyped-call]
            {name: value.group if isinstance(value, _Shared) else value for name, value in state.items()}
        )


def refuse_deprecated(size_average: object, reduce: object) -> None:
    """Raise TypeError unless both of PyTorch's deprecated arguments are None."""
    for name, value in (("size_average", size_average), ("reduce", reduce)):
        if value is not None:
            raise TypeError(f"{name}: expected None (deprecated in favour of reduction), got {value!r}")


class _Shared:
    """A process group in a module's state: a copy of the module shares it, a pickle stores a `SavedGroup`."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Shared":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        group = self.group
        try:
            ranks = None if group is dist.group.WORLD else dist.get_process_group_ranks(group)
        except KeyError:
            raise ValueError("group: expected a process group that is not destroyed; it cannot be pickled") from None
        return _load, (ranks, group.group_name)


def _load(ranks: list[int] | None, name: str) -> Any:
    """Return the group, or if this process does not have it yet, a `SavedGroup` that each forward resolves."""
    saved = SavedGroup(ranks, name)
    try:
        return saved.find()
    except ValueError:
        return saved


def _is_group(value: object) -> bool:
    return dist.is_available() and isinstance(value, dist.ProcessGroup)
