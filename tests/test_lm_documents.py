"""Documents of language modelling: every text and chat is read unchanged, on one side, or the error says why not."""

import gzip
import json
from collections import Counter

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet
from train_cases import quick

from tlkernels.train import UserError, docstrings
from tlkernels.train.docstrings import Document
from tlkernels.train.documents import load_documents
from tlkernels.train.documents_config import CorpusConfig, check_corpus

pytestmark = pytest.mark.usefixtures(quick.__name__)

TEXTS = [f"text {i:02d}\nof two lines" for i in range(20)]
CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
CHATS = [[{"role": "system", "content": f"be {i}"}, *CHAT] for i in range(20)]


def load(path, causal=True, **options):
    return load_documents(CorpusConfig(path=None if path is None else str(path), **options), seed=0, causal=causal)


def texts(path, **options):
    """Return the texts of all sides, sorted."""
    sides = load(path, **options)
    return sorted(text for side in sides.values() for text in side.texts)


def refused(path, match, **options):
    with pytest.raises(UserError, match=match) as error:
        load(path, **options)
    assert "\n" not in str(error.value)


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def files(folder, contents):
    """Write text files; `contents` are their names and texts."""
    for name, text in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, newline="", encoding="utf-8")
    return folder


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet", "csv", "csv.gz"])
def test_texts_of_records_are_read_unchanged(ending, tmp_path):
    path = tmp_path / f"rows.{ending}"
    if ending == "jsonl":
        jsonl(path, [{"text": text, "label": ["not", "read"]} for text in TEXTS])
    elif ending == "json":
        path.write_text(json.dumps([{"text": text} for text in TEXTS]))
    elif ending == "parquet":
        parquet.write_table(pa.table({"text": TEXTS}), path)
    else:
        data = ("text,,\n" + "".join(f'"{text}",,\n' for text in TEXTS)).encode()
        path.write_bytes(gzip.compress(data) if ending.endswith("gz") else data)
    assert texts(path) == TEXTS


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_chats_are_read_unchanged(ending, tmp_path):
    path = tmp_path / f"rows.{ending}"
    longer = [[*chat, {"role": "user", "content": 'say "1"\n日本'}] for chat in CHATS]
    if ending == "jsonl":
        jsonl(path, [{"messages": chat} for chat in longer])
    else:  # a key that only some messages have is null in the others
        parquet.write_table(pa.table({"messages": [[m | {"name": None} for m in chat] for chat in longer]}), path)
    sides = load(path)
    assert all(side.texts is None for side in sides.values())
    chats = sorted(
        (chat for side in sides.values() for chat in side.chats), key=lambda chat: int(chat[0]["content"][3:])
    )
    assert chats == longer


def test_a_folder_of_texts_has_a_document_for_each_file(tmp_path):
    contents = {f"part {i % 3}/{i:02d}.{('txt', 'md', 'rst', 'py')[i % 4]}": f"{i}\r\n日本 " for i in range(20)}
    files(tmp_path, contents | {"a.png": "no text", ".hidden.txt": "hidden", "empty/__init__.py": " \n"})
    sides = load(tmp_path)
    found = {side.place(row): text for side in sides.values() for row, text in enumerate(side.texts)}
    assert found == {str(tmp_path / name): text for name, text in contents.items()}
    assert [len(sides[side]) for side in ("train", "eval", "test")] == [16, 2, 2]


def test_held_out_sides_are_whole_documents_and_depend_on_the_seed(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in TEXTS])
    first, same = load(path), load(path)
    assert [first[side].texts for side in first] == [same[side].texts for side in same]
    other = load_documents(CorpusConfig(path=str(path)), seed=1, causal=True)
    assert other["eval"].texts != first["eval"].texts
    assert first["test"].place(0) == f"line {TEXTS.index(first['test'].texts[0]) + 1} of {path}"
    shared = load(path, test_fraction=0)
    assert shared["test"] is shared["eval"] and len(shared["train"]) == 18


def test_named_sides_are_splits_or_other_paths(tmp_path):
    folder = files(tmp_path / "texts", {"train/a.txt": "a", "train/b/c.txt": "c", "valid/d.txt": "d"})
    other = files(tmp_path, {"e.txt": "e"}) / "e.txt"
    sides = load(folder, eval="validation", test=str(other))
    assert {side: documents.texts for side, documents in sides.items()} == {
        "train": ["a", "c"],
        "eval": ["d"],
        "test": ["e"],
    }
    assert [sides[side].split for side in ("eval", "test")] == ["validation", None]
    rows = tmp_path / "rows"
    rows.mkdir()
    for name, chosen in (("train", TEXTS[:15]), ("test", TEXTS[15:])):
        jsonl(rows / f"{name}.jsonl", [{"text": text} for text in chosen])
    files(rows, {"README.md": "describes the rows"})
    sides = load(rows, eval="test", test_fraction=0)
    assert sides["train"].texts == TEXTS[:15] and sides["eval"].texts == TEXTS[15:] == sides["test"].texts


def test_an_encoding_applies_to_text_files(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.txt").write_bytes("naïve".encode("cp1252"))
    assert texts(tmp_path, encoding="cp1252") == ["naïve"] * 4
    refused(tmp_path, r"cannot read .*0.txt: byte 2 \(0xef, line 1\) is not valid utf-8")
    parquet.write_table(pa.table({"text": TEXTS}), tmp_path / "rows.parquet")
    refused(tmp_path / "rows.parquet", "--data.encoding applies to text, .csv", encoding="cp1252")


def test_what_is_missing_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    jsonl(path, [{"title": "a", "body": text} for text in TEXTS])
    refused(path, "no text column 'text' and no chat column 'messages'; the columns are title, body")
    assert texts(path, text_column="body") == TEXTS
    refused(jsonl(path, [{"text": text} for text in [*TEXTS[:4], " \n", *TEXTS]]), "line 5 of .* has no text in column")
    two = jsonl(path, [{"text": "one"}, {"text": "two"}])
    refused(two, "too few documents to train, evaluate and test on: .*rows.jsonl has 2")
    refused(files(tmp_path, {"one.txt": "one"}) / "one.txt", "too few .* has 1; a text file is one document")
    refused(files(tmp_path, {"no.txt": " "}) / "no.txt", "no.txt is empty")
    refused(tmp_path / "absent.txt", "no such file or folder: .*absent.txt")
    refused("absent.txt", "no such file or folder: absent.txt")
    refused(tmp_path, r"has text files \(no.txt\) and data files \(rows.jsonl\)")
    refused(path, "has no split 'validation', only train", split="validation")
    refused(path, "--data.documents applies to the built-in data", documents=10)
    refused(path, "--data.subset applies to hub", subset="en", eval=str(path), test=str(path))
    empty = tmp_path / "nothing"
    empty.mkdir()
    refused(empty, "has no files with the endings .txt .md .rst .py .csv")


def test_a_hub_data_set_has_texts_or_chats(monkeypatch):
    hub = {
        "someone/texts": {"train": datasets.Dataset.from_dict({"text": TEXTS, "messages": CHATS})},
        "someone/chats": {"train": datasets.Dataset.from_dict({"messages": CHATS})},
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda path, subset: hub[path])
    assert texts("someone/texts") == TEXTS  # the chat column is used if there is no text column
    sides = load("someone/chats", subset="en")
    found = {sides["eval"].place(row): chat for row, chat in enumerate(sides["eval"].chats)}
    assert len(found) == 2
    for place, messages in found.items():
        assert messages == CHATS[int(place.removeprefix("row ").split(" ")[0])]
    refused("someone/none", "cannot read someone/none: KeyError: 'someone/none'")


def test_chats_and_texts_are_not_mixed(tmp_path):
    chats = jsonl(tmp_path / "chats.jsonl", [{"messages": chat} for chat in CHATS])
    rows = jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in TEXTS])
    refused(chats, "the train documents are chats, but those of eval are texts", eval=str(rows))
    (tmp_path / "rows.csv").write_text("messages\nhello\n")
    refused(tmp_path / "rows.csv", "column 'messages': chats are read from JSON and Parquet, not from .csv")


USER, ANSWER = CHAT


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        ("hello", "expected a list of messages, got 'hello'"),
        ([], r"expected a list of messages, got \[\]"),
        (None, "expected a list of messages, got None"),
        ([USER, "hello"], "message 2: expected an object with role and content, got 'hello'"),
        ([{"content": "hello"}, ANSWER], "message 1: expected a role of system, user, assistant, tool, got None"),
        ([{"role": "human", "content": "x"}, ANSWER], "message 1: expected a role .*, got 'human'"),
        ([USER, {"role": "assistant"}], "message 2: expected a string as content, got None"),
        ([USER, {"role": "assistant", "content": ["x"]}], r"message 2: expected a string as content, got \['x'\]"),
        ([USER, ANSWER | {"tools": "x"}], "message 2: expected the keys role and content, got also tools"),
        ([USER], "no message of the role assistant, so nothing to train on"),
    ],
    ids=["string", "empty", "null", "no-object", "no-role", "role", "no-content", "list", "key", "no-answer"],
)
def test_a_wrong_chat_names_its_line(messages, fault, tmp_path):
    records = [{"messages": chat} for chat in [*CHATS[:6], messages, *CHATS]]
    refused(jsonl(tmp_path / "chats.jsonl", records), f"line 7 of .*chats.jsonl, column 'messages'.*{fault}")


def test_options_out_of_range_are_named():
    check_corpus(CorpusConfig())
    for name, value in (
        ("length", 7), ("documents", 2), ("eval_fraction", 0.0), ("test_fraction", 1.0), ("encoding", "latin0"),
        ("test_fraction", 0.95), ("chat_column", "text"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"--data.*{name} must be"):
            check_corpus(CorpusConfig(**{name: value}))


# ---- the built-in documents --------------------------------------------------------------------------------------


def test_built_in_texts_are_on_the_sides_of_the_classifier(monkeypatch):
    sizes = {"test": 15, "eval": 10, "train": 75}
    split = {
        side: [Document(f"{side} {i}", "zebra", f"zebra/{side}{i}.py") for i in range(n)] for side, n in sizes.items()
    }
    monkeypatch.setattr(docstrings, "build", lambda: split)
    sides = load(None, causal=False)
    for side, rows in split.items():
        assert sides[side].texts == [row.text for row in rows]
        assert sides[side].place(3) == rows[3].module
    fewer = load(None, causal=False, documents=20)
    assert {side: len(fewer[side]) for side in sizes} == {"test": 3, "eval": 2, "train": 15}
    assert fewer["test"].texts == sides["test"].texts[:3]
    refused(
        None, "--data.documents must be at most 100, the number of docstrings, got 101", causal=False, documents=101
    )
    refused(None, "--data.encoding applies to", causal=False, encoding="utf-8")


def test_built_in_sources_are_whole_files_of_several_packages(tmp_path, monkeypatch):
    expected, packages = {}, [f"zebra{i}" for i in range(8)]
    for package in packages:
        wrong = {"tests/test.py": "no", "__init__.py": "", "big.py": "x" * 60_001}
        files(tmp_path / package, wrong)
        (tmp_path / package / "latin.py").write_bytes(b"# na\xefve")
        expected |= {f"{package}/m{i}.py": f"{package} = {i}\n" for i in range(4)}
    files(tmp_path, expected)
    monkeypatch.setattr(docstrings, "packages", lambda: ((package, tmp_path / package) for package in packages))
    sides = load(None, documents=20)
    found = {side.place(row): text for side in sides.values() for row, text in enumerate(side.texts)}
    assert len(found) == 20 and found.items() <= expected.items()
    assert [len(sides[side]) for side in ("train", "eval", "test")] == [16, 2, 2]
    counts = Counter(name.split("/")[0] for name in found)
    order = [name.split("/")[0] for name in docstrings.sources(20)]
    assert order != sorted(order)  # otherwise a held-out side would be one package
    assert sorted(counts.values()) == [2, 3, 3, 3, 3, 3, 3]  # an eighth of 20, rounded up
    again = load_documents(CorpusConfig(documents=20), seed=1, causal=True)
    assert [again[side].texts for side in again] == [sides[side].texts for side in sides]
    refused(None, "--data.documents is 40, but the installed packages have 32 usable source files", documents=40)


@pytest.mark.full
def test_the_built_in_data_of_this_machine():
    """The classifier's test side is not among the texts that adapt it; sources are files of eight packages."""
    adapted = load(None, causal=False)
    assert [len(adapted[side]) for side in ("train", "eval", "test")] == [2400, 320, 480]
    from tlkernels.train.config import DataConfig
    from tlkernels.train.data import load_data

    held_out = load_data(DataConfig(), seed=3).test
    assert set(held_out.rows["text"]) == set(adapted["test"].texts)
    assert not set(held_out.rows["module"]) & {adapted["train"].place(row) for row in range(2400)}
    sources = load(None)
    assert [len(sources[side]) for side in ("train", "eval", "test")] == [32, 4, 4]
    assert len({sources["train"].place(row).split("/")[0] for row in range(32)}) >= 8
