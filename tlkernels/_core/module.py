"""What all loss modules share: options that are attributes, and process groups that survive copying and pickling."""

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import numpy
import torch
import torch.distributed as dist
from torch import Tensor

from tlkernels._core.group import SavedGroup


class LossModule(torch.nn.Module):
    """A module of a loss function, whose options are attributes of the same names.

    `class SomeLoss(LossModule, function=some_loss)` has for options the arguments that `__init__` shares with the
    function. `__init__` sets them; they can be read and set at any time, and the function checks them at each forward.
    """

    _names: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, *, function: Callable[..., Any] | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if function is not None:  # a user's subclass has the options of its base
            taken = inspect.signature(cls.__init__).parameters
            cls._names = tuple(name for name in inspect.signature(function).parameters if name in taken)

    def __setattr__(self, name: str, value: Any) -> None:
        # torch.compile makes tensors of numpy's scalars.
        super().__setattr__(name, value.item() if isinstance(value, numpy.generic) else value)

    def _options(self) -> dict[str, Any]:
        """Return the options as they are now."""
        return {name: getattr(self, name) for name in self._names}

    def extra_repr(self) -> str:
        """Return the options, for `repr`; of tensors the shape."""
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
    """Raise TypeError unless both are None, the arguments that PyTorch's losses had before `reduction`."""
    for name, value in (("size_average", size_average), ("reduce", reduce)):
        if value is not None:
            raise TypeError(f"{name}: expected None, since `reduction` takes its place, got {value!r}")


class _Shared:
    """A process group in the state of a module: a copy of the module shares it, a pickle has a `SavedGroup`."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Shared":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        group = self.group
        try:
            ranks = None if group is dist.group.WORLD else dist.get_process_group_ranks(group)
        except KeyError:
            raise ValueError("group: expected a process group that is not destroyed, to pickle the module") from None
        return _load, (ranks, group.group_name)


def _load(ranks: list[int] | None, name: str) -> Any:
    """Return the group if this process has it yet; else what looks for it at each forward."""
    saved = SavedGroup(ranks, name)
    try:
        return saved.find()
    except ValueError:
        return saved


def _is_group(value: object) -> bool:
    return dist.is_available() and isinstance(value, dist.ProcessGroup)
