"""The built-in pairs of docstrings and functions: on planted sources, and on the packages of this machine."""

import ast
import re
from collections import Counter

import pytest

from tlkernels.train import UserError, code_search, docstrings
from tlkernels.train.code_search import build

SIDES = ("train", "eval", "test")


def function(name, words, margin=""):
    lines = [f"def {name}(self, x):", f'    """{words}.', "", '    More of it.\n    """', "    # note"]
    lines += [f"    x += {name!r}", "    if x:", "        x = 1", "    return x"]
    return "".join(margin + line.replace("\n", "\n" + margin) + "\n" for line in lines)


def read(text, negatives=0):
    return {pair.query: pair for pair in code_search._of_file(text, "zebra", "zebra/a.py", negatives)}


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """20 packages of 4 files with 7 methods each."""
    names = [f"p{number:02d}" for number in range(20)]
    for package in names:
        (tmp_path / package / "tests").mkdir(parents=True)
        for file in range(4):
            words = [
                " ".join(f"{package}w{file}{chr(97 + i)}{c}".translate(LETTERS) for c in "abcdef") for i in range(7)
            ]
            methods = [function(f"{package}_{file}_{i}", text, "    ") for i, text in enumerate(words)]
            (tmp_path / package / f"m{file}.py").write_text("class A:\n" + "\n".join(methods))
        (tmp_path / package / "tests" / "t.py").write_text(function("f", "a function of the tests alone"))
        (tmp_path / package / "test_a.py").write_text(function("f", "another function of the tests alone"))
    monkeypatch.setattr(docstrings, "packages", lambda: ((name, tmp_path / name) for name in names))
    return tmp_path


LETTERS = str.maketrans("0123456789", "ghijklmnop")


def test_a_pair_is_the_first_paragraph_and_the_rest_of_the_function():
    text = (
        "import os\n\nclass A:\n    @wraps\n"
        + function("f", "Return the sum\n    of  all numbers", "    ")
        + "\n\ny = 1\n"
    )
    [pair] = read(text).values()
    assert pair.query == "Return the sum of all numbers."
    assert pair.key == "\n".join([
        "def f(self, x):", "    # note", "    x += 'f'", "    if x:", "        x = 1", "    return x"
    ])  # fmt: skip
    assert (pair.package, pair.place, pair.negatives) == ("zebra", "zebra/a.py:5", ())


def test_a_signature_of_several_lines_is_kept_and_the_function_ends_where_python_says():
    text = (
        'async def f(\n    x: int,\n) -> int:\n    """Do all of these things."""\n    s = [\n  1,\n]\n# comment\n'
        "    y = x\n    return y\n\n# of g\n@wraps\ndef g():\n    pass\n"
    )
    [pair] = read(text).values()
    whole = next(node for node in ast.parse(text).body if node.name == "f")
    parsed = ast.parse(pair.key).body[0]
    assert [ast.dump(node) for node in parsed.body] == [ast.dump(node) for node in whole.body[1:]]
    assert ast.dump(parsed.args) == ast.dump(whole.args)
    assert pair.key.endswith("return y")


@pytest.mark.parametrize(
    "text",
    [
        function("test_f", "a function of the tests alone"),
        function("__call__", "a method with two underscores"),
        function("f", "of three words"),
        function("f", "words " * 60),
        function("f", "a function that is too long") + "    x = 2\n" * 300,
        'def f():\n    """Only two lines of body."""\n    x = 1\n\n    return x\n',
        '@overload\ndef f():\n    """An overload without a body."""\n    ...\n',
        'def f(): """All in one line."""; x = 1\n',
        'def f():\n    """It is in the code."""\n    x = """It is\n    in the code."""\n    y\n    z\n',
        'text = """\ndef f():\n    broken(\n"""\n',
    ],
)  # fmt: skip
def test_what_gives_no_pair(text):
    good = function("good", "a function that gives a pair")
    assert list(read(text + "\n\n" + good)) == ["a function that gives a pair."]


def test_negatives_are_other_functions_of_the_file():
    outer = 'def outer():\n    """A function with another one inside."""\n    x = 1\n    y = 2\n'
    text = outer + function("inner", "The function inside of the other one", "    ")
    text += "\n\ndef plain():\n    a = 1\n    b = 2\n    return a + b\n\n\n" + function(
        "f", "The fourth function is this"
    )
    pairs = read(text, negatives=2)
    assert sorted(pairs) == ["A function with another one inside.", "The fourth function is this.",
                             "The function inside of the other one."]  # fmt: skip
    names = {query: {re.search(r"def (\w+)", key)[1] for key in pair.negatives} for query, pair in pairs.items()}
    assert names["A function with another one inside."] == {"plain", "f"}
    assert names["The function inside of the other one."] == {"plain", "f"}
    assert len(names["The fourth function is this."]) == 2 and "f" not in names["The fourth function is this."]
    assert len(pairs["The fourth function is this."].negatives) == 2
    assert list(read(text, negatives=3)) == ["The fourth function is this."]


def test_a_function_with_the_same_docstring_is_no_negative():
    text = function("f", "A function for two uses") + function("g", "A function for two uses")
    assert read(text, negatives=1) == {}


def test_whole_packages_are_held_out_and_none_dominates(planted):
    split = build(300, 0.1, 0.2)
    assert {side: len(split[side]) for side in SIDES} == {"train": 210, "eval": 30, "test": 60}
    packages = [{pair.package for pair in split[side]} for side in SIDES]
    assert sum(map(len, packages)) == len(set.union(*packages))
    assert min(map(len, packages)) >= 4
    files = Counter(pair.place.split(":")[0] for side in SIDES for pair in split[side])
    assert max(files.values()) == 5
    assert not any("tests" in pair.query for side in SIDES for pair in split[side])
    order = [pair.package for pair in split["train"]]
    assert order != sorted(order)
    assert split == build(300, 0.1, 0.2)


def test_a_test_share_of_zero_gives_no_test_pairs(planted):
    split = build(100, 0.2, 0)
    assert {side: len(split[side]) for side in SIDES} == {"train": 80, "eval": 20, "test": 0}


def test_a_function_and_a_docstring_occur_once_over_all_packages(planted):
    (planted / "p00" / "copy.py").write_text(function("first", "One text that two packages have in common"))
    (planted / "p01" / "copy.py").write_text(function("second", "One text that two packages have in common"))
    (planted / "p02" / "copy.py").write_text(function("third", "Some other words about the same thing"))
    (planted / "p03" / "copy.py").write_text(function("third", "And a fourth one that is unlike them"))
    rows = [pair for side in build(220, 0.1, 0.1).values() for pair in side]
    assert sum("two packages have in common" in pair.query for pair in rows) <= 1
    assert sum("def third" in pair.key for pair in rows) <= 1
    kept = code_search._DistinctPairs()
    every = [
        next(code_search._of_file((planted / p / "copy.py").read_text(), p, p, 0)) for p in ("p00", "p01", "p02", "p03")
    ]
    assert [kept.add(pair) for pair in every] == [True, False, True, False]


def test_too_few_functions_is_one_clear_error(planted):
    with pytest.raises(UserError, match=r"need 5000 pairs, .* 20 installed packages have 400: give --data.path"):
        build(5000, 0.1, 0.1)
    with pytest.raises(UserError, match=r"need 300 pairs, .* 3 installed packages have 60"):
        build(300, 0.1, 0.1, packages=3)
    with pytest.raises(UserError, match="a pair on each side"):
        build(2, 0.4, 0.4)


@pytest.mark.full
def test_on_this_machine():
    """The checks do not use the code that built the pairs."""
    split = build(200, 0.1, 0.1, negatives=1)
    assert [len(split[side]) for side in SIDES] == [160, 20, 20]
    packages = [{pair.package for pair in split[side]} for side in SIDES]
    assert not packages[0] & packages[1] and not packages[0] & packages[2] and not packages[1] & packages[2]
    rows = [pair for side in SIDES for pair in split[side]]
    assert len({pair.query.lower() for pair in rows}) == len({pair.key for pair in rows}) == 200
    for pair in rows:
        [node] = ast.parse(pair.key).body
        assert ast.get_docstring(node) is None or pair.query not in " ".join(ast.get_docstring(node).split())
        assert pair.query not in " ".join(pair.key.split())
        assert len(pair.query.split()) >= 4 and len(pair.query) <= 300 and len(pair.key) <= 2000
        assert pair.negatives[0] != pair.key and ast.parse(pair.negatives[0])
