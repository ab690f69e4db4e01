"""`report.html`: the results of a measurement as one file that needs no network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tlkernels.html import bench, profile
from tlkernels.html.page import render

PAGES = {"bench": bench.page, "profile": profile.page}
"""What makes the page of a result, by the result's kind."""


def write(path: Path, result: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> None:
    """Write the page of a result to `path`; the page compares it with the earlier result `before`.

    Raises:
        ValueError: The result is of an unknown kind or has no cases, or `before` is of another kind.
        UserError: The package plotly is missing.
    """
    kind = result.get("kind", "bench")  # files of before 2026-11-28 have no kind
    if kind not in PAGES:
        raise ValueError(f"kind: expected one of {', '.join(PAGES)}, got {kind!r}")
    path.write_text(render(PAGES[kind](result, before)), encoding="utf-8")
