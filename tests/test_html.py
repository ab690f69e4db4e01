"""The HTML page of a result, as text; test_html_browser.py opens it."""

from __future__ import annotations

import base64
import copy
import hashlib
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
from browser import result

from tlkernels import html
from tlkernels.train.errors import UserError

RESULTS = Path(__file__).parents[1] / "bench" / "results"


def page(folder: Path, shown: dict[str, Any], before: dict[str, Any] | None = None) -> str:
    html.write(folder / "report.html", shown, before)
    return (folder / "report.html").read_text(encoding="utf-8")


def data(text: str) -> dict[str, Any]:
    """Return the JSON that the scripts of a page read."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    parsed: dict[str, Any] = json.loads(found[1], parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    return parsed


def test_the_policy_names_the_hash_of_every_script_and_allows_no_address(tmp_path: Path) -> None:
    text = page(tmp_path, result())
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = dict(part.split(" ", 1) for part in policy[1].split("; "))
    assert len(scripts) > 10
    assert allowed.pop("script-src").split() == [f"'sha256-{each}'" for each in hashes]
    assert allowed == {"default-src": "'none'", "img-src": "data: blob:", "style-src": "'unsafe-inline'"}
    assert re.findall(r'\b(?:src|href)="(?!#)[^"]*"', re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)) == []


def test_strings_of_a_result_are_escaped_in_the_head_and_in_the_data(tmp_path: Path) -> None:
    shown, hostile = result(), '</script><script>alert("&")</script><!--'
    shown["versions"]["torch"] = hostile
    shown["machine"]["cpu"] = hostile
    shown["commit"] = hostile
    shown["cases"][0]["absent"] = {hostile: hostile}
    text = page(tmp_path, shown)
    assert "alert(" in text
    assert "<script>alert(" not in text
    assert hostile in data(text)["cases"][0]["absent"]


def test_the_head_says_what_was_measured_and_how(tmp_path: Path) -> None:
    shown = {**result(), "dirty": True, "whole": False}
    shown["cases"][0] |= {"rounds": 101, "cold": False}
    text = page(tmp_path, shown)
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text))
    assert facts["Machine"] == "A processor, 2 cores, 2 threads, kernels for avx512"
    assert facts["Versions"] == "python 3.11.7, torch 2.13.0"
    assert facts["Measured"] == "2026-11-28 02:00, commit 0123456789 with local changes; a part of the cases"
    assert facts["How"].startswith(
        "7 to 101 rounds; in each, every contestant runs once, with cold caches in 11 of 12 cases, in"
    )
    assert facts["Ceilings"].startswith(
        "measured in the same run: a copy 20 GB/s (read and written); matrix products float32"
    )
    assert facts["Other work"] == "other processes used 1.2 % of the cores while it was timed"
    assert "Compared with" not in facts


def test_nan_and_infinity_become_words_since_json_has_none(tmp_path: Path) -> None:
    shown = result()
    shown["cases"][0]["error"]["auto"] = {"value": float("inf"), "gradient": float("nan")}
    assert data(page(tmp_path, shown))["cases"][0]["error"]["auto"] == {"value": "inf", "gradient": "nan"}


def test_an_older_file_without_ceilings_sizes_and_devices_has_a_page(tmp_path: Path) -> None:
    shown = json.loads((RESULTS / "2026-11-27-2574311fbc-cpu.json").read_text())
    text = page(tmp_path, shown)
    first = data(text)["cases"][0]
    assert first["dims"] == {"N": 8192, "V": 1000}
    assert first["elements"] == 8192000
    assert (first["device"], first["roof"], first["wrong"]) == ("cpu", None, {})
    assert "<dt>Ceilings</dt>" not in text
    assert "cold caches" not in text


def test_an_earlier_run_is_compared_with_its_quartiles_and_what_else_differs(tmp_path: Path) -> None:
    before = copy.deepcopy(result())
    before["cases"][0]["speedup"]["eager"] = [5.0, 5.5, 6.0]
    before["cases"][1]["memory"]["auto"] = 1_000_000
    before["versions"]["torch"] = "2.12.0"
    text = page(tmp_path, result(), before)
    found = data(text)["before"]
    changed = [row for row in found["changes"] if row["word"]]
    shape = "cross_entropy-256x1000-float32", "cross_entropy-1024x1000-float32"
    assert [(row["id"], row["what"], row["word"], row["worse"]) for row in changed] == [
        (shape[0], "eager", "slower", True),
        (shape[1], "memory", "more memory", True),
    ]
    assert (changed[0]["then"], changed[0]["now"]) == ([5.0, 5.5, 6.0], pytest.approx([3.8, 4.0, 4.2]))
    assert (changed[1]["then"], changed[1]["now"]) == (1_000_000, 4_000_000)
    assert found["differences"] == ["versions.torch: 2.12.0 -> 2.13.0"]
    assert '<section id="before"' in text
    assert '<section id="before"' not in page(tmp_path, result())


def test_a_section_of_scales_needs_scales(tmp_path: Path) -> None:
    assert '<section id="scales"' in page(tmp_path, result())
    assert '<section id="scales"' not in page(tmp_path, {**result(), "scales": []})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "diary"}, "kind: expected one of bench, profile, got 'diary'"),
        ({"cases": []}, "cases: expected at least one, got none"),
    ],
)
def test_a_result_that_has_no_page_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        html.write(tmp_path / "report.html", {**result(), **change})
    assert not (tmp_path / "report.html").exists()


def test_without_plotly_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    html.page._plotly.cache_clear()
    with pytest.raises(UserError, match=r"report.html needs plotly: pip install 'tlkernels\[bench\]'"):
        html.write(tmp_path / "report.html", result())
