"""The built-in data set: on planted sources, and on the packages of this machine."""

import re
from collections import Counter
from pathlib import Path

import pytest

from tlkernels.train import UserError, docstrings
from tlkernels.train.docstrings import Document, build

SIDES = ("train", "eval", "test")


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """Three packages, `zebra`, `quokka` and `okapi`, of 40 modules with one class and two functions each."""

    def source(package, number):
        stem = package[0] + chr(97 + number // 26) + chr(97 + number % 26)
        words = [f"{stem}{chr(97 + i)}word" for i in range(12)]  # no two documents share one of these words
        texts = [" ".join(f"{word}{part}" for word in words) for part in ("x", "y", "z")]
        return (
            f'"""{texts[0]} read by {package}.core and Py{package.title()} alone."""\n'
            f'class A:\n    """{texts[1]} says import {package}.core as zk and calls zk.run twice."""\n'
            f"    def f(self):\n        if self:\n"
            f'            def g():\n                """{texts[2]} striping {package}"""\n'
        )

    for package in ("zebra", "quokka", "okapi"):
        folder = tmp_path / package
        (folder / "sub").mkdir(parents=True)
        for number in range(40):
            (folder / ("sub" if number % 2 else "") / f"m{number}.py").write_text(source(package, number))
        (folder / "broken.py").write_text("def (")
    monkeypatch.setattr(docstrings, "packages", lambda: ((p, tmp_path / p) for p in ("zebra", "quokka", "okapi")))
    return tmp_path


def test_classes_are_balanced_and_no_module_is_on_two_sides(planted):
    split = build(classes=3, per_class=40, eval_fraction=0.1, test_fraction=0.25)
    assert {side: len(split[side]) for side in SIDES} == {"train": 78, "eval": 12, "test": 30}
    for rows in split.values():
        assert len(set(Counter(document.package for document in rows).values())) == 1
    modules = [{document.module for document in split[side]} for side in SIDES]
    assert not modules[0] & modules[1] and not modules[0] & modules[2] and not modules[1] & modules[2]
    assert split == build(classes=3, per_class=40, eval_fraction=0.1, test_fraction=0.25)
    order = [document.package for document in split["train"]]
    assert order != sorted(order) and order != sorted(order, reverse=True)


def test_nested_definitions_are_found_and_broken_sources_passed_by(planted):
    texts = [document.text for rows in build(classes=3, per_class=40).values() for document in rows]
    assert any("striping" in text for text in texts)


def test_names_are_masked_wherever_they_occur(planted):
    texts = [document.text for rows in build(classes=3, per_class=40).values() for document in rows]
    assert any("read by @ and @ alone" in text for text in texts)  # okapi.core, PyOkapi
    assert any("import @ as @ and calls @ twice" in text for text in texts)  # the alias is found in the text itself
    assert not re.search(r"zebra|quokka|okapi|\bzk\b", " ".join(texts), re.I)


def test_a_submodules_name_is_masked_where_it_tells_the_package():
    def documents(package, submodule, foreign):
        texts = [f"about {submodule} number {i}" for i in range(9)] + [f"{foreign} shared number {i}" for i in range(3)]
        return [Document(text, package, f"{package}/{submodule}/m{i}.py") for i, text in enumerate(texts)]

    collected = {"zebra": documents("zebra", "stripes", "common"), "okapi": documents("okapi", "common", "other")}
    mask = docstrings._Mask(collected)
    assert mask("uses stripes and a common thing") == "uses @ and a common thing"


def test_near_duplicates_are_dropped_across_packages():
    base = "reads the file line by line and returns every record that the given filter accepts in order"
    near = base.replace("in order", "as found 42 times!").replace("file", "FILE")
    far = "writes bytes to a socket until the peer closes it or the timeout of the caller has passed"
    collected = {
        "zebra": [Document(base, "zebra", "zebra/a.py")],
        "okapi": [Document(near, "okapi", "okapi/a.py"), Document(far, "okapi", "okapi/b.py")],
    }
    kept = docstrings._without_near_duplicates(collected)
    assert [d.text for d in kept["zebra"]] == [base]
    assert [d.text for d in kept["okapi"]] == [far]


def test_too_few_packages_is_one_clear_error(planted):
    with pytest.raises(UserError, match=r"needs 4 installed packages with 40 .* got 3 \(.*zebra \d+"):
        build(classes=4, per_class=40)
    with pytest.raises(UserError, match="needs 2 classes and a document on each side"):
        build(classes=2, per_class=3)


@pytest.mark.full
def test_on_this_machine():
    """The default has at least 6 classes and 3000 docstrings; the checks do not use the code that built it."""
    split = build()
    rows = [document for side in SIDES for document in split[side]]
    names = {document.package for document in rows}
    assert len(names) >= 6
    assert len(rows) >= 3000
    sides = [{(document.package, document.module) for document in split[side]} for side in SIDES]
    assert sum(map(len, sides)) == len(set.union(*sides))
    alias = {"pandas": "pd", "matplotlib": "plt", "networkx": "nx", "numpy": "np"}
    for name in names - {"stdlib"}:
        leak = re.compile(rf"\b{name}\b|\b{alias.get(name, name)}\.\w", re.I)
        leaks = [document.text for document in rows if leak.search(document.text)]
        assert not leaks, leaks[:3]
    held_out = {" ".join(re.findall("[a-z]+", document.text.lower())) for document in split["test"]}
    trained = {" ".join(re.findall("[a-z]+", document.text.lower())) for document in split["train"]}
    assert not held_out & trained
    for document in split["test"][:50]:
        assert Path(document.module).suffix == ".py"
