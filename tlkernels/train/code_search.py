"""The built-in pairs of contrastive training: which function does a docstring describe?

The sources on this machine are read with `ast`: nothing is imported or downloaded. Every choice depends only on file
names and contents, so an environment always gives the same pairs.

1. **Pairs.** The query is the first paragraph of a function's docstring; the key is the function's source without its
   docstring. A package gives at most a twelfth of all pairs, and a file at most `PER_FILE`.
2. **Near-duplicates.** Each function's source occurs once, and of two queries whose 4-word shingles have a Jaccard
   similarity of at least `docstrings.SIMILAR`, the first one is kept, over all packages.
3. **Held-out packages.** The packages of `eval` and `test` have no pair on another side. Each gives at most a quarter
   of its side.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import islice
from pathlib import Path

from tlkernels.train import docstrings
from tlkernels.train.docstrings import LARGE, Distinct, digest
from tlkernels.train.errors import UserError

PER_FILE = 5  # pairs of one file; with more, a few files would dominate
MIN_WORDS, MAX_QUERY = 4, 300  # words and characters of a query
MIN_LINES, MAX_KEY = 3, 2000  # lines of a body without its docstring, and characters of a function
_TRAIN_PACKAGES, _HELD_OUT_PACKAGES = 12, 4  # a side has at least as many packages
_WORD = re.compile(r"\S*[A-Za-z]\S*")
_DEF = re.compile(r"^(?P<margin>[ \t]*)(?:async )?def (?P<name>\w+)", re.MULTILINE)
_DOCSTRING = re.compile(r':[ \t]*\n\s*[rRuU]?"""(.*?)"""', re.DOTALL)
_SKIPPED = re.compile(r"test\w*|__\w+__")  # tests, and methods such as __init__


@dataclass(frozen=True)
class Pair:
    """A docstring and its function.

    Attributes:
        query: the first paragraph of the docstring on one line.
        key: the source of the function without its docstring.
        negatives: other functions of the same file.
        package: the name of the package.
        place: the file and the line of the function, such as "numpy/lib/scimath.py:20".
    """

    query: str
    key: str
    negatives: tuple[str, ...]
    package: str
    place: str


def build(
    pairs: int, eval_fraction: float, test_fraction: float, negatives: int = 0, packages: int | None = None
) -> dict[str, list[Pair]]:
    """Return `{"train": [...], "eval": [...], "test": [...]}`, each in a mixed order that is always the same.

    Args:
        pairs: number of pairs, on the three sides together.
        eval_fraction: share of the pairs to evaluate on while training, above 0.
        test_fraction: share of the pairs of the hold-out; 0: none. The sum with `eval_fraction` is below 1.
        negatives: other functions of the same file in each pair; a function without as many gives no pair.
        packages: number of packages to read, in the order of `docstrings.packages`. None: as many as are needed.

    Raises:
        UserError: the installed packages have too few usable functions, or there are too few packages.
    """
    sides = {"test": max(1, round(pairs * test_fraction)) if test_fraction else 0}
    sides["eval"] = max(1, round(pairs * eval_fraction))
    sides["train"] = pairs - sum(sides.values())
    if sides["train"] < 1:
        raise UserError(f"the built-in data need a pair on each side; got {sides}")
    distinct = _DistinctPairs()
    collected: dict[str, list[Pair]] = {}
    for name, folder in islice(docstrings.packages(), packages):
        collected[name] = list(islice(_of_package(name, folder, negatives, distinct), -(-pairs // _TRAIN_PACKAGES)))
        if sum(map(len, collected.values())) >= pairs and (split := _split(collected, sides)):
            return split
    total = sum(map(len, collected.values()))
    raise UserError(
        f"the built-in data need {pairs} pairs, of which whole packages are held out; {len(collected)} installed "
        f"packages have {total}: give --data.path, or a smaller --data.pairs or --data.negatives"
    )


def _split(collected: dict[str, list[Pair]], sides: dict[str, int]) -> dict[str, list[Pair]] | None:
    """Fill one side after the other with whole packages; return None if there are too few pairs."""
    queue = iter(sorted(filter(collected.get, collected), key=lambda name: digest("side " + name)))
    split: dict[str, list[Pair]] = {}
    for side, count in sides.items():
        most = count if side == "train" else -(-count // _HELD_OUT_PACKAGES)
        rows: list[Pair] = []
        while len(rows) < count:
            if (name := next(queue, None)) is None:
                return None
            rows += collected[name][:most]
        split[side] = sorted(rows[:count], key=lambda pair: digest(pair.place + pair.query))
    return {side: split[side] for side in ("train", "eval", "test")}


# ---- reading -----------------------------------------------------------------------------------------------------


class _DistinctPairs:
    """Pairs of which no two have the same function or similar queries."""

    def __init__(self) -> None:
        self.keys: set[str] = set()
        self.queries = Distinct()

    def add(self, pair: Pair) -> bool:
        """Add a pair, and return True, unless it is similar to one of those before it."""
        key = " ".join(pair.key.split())
        if key in self.keys or not self.queries.add(pair.query):
            return False
        self.keys.add(key)
        return True


def _of_package(package: str, folder: Path, negatives: int, distinct: _DistinctPairs) -> Iterator[Pair]:
    for file in docstrings.sources_of(folder):
        if file.stat().st_size > LARGE:
            return  # the rest is larger still
        if file.name.startswith("test_"):
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, ValueError):
            continue  # a test for bad input, another encoding
        pairs = _of_file(text, package, f"{package}/{file.relative_to(folder).as_posix()}", negatives)
        yield from islice(filter(distinct.add, pairs), PER_FILE)


def _of_file(text: str, package: str, module: str, negatives: int) -> Iterator[Pair]:
    """Yield the pairs of a file in a mixed order."""
    blocks = sorted(_blocks(text), key=lambda block: digest(f"{module} {block.start}"))
    for block in blocks:
        function = block.function if _may_give_a_pair(block.text) else None
        if function is None or not _is_query(function.query) or function.query in " ".join(function.key.split()):
            continue
        chosen: dict[str, None] = {}
        for other in blocks:
            apart = other.end <= block.start or other.start >= block.end
            another = other.function if apart and len(chosen) < negatives else None
            if another is not None and another.query != function.query and another.key != function.key:
                chosen[another.key] = None
        if len(chosen) == negatives:
            place = f"{module}:{text.count(chr(10), 0, block.start) + 1}"
            yield Pair(function.query, function.key, tuple(chosen), package, place)


def _may_give_a_pair(text: str) -> bool:
    """Return whether the docstring and the lines after it have a right length. Most do not, and parsing is slow."""
    docstring = _DOCSTRING.search(text)
    if docstring is None or not _is_query(" ".join(docstring[1].split("\n\n")[0].split())):
        return False
    return text.count("\n", docstring.end()) >= MIN_LINES and len(text) - len(docstring[1]) < MAX_KEY + 100


def _is_query(text: str) -> bool:
    return len(_WORD.findall(text)) >= MIN_WORDS and len(text) <= MAX_QUERY


@dataclass(frozen=True)
class _Function:
    """The first paragraph of a function's docstring, "" without one, and its source without the docstring."""

    query: str
    key: str


@dataclass(frozen=True)
class _Block:
    """The lines of a function: their place in the file's text, the function's indentation, and the lines."""

    start: int
    end: int
    margin: int
    text: str

    @cached_property
    def function(self) -> _Function | None:
        """The function; None if it is short or long, or if the text is not one."""
        lines = [line[self.margin :] for line in self.text.split("\n")]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old escapes in other people's sources
                [node] = ast.parse("\n".join(lines)).body
        except (SyntaxError, ValueError, RecursionError):
            return None  # in a string, or with a string whose lines are not indented
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return None
        first, docstring = node.body[0], ast.get_docstring(node)
        body = lines[first.lineno - 1 if docstring is None else first.end_lineno : node.end_lineno]
        key = "\n".join([*lines[: first.lineno - 1], *body])
        if first.lineno == 1 or sum(map(bool, map(str.strip, body))) < MIN_LINES or len(key) > MAX_KEY:
            return None  # the first line has more than the signature
        return _Function(" ".join((docstring or "").split("\n\n")[0].split()), key)


def _blocks(text: str) -> Iterator[_Block]:
    """Yield the functions of a file but tests and dunder methods. A block ends before the next line of its margin."""
    for match in _DEF.finditer(text):
        if _SKIPPED.fullmatch(match["name"]):
            continue
        margin = len(match["margin"])
        following = _line_of(margin).search(text, match.end())
        end = following.start() if following else len(text)
        yield _Block(match.start(), end, margin, text[match.start() : end])


@cache
def _line_of(margin: int) -> re.Pattern[str]:
    """Return the pattern of a line with at most this margin; a bracket or a comment there is within a block."""
    return re.compile(rf"^[ \t]{{0,{margin}}}[^\s)\]}}#]", re.MULTILINE)
