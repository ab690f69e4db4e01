"""Checks that run on several processes of one group, and report their failures to the tests of one process."""

import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _process(rank, path, ranks, checks, queue):
    """Run every check on one rank."""
    torch.set_num_threads(1)
    store = f"file://{path}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    for name, (check, *given) in checks.items():
        try:
            check(rank, *given)
        except BaseException:
            queue.put((name, rank, traceback.format_exc()[-1500:]))  # the pipe's buffer is small
        dist.barrier()
    dist.destroy_process_group()


def failures_of(checks, ranks, folder):
    """Return the failures by name of `checks`, name -> (function, arguments after the rank), in new processes."""
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_process, (str(folder / "store"), ranks, checks, queue), nprocs=ranks)
    failed = {}
    while not queue.empty():
        name, rank, text = queue.get()
        failed.setdefault(name, []).append(f"rank {rank}: {text}")
    return failed
