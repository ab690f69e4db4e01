"""The documentation names everything that is public, its links resolve, and the site builds."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import tlkernels

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("bench/*.md")])
OTHERS = {"PYTHONPATH", "LD_PRELOAD"}
"""Variables of Python and of the loader."""


def prose(page):
    """Return a page without its code, in which brackets are not links."""
    text = re.sub(r"^(```+).*?^\1", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "code", text)


def anchors(page):
    """Return the anchors that GitHub and the site give to a page's headings."""
    text = re.sub(r"^(```+).*?^\1", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def sources():
    """Yield the text of every file that may read an environment variable."""
    for folder in ("tlkernels", "csrc", "bench", "scripts", "tests/cuda_host"):
        for file in (ROOT / folder).rglob("*"):
            if file.suffix in (".py", ".h", ".cpp", ".inl", ".cu", ".cuh"):
                yield file.read_text()
    yield (ROOT / "setup.py").read_text()
    yield (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("name", tlkernels.__all__)
def test_every_public_name_is_documented(name):
    pattern = re.compile(rf"^\.\. auto(function|class):: tlkernels\.{name}$", re.MULTILINE)
    assert [page.name for page in PAGES if pattern.search(page.read_text())], f"no page of docs has tlkernels.{name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page):
    text = prose(page)
    broken = []
    for link in re.findall(r"\]\(([^()\s]+)\)", text) + re.findall(r'(?:src|srcset|href)="([^"]+)"', text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def variables():
    """Return what the lines in the loss pages' diffs use."""
    torch.manual_seed(0)
    rows, classes, features = 6, 5, 4
    labels = torch.tensor([0, 1, 0, 2, 1, 3])
    named = {name: torch.randn(rows, features) for name in ("z1", "z2", "query", "key", "image", "text", "features")}
    named |= {name: torch.randn(rows, classes) for name in ("logits", "student", "teacher", "prediction", "value")}
    named |= {name: torch.randn(rows, features) for name in ("hidden", "student_hidden", "teacher_hidden")}
    named |= {name: torch.nn.Linear(features, classes) for name in ("head", "student_head", "teacher_head")}
    named["advantage"] = torch.randn(rows)
    # All classes, so that a teacher's top k is the teacher.
    named["teacher_log_probs"], named["teacher_index"] = named["teacher"].log_softmax(-1).topk(classes)
    named.update(target=labels, labels=labels, scale=3.0, bias=-1.0, temperature=0.5, T=2.0, N=rows)
    return named


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/losses/*.md")), ids=lambda page: page.stem)
def test_both_sides_of_a_swap_are_equal(page):
    diff = re.search(r"^```diff\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)[1]
    swaps = [swap.splitlines() for swap in diff.split("\n\n") if "loss = " in swap]  # others make a module
    assert swaps
    for swap in swaps:
        before, after = ({"torch": torch, "F": F, "tlkernels": tlkernels, **variables()} for _ in range(2))
        exec("\n".join(line[1:] for line in swap if not line.startswith("+")), before)
        exec("\n".join(line[1:] for line in swap if not line.startswith("-")), after)
        torch.testing.assert_close(after["loss"], before["loss"])


def test_environment_variables_are_those_that_the_code_reads():
    table = re.findall(r"^\| (`[A-Z].*?) \|", (ROOT / "docs/environment.md").read_text(), re.MULTILINE)
    documented = [name for cell in table for name in re.findall(r"`(\w+)`", cell)]
    assert len(documented) == len(set(documented))
    code = "\n".join(sources())
    read = set(re.findall(r"\bTLKERNELS_[A-Z0-9_]*[A-Z0-9]\b", code))
    read |= set(re.findall(r"""(?:environ(?:\.get\(|\[)|getenv\()\s*["'](\w+)["']""", code))  # Python and C++
    read |= set(re.findall(r"\$\$\{(\w+):", code))  # the Makefile
    assert read - OTHERS - set(documented) == set()
    assert {name for name in documented if not re.search(rf"\b{name}\b", code)} == set()


@pytest.mark.full  # `make docs` does it too
def test_the_site_builds_without_warnings_and_has_every_public_name(tmp_path):
    pytest.importorskip("sphinx")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-qW",
        "-c",
        "docs",
        "-d",
        str(tmp_path / "doctrees"),
        ".",
        str(tmp_path),
    ]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    site = "\n".join(page.read_text() for page in tmp_path.glob("docs/**/*.html"))
    assert [name for name in tlkernels.__all__ if f'id="tlkernels.{name}"' not in site] == []
    assert "<math" in site and 'class="problematic"' not in site
    assert not re.search(r'<(script|link|img)[^>]*(src|href)="(https?:)?//', site), "a page needs the network"
