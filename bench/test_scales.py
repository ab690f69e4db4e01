"""How time and memory of the losses grow with each size: nothing grows faster than it should."""

from typing import Any

import pytest

from bench.cases import SCALES
from tlkernels.bench.scale import in_words, scales, too_fast
from tlkernels.bench.work import Case


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("case", SCALES, ids=lambda case: case.id)
def test_growth(case: Case, growth: list[dict[str, Any]], pytestconfig: pytest.Config) -> None:
    ours = pytestconfig.getoption("impl")
    found = list(scales(case, (ours, "eager")))
    wrong = [one for one in found if one["contestant"] == ours and too_fast(one)]
    assert not wrong, in_words(wrong)
    growth.extend(found)
