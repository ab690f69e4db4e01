"""Pairwise covering arrays: few cases in which every pair of parameter values that occurs anywhere occurs."""

import heapq
from collections.abc import Collection, Sequence
from itertools import combinations


def covering(cases: Sequence[Collection[str]]) -> list[int]:
    """Return which of the cases, given by their parameter values, cover all pairs of values.

    Greedy: the case with the most pairs that are not covered yet comes next; of several the first.
    """
    pairs = [_pairs(values) for values in cases]
    missing = set().union(*pairs)
    queue = [(-len(some), k) for k, some in enumerate(pairs)]
    heapq.heapify(queue)
    chosen = []
    while missing:
        most, k = heapq.heappop(queue)
        gain = len(pairs[k] & missing)
        if gain == -most:
            chosen.append(k)
            missing -= pairs[k]
        elif gain:  # fewer than when it was last counted
            heapq.heappush(queue, (-gain, k))
    return sorted(chosen)


def _pairs(values: Collection[str]) -> set[tuple[str, ...]]:
    distinct = sorted(set(values))
    return set(combinations(distinct, 2)) or {tuple(distinct)}
