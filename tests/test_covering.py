"""The quick part, which `make test` runs, has every value and every pair of values of a test's parameters."""

from itertools import combinations, product

import harness
import pytest
import test_every_loss
from conftest import quick_part
from covering import covering


def test_every_pair_is_covered_by_a_small_part_of_a_grid():
    sizes = (5, 4, 3, 2, 2, 2)
    grid = [[f"{axis}={value}" for axis, value in enumerate(row)] for row in product(*map(range, sizes))]
    chosen = covering(grid)
    pairs = lambda rows: {pair for row in rows for pair in combinations(row, 2)}  # noqa: E731
    assert pairs(grid[k] for k in chosen) == pairs(grid)
    assert len(chosen) <= 30 < len(grid)  # the two longest axes alone have 20 pairs


def test_single_values_and_no_values():
    assert covering([["a"], ["b"], ["a"]]) == [0, 1]
    assert covering([[], []]) == [0]
    assert covering([]) == []


@pytest.mark.parametrize("name", test_every_loss.LOSSES)
def test_every_dtype_option_and_target_of_a_loss_is_in_the_quick_part(name):
    loss = test_every_loss.LOSSES[name]
    ids = [f"{case.id}-{target}" for target in harness.targets(loss=loss.cuda or name) for case in loss.cases]
    chosen = quick_part(ids)
    assert {word for k in chosen for word in ids[k].split("-")} == {word for id in ids for word in id.split("-")}
    assert len(chosen) < len(ids) / 2


def test_an_option_is_also_left_out_with_every_other():
    ids = ["-".join(words) for words in product(("a=1", "plain"), ("b=1", "plain"), ("c=1", "plain"), "123456")]
    chosen = [set(ids[k].split("-")) for k in quick_part(ids)]
    assert any("a=1" in words and "b=1" not in words for words in chosen)
    assert any("b=1" in words and "a=1" not in words for words in chosen)
    assert any(not words & {"a=1", "b=1", "c=1"} for words in chosen)
