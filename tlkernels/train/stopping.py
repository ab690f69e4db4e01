"""Stopping a run on SIGTERM, which schedulers send before they kill: the step ends, and a checkpoint is saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator

_asked = threading.Event()


@contextmanager
def stop_on_sigterm() -> Iterator[None]:
    """Let SIGTERM stop the training after its step; afterwards it means what it meant before."""
    _asked.clear()
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers only there
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: _asked.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def stopped(accelerator: Accelerator) -> bool:
    """Return whether any process was asked to stop; all return the same."""
    if accelerator.num_processes > 1:
        count = accelerator.reduce(torch.tensor(float(_asked.is_set()), device=accelerator.device), "sum")
        if count > 0:
            _asked.set()
    return _asked.is_set()
