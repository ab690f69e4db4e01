"""A page: a head, sections, and the data that the sections' scripts draw, in one file of HTML."""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from string import Template
from typing import Any

from tlkernels.train.errors import UserError

SHARED = ("dom", "format", "state", "table", "plot")
"""Scripts that every page has, in the order of their use; "main" comes last and draws the sections."""


@dataclass(frozen=True)
class Section:
    """A part of the page. The script `assets/<script>.js` fills it; None if `intro` is all there is."""

    id: str
    title: str
    intro: str = ""
    script: str | None = None


@dataclass(frozen=True)
class Page:
    """What a page shows: facts for the head, sections, and JSON data for their scripts."""

    title: str
    lead: str
    facts: Sequence[tuple[str, str]]
    sections: Sequence[Section]
    data: Mapping[str, Any]
    scripts: Sequence[str] = ()
    """Scripts that several sections of this page share."""


def render(page: Page) -> str:
    """Return the page as HTML that loads nothing.

    Text from the data is escaped, and the browser runs only the scripts whose hashes the page's policy names.
    """
    own = [section.script for section in page.sections if section.script]
    names = [*SHARED, *page.scripts, *own, "main"]
    scripts = [_plotly(), *(_asset(f"{name}.js") for name in names)]
    hashes = " ".join(map(_hash, scripts))
    policy = f"default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src {hashes}"
    return Template(_asset("page.html")).substitute(
        policy=policy,
        title=html.escape(page.title),
        lead=html.escape(page.lead),
        facts="\n".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in page.facts),
        css=_asset("page.css"),
        sections="\n".join(map(_section, page.sections)),
        contents="\n".join(f'<a href="#{part.id}">{html.escape(part.title)}</a>' for part in page.sections),
        data=_json(page.data),
        scripts="\n".join(f"<script>{script}</script>" for script in scripts),
    )


def _section(section: Section) -> str:
    intro = f"<p>{html.escape(section.intro)}</p>" if section.intro else ""
    return (
        f'<section id="{section.id}" aria-labelledby="{section.id}-title" data-script="{section.script or ""}">'
        f'<h2 id="{section.id}-title">{html.escape(section.title)}</h2>{intro}<div class="body"></div></section>'
    )


def _asset(name: str) -> str:
    return files("tlkernels.html").joinpath("assets", name).read_text(encoding="utf-8")


@cache
def _plotly() -> str:
    if importlib.util.find_spec("plotly") is None:
        raise UserError("report.html needs plotly: pip install 'tlkernels[bench]'")
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


@cache
def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _json(data: Any) -> str:
    """Return JSON that no text can end early: `<` is escaped, so `</script>` and `<!--` cannot occur."""
    return json.dumps(_finite(data), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _finite(data: Any) -> Any:
    """Return the data with NaN and infinities, which JSON lacks, as the strings "nan", "inf", "-inf"."""
    if isinstance(data, Mapping):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return str(data) if isinstance(data, float) and not math.isfinite(data) else data
