"""The built-in data set: which installed package does a docstring come from?

The sources on this machine are read with `ast`: nothing is imported or downloaded, and no label is written by hand.
Every choice depends only on file names and contents, so an environment always gives the same data set.

1. **Classes.** The standard library and the installed packages of `PREFERRED`, then other packages, the largest sources
   first, until `classes` of them have `per_class` documents.
2. **Masking.** The package's name, its distribution's, aliases (`import numpy as np`) and submodule names that occur
   almost only in their own package become `@`, in the texts of all classes, so that a mask does not reveal a class.
3. **Near-duplicates.** Of two documents whose 4-word shingles have a Jaccard similarity of at least `SIMILAR`, the
   first one is kept. Case, digits and punctuation are ignored.
4. **Split by module.** All documents of a file are on the same side: `train`, `eval` or `test`. Each class has the same
   number of documents on each side.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import re
import sys
import sysconfig
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tlkernels.train.errors import UserError

PREFERRED = (
    "stdlib", "torch", "transformers", "sympy", "sklearn", "pandas", "matplotlib", "networkx", "scipy", "numpy",
)  # fmt: skip
MASK = "@"
SIMILAR = 0.5  # Jaccard similarity at which two documents are near-duplicates
TELLING = 0.8  # a submodule's name is masked if at least this share of the documents with it are its package's
PER_MODULE = 5  # documents of one file; with more, a few files would dominate a side of the split
MIN_WORDS, MAX_CHARS = 8, 480  # 480 characters are about 100 tokens
LARGE = 60_000  # bytes; a larger file is slow to parse and gives no more than PER_MODULE documents either

_SKIP = {
    "_vendor", "vendored", "_vendored", "externals", "extern", "third_party", "site-packages", "test", "tests",
    "testing",
}  # fmt: skip
_DOTTED = re.compile(r"[A-Za-z_]\w*(?:[.-]\w+)*")  # sklearn.svm, scikit-learn
_ALIAS = re.compile(r"\b(?:from\s+([\w.]+)\s+)?import\s+([\w.]+)\s+as\s+([A-Za-z_]\w+)")


@dataclass(frozen=True)
class Document:
    """One docstring: its text, its package and its file.

    `aliases` are pairs of a package and its alias, from the imports in the file's docstrings.
    """

    text: str
    package: str
    module: str
    aliases: frozenset[tuple[str, str]] = frozenset()


def build(
    classes: int = 8, per_class: int = 400, eval_fraction: float = 0.1, test_fraction: float = 0.15
) -> dict[str, list[Document]]:
    """Return `{"train": [...], "eval": [...], "test": [...]}`, each in a mixed order that is always the same.

    Args:
        classes: number of packages, 2 or more.
        per_class: documents of each package, on the three sides together.
        eval_fraction: share of the documents to evaluate on while training, above 0.
        test_fraction: share of the documents of the hold-out, above 0; the sum with `eval_fraction` is below 1.

    Raises:
        UserError: fewer than `classes` installed packages have `per_class` usable docstrings.
    """
    sides = {"test": round(per_class * test_fraction), "eval": round(per_class * eval_fraction)}
    sides["train"] = per_class - sum(sides.values())
    if classes < 2 or min(sides.values()) < 1:
        raise UserError(f"the built-in data set needs 2 classes and a document on each side; got {classes} and {sides}")
    counts: dict[str, int] = {}
    collected: dict[str, list[Document]] = {}
    for name, folder in packages():
        documents = _collect(name, folder, round(1.5 * per_class))  # some are near-duplicates
        counts[name] = len(documents)
        if len(documents) >= per_class:
            collected[name] = documents
        if len(collected) == classes:
            split = _split(collected, sides)
            if len(split) == classes:
                return {side: sorted((d for rows in split.values() for d in rows[side]), key=_order) for side in sides}
            collected = {name: documents for name, documents in collected.items() if name in split}
    most = ", ".join(f"{name} {count}" for name, count in sorted(counts.items(), key=lambda item: -item[1])[:6])
    raise UserError(
        f"the built-in data set needs {classes} installed packages with {per_class} usable docstrings, got "
        f"{len(collected)} (found: {most}); give --data.path, or a smaller --data.classes or --data.per_class"
    )


def sources(count: int) -> dict[str, str]:
    """Return `count` source files, module name -> text, in a mixed order that is always the same.

    An eighth of them is from each package, in the order in which `build` takes packages. Vendored files, tests and
    files of more than `LARGE` bytes are left out.

    Raises:
        UserError: the installed packages have fewer source files.
    """
    texts: dict[str, str] = {}
    for package, folder in packages():
        most = min(count, len(texts) + -(-count // 8))
        for file in sources_of(folder):
            if len(texts) == most or file.stat().st_size > LARGE:
                break
            try:
                text = file.read_text(encoding="utf-8")
            except (OSError, ValueError):
                continue  # a test for bad input, another encoding
            if text.strip():
                texts[f"{package}/{file.relative_to(folder).as_posix()}"] = text
        if len(texts) == count:
            return {module: texts[module] for module in sorted(texts, key=digest)}
    raise UserError(f"--data.documents is {count}, but the installed packages have {len(texts)} usable source files")


# ---- reading -----------------------------------------------------------------------------------------------------


def _collect(package: str, folder: Path, wanted: int) -> list[Document]:
    documents: list[Document] = []
    for file in sources_of(folder):
        documents += _read(file, package, folder)
        if len(documents) >= wanted:
            break
    return documents


def packages() -> Iterator[tuple[str, Path]]:
    """Yield the name and the folder of each package: `PREFERRED`, then the others, the largest sources first."""
    folders: dict[str, Path] = {"stdlib": Path(sysconfig.get_paths()["stdlib"])}
    for entry in sys.path:
        root = Path(entry)
        if root.name in ("site-packages", "dist-packages") and root.is_dir():
            for folder in sorted(root.iterdir()):
                if folder.name.isidentifier() and (folder / "__init__.py").is_file():
                    folders.setdefault(folder.name, folder)
    folders.pop("tlkernels", None)
    for name in PREFERRED:
        if name in folders:
            yield name, folders.pop(name)
    sizes = {name: sum(file.stat().st_size for file in folder.rglob("*.py")) for name, folder in folders.items()}
    for name in sorted(folders, key=lambda name: (-sizes[name], name)):
        yield name, folders[name]


def sources_of(folder: Path) -> list[Path]:
    """Return the package's files in an order that depends on a hash of their names; large files are last."""
    files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*.py") if file.is_file()}
    names = [name for name in files if not _SKIP.intersection(name.split("/"))]
    return [files[name] for name in sorted(names, key=lambda name: (files[name].stat().st_size > LARGE, digest(name)))]


def _read(file: Path, package: str, folder: Path) -> list[Document]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in other people's sources
            tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []  # a template, a test for bad input, another encoding
    module = f"{package}/{file.relative_to(folder).as_posix()}"
    whole = [" ".join((ast.get_docstring(node) or "").split()) for node in documented(tree)]
    imports = (match for text in whole for match in _ALIAS.findall(text))
    aliases = frozenset(((parent or name).split(".")[0], alias) for parent, name, alias in imports)
    texts = {text[:MAX_CHARS] for text in whole}
    long_enough = [text for text in texts if len(_words(text)) >= MIN_WORDS]
    return [Document(text, package, module, aliases) for text in sorted(long_enough, key=digest)[:PER_MODULE]]


def documented(node: ast.AST) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield the module, classes and functions under `node`; expressions, most of the tree, are skipped."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.stmt, ast.excepthandler, ast.match_case)):
            yield from documented(child)


# ---- masking -----------------------------------------------------------------------------------------------------


class _Mask:
    """Replaces the words that reveal a package by name, for all classes of the data set."""

    def __init__(self, collected: dict[str, list[Document]]) -> None:
        self.parts: set[str] = set()  # masked wherever a word contains them: PyTorch, NumPy, TransformerBlock
        self.words: set[str] = set()  # masked as whole words
        distributions = importlib.metadata.packages_distributions()
        for package in collected:
            if package == "stdlib":
                continue
            names = [package, *(re.split(r"[-_.]", name)[0] for name in distributions.get(package, []))]
            for stem in {name.lower().removesuffix("s") for name in names}:
                (self.parts if len(stem) >= 4 else self.words).add(stem)
        self.words |= _aliases(collected) | _telling_submodules(collected)

    def __call__(self, text: str) -> str:
        return _DOTTED.sub(self._word, text)

    def _word(self, match: re.Match[str]) -> str:
        dotted = match.group()
        lower = dotted.lower()
        if any(part in lower for part in self.parts) or not self.words.isdisjoint(re.split("[.-]", dotted)):
            return MASK
        return dotted


def _aliases(collected: dict[str, list[Document]]) -> set[str]:
    """Return the short names of the packages in documentation, such as `pd`, `plt`, `nx`."""
    documents = (document for documents in collected.values() for document in documents)
    return {alias for document in documents for package, alias in document.aliases if package in collected}


def _telling_submodules(collected: dict[str, list[Document]]) -> set[str]:
    """Return the names of direct submodules that occur almost only in their own package's documents."""
    owners: dict[str, set[str]] = defaultdict(set)
    for package, documents in collected.items():
        for document in documents:
            name = document.module.split("/")[1].removesuffix(".py")
            if len(name) >= 3 and not name.startswith("__"):
                owners[name].add(package)
    holders: dict[str, Counter[str]] = defaultdict(Counter)
    for package, documents in collected.items():
        for document in documents:
            for word in set(re.findall(r"\w+", document.text)) & owners.keys():
                holders[word][package] += 1
    return {
        name
        for name, counts in holders.items()
        if len(owners[name]) == 1 and sum(counts[p] for p in owners[name]) >= TELLING * sum(counts.values())
    }


def _masked(collected: dict[str, list[Document]]) -> dict[str, list[Document]]:
    mask = _Mask(collected)
    return {name: [replace(d, text=mask(d.text)) for d in documents] for name, documents in collected.items()}


# ---- near-duplicates and sides -----------------------------------------------------------------------------------


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def _shingles(text: str) -> set[str]:
    words = _words(text)
    return {" ".join(words[i : i + 4]) for i in range(max(1, len(words) - 3))}


class Distinct:
    """Texts of which no two are near-duplicates."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.holders: dict[str, list[int]] = defaultdict(list)  # shingle -> numbers of the texts that have it

    def add(self, text: str) -> bool:
        """Add a text, and return True, unless it is similar to one of those before it."""
        shingles = _shingles(text)
        common = Counter(number for shingle in shingles for number in self.holders.get(shingle, ()))
        if any(n >= SIMILAR * (len(shingles) + self.sizes[number] - n) for number, n in common.items()):
            return False
        for shingle in shingles:
            self.holders[shingle].append(len(self.sizes))
        self.sizes.append(len(shingles))
        return True


def _without_near_duplicates(collected: dict[str, list[Document]]) -> dict[str, list[Document]]:
    """Keep the first of similar documents, over all classes: a text that two packages share reveals neither."""
    kept = Distinct()
    return {
        name: [document for document in documents if kept.add(document.text)] for name, documents in collected.items()
    }


def _split(collected: dict[str, list[Document]], sides: dict[str, int]) -> dict[str, dict[str, list[Document]]]:
    """Return the sides of each package that still has enough documents after masking and removing near-duplicates."""
    distinct = _without_near_duplicates(_masked(collected))
    split = {name: _by_module(documents, sides) for name, documents in distinct.items()}
    return {name: rows for name, rows in split.items() if rows is not None}


def _by_module(documents: list[Document], sides: dict[str, int]) -> dict[str, list[Document]] | None:
    """Fill one side after the other with whole modules; return None if there are too few documents.

    Documents of a module that exceed the size of its side are dropped, not moved to another side.
    """
    modules: dict[str, list[Document]] = defaultdict(list)
    for document in documents:
        modules[document.module].append(document)
    queue = iter(sorted(modules, key=lambda name: digest("side " + name)))
    split: dict[str, list[Document]] = {}
    for side, count in sides.items():
        rows: list[Document] = []
        while len(rows) < count:
            if (name := next(queue, None)) is None:
                return None
            rows += modules[name]
        split[side] = rows[:count]
    return split


def _order(document: Document) -> str:
    return digest(document.module + document.text)


def digest(text: str) -> str:
    """Return a hash of a text, for an order that is mixed and always the same."""
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).hexdigest()
