"""Where the time and memory of a training step go, and whether another loss would help: `tlkernels.profile`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from tlkernels.profiling.session import Profile


def profile(
    model: nn.Module | None = None,
    *,
    steps: int = 8,
    warmup: int = 2,
    folder: str | Path = "profile",
    compare: bool = True,
) -> Profile:
    """Return a context that measures the optimiser steps of the training loop within it.

    Example::

        with tlkernels.profile(model) as p:
            for batch in loader:
                loss = ...
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if p.step():  # at the end of each optimiser step
                    break     # once all is measured; a loop that goes on is left alone
        print(p.report)

    The first steps are timed without synchronisation or a profiler. Further ones count operations, measure memory, and
    run under torch.profiler. Then each loss is computed alone on the loop's own batch, by every implementation and by
    eager PyTorch, also together with its head as `linear_cross_entropy` would, and at last the loop's steps use the
    implementations in turns. `folder` gets `report.html` (which needs plotly), `profile.json`, and `trace.json.gz`,
    which ui.perfetto.dev opens.

    Until those last steps, the training computes the same bits as without a profile. In them its loss comes from
    another implementation, whose result is as accurate as PyTorch's; `compare=False` leaves them out.

    Args:
        model: the module whose forward starts with the batch; None to find it in the first steps.
        steps: the number of steps that are timed, at least 3. The profile needs 6 more, and those of `compare`.
        warmup: the number of steps before, at least 1.
        folder: where the files go.
        compare: whether further steps use the other implementations of the losses, `steps` + 1 rounds of them.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `steps` or `warmup` is too small.
        RunError: on leaving the context, the loop did fewer steps than needed.
    """
    from tlkernels.profiling.session import Profile

    return Profile(model, steps=steps, warmup=warmup, folder=folder, compare=compare)
