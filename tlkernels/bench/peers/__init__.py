"""Losses of other libraries, where they are installed. Each first proves that it computes the same loss as ours."""

from __future__ import annotations

from dataclasses import replace

import torch

from tlkernels.bench.peers import (
    cce,
    inf_cl,
    liger,
    memeff,
    metric_learning,
    open_clip,
    pytorch,
    quack,
    sentence_transformers,
    siglip_kernel,
    trl,
)
from tlkernels.bench.peers.peer import Peer, Refused
from tlkernels.bench.peers.proof import adapted, prove, small
from tlkernels.bench.work import Case, Loss, Work
from tlkernels.machine import version_of

__all__ = ["PEERS", "Peer", "Refused", "contestants", "versions", "with_peer", "with_peers"]

_LIBRARIES = (
    pytorch,
    liger,
    quack,
    cce,
    trl,
    inf_cl,
    memeff,
    siglip_kernel,
    sentence_transformers,
    metric_learning,
    open_clip,
)
PEERS: tuple[Peer, ...] = tuple(peer for library in _LIBRARIES for peer in library.PEERS)
_refusals: dict[tuple[str, ...], str] = {}
"""What a proof found, or an empty string; a case draws its tensors many times."""


def versions() -> dict[str, str]:
    """Return the version of each library that is installed, by its name on PyPI."""
    return {peer.package: found for peer in PEERS if (found := version_of(peer.package))}


def contestants(case: Case, work: Work) -> tuple[dict[str, Loss], dict[str, str]]:
    """Return the peers of a case that compute its loss, and why the others that have this loss do not, by name."""
    losses: dict[str, Loss] = {}
    absent: dict[str, str] = {}
    chosen = case.peers if isinstance(case.peers, tuple) else tuple(peer.name for peer in PEERS)
    for peer in PEERS:
        if case.loss in peer.losses and peer.name in chosen:
            try:
                losses[peer.name] = _proven(peer, case, work)
            except Refused as refused:
                absent[peer.name] = str(refused)
    return losses, absent


def with_peers(case: Case, work: Work) -> Work:
    """Return the work of a case with the peers that compute its loss, and with the reasons why others do not."""
    losses, absent = contestants(case, work)
    return _joined(case, work, losses)._replace(absent={**work.absent, **absent})


def with_peer(name: str, case: Case, work: Work) -> Work:
    """Return the work of a case with one peer, without a proof: for a process that measures its memory.

    Raises:
        Refused: the library lacks an option.
    """
    (peer,) = (peer for peer in PEERS if peer.name == name)
    return _joined(case, work, {name: adapted(peer.losses[case.loss], work)})


def _joined(case: Case, work: Work, losses: dict[str, Loss]) -> Work:
    fresh = (peer.name for peer in PEERS if peer.name in losses and case.loss in peer.fresh)
    return work._replace(peers={**work.peers, **losses}, fresh=(*work.fresh, *fresh))


def _proven(peer: Peer, case: Case, work: Work) -> Loss:
    if version_of(peer.package) is None:
        raise Refused(f"not installed (pip install {peer.package})")
    if case.device not in peer.devices:
        raise Refused("needs a GPU")
    key = (peer.name, case.make.__name__, replace(case, shape=small(case.shape)).id, case.device)
    if key not in _refusals:
        _refusals[key] = _refusal(peer, case)
    if _refusals[key]:
        raise Refused(_refusals[key])
    return adapted(peer.losses[case.loss], work)


def _refusal(peer: Peer, case: Case) -> str:
    try:
        prove(peer, case)
    except Refused as refused:
        return str(refused)
    finally:
        if peer.compiles:
            torch.compiler.reset()  # else the shapes of the proof would make those of the case dynamic
    return ""
