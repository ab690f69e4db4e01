"""Pairwise covering arrays: few cases that together contain every pair of parameter values."""

import heapq
from collections.abc import Collection, Sequence
from itertools import combinations


def covering(cases: Sequence[Collection[str]]) -> list[int]:
    """Return the indices of cases that cover all pairs of values; a case is the collection of its parameter values.

    Greedy: it takes the case with the most pairs that are not covered yet, the first one of equals.
    """
    pairs = [_pairs(values) for values in cases]
    missing = set().union(*pairs)
    queue = [(-len(new), k) for k, new in enumerate(pairs)]
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
