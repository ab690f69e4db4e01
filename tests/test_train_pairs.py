"""Pairs of queries and keys: every value is read unchanged, on one side, or the error says why not."""

import csv
import gzip
import io
import json
import random
from collections import defaultdict
from dataclasses import replace

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
from PIL import Image
from pyarrow import parquet
from train_cases import WORDS, quick

from tlkernels.train import UserError, code_search
from tlkernels.train.code_search import Pair
from tlkernels.train.pair_rows import PairRows, random_view
from tlkernels.train.pairs import Pairs, load_pairs
from tlkernels.train.pairs_config import PairsConfig, check_pairs

pytestmark = pytest.mark.usefixtures(quick.__name__)

ROWS = [{"query": f'find "{i}"', "key": f"the, key\nof {i}"} for i in range(20)]


def load(path, kind="pairs", seed=0, **options):
    config = PairsConfig(path=None if path is None else str(path), **options)
    check_pairs(config)
    return load_pairs(config, seed, kind)


def found(sides):
    """Return the values of all rows of all sides, sorted."""
    rows = []
    for pairs in sides.values():
        columns = (pairs.queries, pairs.keys, pairs.negatives)
        rows += zip(*(column or [None] * len(pairs) for column in columns), strict=True)
    return sorted(rows)


def refused(path, match, kind="pairs", **options):
    with pytest.raises(UserError, match=match) as error:
        load(path, kind, **options)
    assert "\n" not in str(error.value)


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def table(path, rows):
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    data = file.getvalue().encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet", "csv", "csv.gz"])
def test_queries_keys_and_negatives_are_read_unchanged(ending, tmp_path):
    path = tmp_path / f"rows.{ending}"
    rows = [row | {"negative": [f"no {i}", '["text"]'], "label": [1]} for i, row in enumerate(ROWS)]
    if ending == "jsonl":
        jsonl(path, rows)
    elif ending == "json":
        path.write_text(json.dumps(rows))
    elif ending == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        table(path, [row | {"negative": json.dumps(row["negative"])} for row in rows])
    expected = sorted((row["query"], row["key"], row["negative"]) for row in rows)
    assert found(load(path)) == expected


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "csv"])
def test_a_negative_may_be_one_text(ending, tmp_path):
    rows = [row | {"negative": f"[no] {i}"} for i, row in enumerate(ROWS)]
    path = tmp_path / f"rows.{ending}"
    if ending == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        {"jsonl": jsonl, "csv": table}[ending](path, rows)
    assert sorted(row[2] for row in found(load(path))) == sorted([f"[no] {i}"] for i in range(20))


def test_other_columns_can_be_named(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [{"q": "a b", "k": str(i), "query": ["not", "read"]} for i in range(9)])
    sides = load(path, query_column="q", key_column="k", eval=str(path), test=str(path))
    assert sides["train"].queries == ["a b"] * 9 and sides["train"].keys == [str(i) for i in range(9)]


def components(rows):
    """Return the sets of rows that share a value, merged until none share one."""
    groups = [({number}, {(name, value) for name, value in row.items() if value}) for number, row in enumerate(rows)]
    merged = True
    while merged:
        merged = False
        for i in range(len(groups)):
            for j in range(i):
                if groups[i][1] & groups[j][1]:
                    groups[j] = (groups[i][0] | groups[j][0], groups[i][1] | groups[j][1])
                    del groups[i]
                    merged = True
                    break
            if merged:
                break
    return sorted(sorted(members) for members, _ in groups)


def groups_of(ids):
    groups = defaultdict(list)
    for row, number in enumerate(ids):
        groups[number].append(row)
    return sorted(groups.values())


def test_rows_that_share_an_id_a_query_or_a_key_get_the_same_id(tmp_path):
    draw = np.random.default_rng(0)
    rows = [
        {"query": f"q{draw.integers(80)}", "key": f"k{draw.integers(80)}", "id": str(draw.integers(99))}
        for _ in range(60)
    ]
    for row in rows[::2]:
        row["id"] = ""  # an empty id is none
    sides = load(table(tmp_path / "rows.csv", rows), eval=str(tmp_path / "rows.csv"), test_fraction=0)
    expected = components(rows)
    assert groups_of(sides["train"].ids) == expected
    assert 1 < len(expected) < 60 and max(map(len, expected)) > 3
    no_ids = load(tmp_path / "rows.csv", eval=str(tmp_path / "rows.csv"), test_fraction=0, id_column="other")
    expected = components([{name: row[name] for name in ("query", "key")} for row in rows])
    assert groups_of(no_ids["train"].ids) == expected


def test_a_query_is_not_the_key_or_the_id_of_another_row(tmp_path):
    rows = [{"query": f"{i}", "key": f"{i + 1}", "id": i + 2} for i in range(10)]
    sides = load(jsonl(tmp_path / "rows.jsonl", rows), eval=str(tmp_path / "rows.jsonl"), test_fraction=0)
    assert len(set(sides["train"].ids)) == 10


def test_rows_with_the_same_id_go_to_the_same_side(tmp_path):
    rows = [
        row | {"id": i // 4} for i, row in enumerate(ROWS + [{"query": f"q{i}", "key": f"k{i}"} for i in range(20)])
    ]
    path = jsonl(tmp_path / "rows.jsonl", rows)
    sides = load(path, eval_fraction=0.2, test_fraction=0.2)
    assert {side: len(pairs) for side, pairs in sides.items()} == {"train": 24, "eval": 8, "test": 8}
    ids = {row["query"]: row["id"] for row in rows}
    owners = [{ids[query] for query in pairs.queries} for pairs in sides.values()]
    assert sum(map(len, owners)) == 10
    assert load(path, seed=1)["eval"].queries != load(path)["eval"].queries == load(path)["eval"].queries
    lines = {row["query"]: line for line, row in enumerate(rows, start=1)}
    for pairs in sides.values():
        assert [pairs.place(row) for row in range(8)] == [f"line {lines[q]} of {path}" for q in pairs.queries[:8]]


def test_sides_can_be_splits_of_the_path_or_other_files(tmp_path):
    for side, part in (("train", ROWS[:12]), ("validation", ROWS[12:15]), ("test", ROWS[15:])):
        jsonl(tmp_path / f"{side}.jsonl", part)
    sides = load(tmp_path, eval="validation", test=str(tmp_path / "test.jsonl"))
    assert [sides[side].queries for side in ("train", "eval", "test")] == [
        [row["query"] for row in part] for part in (ROWS[:12], ROWS[12:15], ROWS[15:])
    ]
    assert [sides[side].split for side in ("train", "eval", "test")] == ["train", "validation", None]
    refused(tmp_path, "has no split 'other', only", split="other")
    sides = load(tmp_path, test_fraction=0)
    assert sides["test"] is sides["eval"]


def test_views_and_labels_need_no_key(tmp_path):
    rows = [{"query": f"q{i}", "label": f"l{i % 3}", "key": ["no", "text"]} for i in range(20)]
    path = jsonl(tmp_path / "rows.jsonl", rows)
    views = load(path, "views")
    assert views["train"].keys is None and views["train"].labels is None
    assert sorted(row[0] for row in found(views)) == sorted(row["query"] for row in rows)
    labels = load(path, "labels")
    assert labels["train"].classes == labels["eval"].classes == ["l0", "l1", "l2"]
    names = {q: pairs.classes[n] for pairs in labels.values() for q, n in zip(pairs.queries, pairs.labels, strict=True)}
    assert names == {row["query"]: row["label"] for row in rows}


def test_a_class_may_be_new_in_the_hold_out(tmp_path):
    train = jsonl(tmp_path / "a.jsonl", [{"query": f"q{i}", "label": i % 2} for i in range(20)])
    other = jsonl(tmp_path / "b.jsonl", [{"query": f"q{i}", "label": 5 + i % 2} for i in range(4)])
    sides = load(train, "labels", eval=str(other), test_fraction=0)
    assert sides["train"].classes == ["0", "1", "5", "6"] and sides["eval"].labels == [2, 3, 2, 3]


# ---- images ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Twelve random images in the folders of two classes, listed with captions in the parent folder."""
    folder = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for number in range(12):
        image = Image.fromarray(draw.integers(0, 256, (16, 16 + number, 3), dtype=np.uint8))
        (folder / f"classes/c{number % 2}").mkdir(parents=True, exist_ok=True)
        image.save(folder / f"classes/c{number % 2}/{number:02d}.png")
    return folder


def listed_pictures(folder, pictures, rows):
    """Return a folder with a list of the pictures and further columns."""
    (folder / "listed").mkdir()
    for file in sorted(pictures.rglob("*.png")):
        (folder / "listed" / file.name).write_bytes(file.read_bytes())
    return jsonl(folder / "listed/metadata.jsonl", rows).parent


def size(dataset, row):
    return dataset[row][dataset.column_names[0]].size


def test_the_keys_are_images_if_there_is_no_key_column(pictures, tmp_path):
    rows = [{"file_name": f"{i // 2:02d}.png", "query": f"the picture {i}"} for i in range(24)]
    sides = load(listed_pictures(tmp_path, pictures, rows))
    assert all(pairs.images == (False, True) for pairs in sides.values())
    for pairs in sides.values():
        for row, text in enumerate(pairs.queries):
            assert size(pairs.keys, row) == (16 + int(text.split()[-1]) // 2, 16)
    captions = [[int(text.split()[-1]) // 2 for text in pairs.queries] for pairs in sides.values()]
    assert sum(len(set(numbers)) for numbers in captions) == 12  # both captions of an image are on one side
    for numbers, pairs in zip(captions, sides.values(), strict=True):
        assert groups_of(pairs.ids) == groups_of(numbers)


def test_equal_bytes_of_images_give_the_same_id(pictures, tmp_path):
    files = sorted(pictures.rglob("*.png"))
    images = [{"bytes": files[number % 9].read_bytes(), "path": None} for number in range(12)]
    rows = {"image": images, "query": [f"q{i}" for i in range(12)]}
    features = datasets.Features(image=datasets.Image(), query=datasets.Value("string"))
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    sides = load(tmp_path / "rows.parquet", eval=str(tmp_path / "rows.parquet"), test_fraction=0)
    assert groups_of(sides["train"].ids) == groups_of([number % 9 for number in range(12)])


def test_views_and_labels_of_an_image_folder(pictures):
    views = load(pictures / "classes", "views")
    assert views["train"].images == (True, False) and views["train"].keys is None
    labels = load(pictures / "classes", "labels")
    assert labels["train"].classes == ["c0", "c1"]
    for pairs in labels.values():
        for row, label in enumerate(pairs.labels):
            assert (size(pairs.queries, row)[0] - 16) % 2 == label
            assert f"c{label}/" in pairs.place(row)


# ---- the built-in pairs ------------------------------------------------------------------------------------------


def test_the_built_in_pairs(monkeypatch):
    asked = []

    def build(*arguments):
        asked.append(arguments)
        sides = (("train", 6), ("eval", 2), ("test", 0))
        return {s: [Pair(f"{s} q{i}", f"{s} k{i}", ("n",), "zebra", f"{s}:{i}") for i in range(n)] for s, n in sides}

    monkeypatch.setattr(code_search, "build", build)
    sides = load(None, pairs=8, negatives=1, test_fraction=0, packages=7)
    assert asked == [(8, 0.1, 0, 1, 7)]
    assert sides["train"].queries == [f"train q{i}" for i in range(6)]
    assert sides["train"].keys == [f"train k{i}" for i in range(6)]
    assert sides["train"].negatives == [["n"]] * 6 and len(set(sides["train"].ids)) == 6
    assert sides["test"] is sides["eval"] and sides["eval"].place(1) == "eval:1"
    load(None)
    assert asked[1] == (5000, 0.1, 0.1, 0, None)
    assert load(None, "views")["train"].keys is None
    refused(None, "built-in data have no labels: give --data.path", "labels")
    refused(None, "--data.negatives applies to pairs", "views", negatives=1)
    refused(None, "--data.encoding applies to", encoding="utf-8")


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "match", "kind"),
    [
        ([{"q": "a", "key": "b"}], r"train rows have no query column 'query'; the columns are q, key \(",
         "pairs"),
        ([{"query": "a", "k": "b"}], "no key column 'key' and no image column 'image'; the columns are quer", "pairs"),
        ([{"q": "a"}], "no query column 'query' and no image column 'image'; the columns are q", "views"),
        ([{"query": "a", "class": "b"}], "no label column 'label'; the columns are query, class", "labels"),
        ([*ROWS, {"query": " \n", "key": "b"}], "line 21 of .* has no text in column 'query'", "pairs"),
        ([*ROWS, {"query": "a"}], "line 21 of .* has no text in column 'key'", "pairs"),
        ([*ROWS, {"query": "a", "key": ["b"]}], "line 21 of .*'key': expected a string or a number, got", "pairs"),
        ([{"query": "a", "label": "x"}, {"query": "b", "label": None}], "line 2 of .* has no label in", "labels"),
        ([{"query": f"a{i}", "label": "x"} for i in range(9)], "all 7 training rows have the class 'x'", "labels"),
        ([{"query": "a", "key": f"b{i}"} for i in range(9)], "too few rows .* has 9, with 1 different ids", "pairs"),
        (ROWS[:2], "too few rows to train, evaluate and test on: .* has 2", "pairs"),
    ],
)  # fmt: skip
def test_bad_rows_are_refused(rows, match, kind, tmp_path):
    refused(jsonl(tmp_path / "rows.jsonl", rows), match, kind)


@pytest.mark.parametrize(
    ("negatives", "match"),
    [
        ([["a", "b"], ["c"]], "line 2 of .* 'negative': 1 hard negatives, but line 1 of .* has 2"),
        (["a", None], "line 2 of .* 'negative': no text"),
        ([[], []], "line 1 of .* 'negative': no text"),
        (["a", [" "]], "line 2 of .* 'negative': no text"),
        (["a", {"b": "c"}], "line 2 of .* 'negative': expected a text or a list of texts, got"),
        (["a", [["b"]]], "line 2 of .* 'negative': expected a text or a list of texts, got"),
    ],
)
def test_bad_negatives_are_refused(negatives, match, tmp_path):
    rows = [row | {"negative": negative} for row, negative in zip(ROWS, negatives, strict=False)]
    refused(jsonl(tmp_path / "rows.jsonl", rows), match)


def test_negatives_of_image_keys_are_refused(pictures, tmp_path):
    rows = [{"file_name": f"{i:02d}.png", "query": f"q{i}", "negative": "n"} for i in range(12)]
    refused(listed_pictures(tmp_path, pictures, rows), "'negative' are texts, but the keys are images")


def test_sides_of_different_kinds_are_refused(pictures, tmp_path):
    rows = [{"file_name": f"{i:02d}.png", "query": f"q{i}"} for i in range(12)]
    folder = listed_pictures(tmp_path, pictures, rows)
    path = jsonl(tmp_path / "rows.jsonl", ROWS)
    refused(path, "train rows are texts and texts, but those of eval are texts and images", eval=str(folder))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"packages": 3}, "--data.packages applies to the built-in data"),
        ({"pairs": 30}, "--data.pairs applies to the built-in data"),
        ({"negatives": 1}, "--data.negatives applies to the built-in data"),
        ({"subset": "a"}, "--data.subset applies to hub"),
        ({"separator": ";"}, "--data.separator applies to .csv, .tsv"),
        ({"quotes": True}, "--data.quotes applies to .csv, .tsv"),
    ],
)
def test_options_that_apply_to_nothing_are_refused(options, match, tmp_path):
    refused(jsonl(tmp_path / "rows.jsonl", ROWS), match, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"query_length": 2}, {"key_length": 2}, {"packages": 0}, {"pairs": 2}, {"negatives": -1}, {"encoding": "no"},
        {"separator": '"'}, {"eval_fraction": 0.0}, {"test_fraction": 1.0}, {"test_fraction": -0.1},
        {"key_column": "query"}, {"image_column": "id"},
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(options):
    check_pairs(PairsConfig())
    with pytest.raises(UserError, match=f"--data.{next(iter(options))} must be"):
        check_pairs(PairsConfig(**options))
    with pytest.raises(UserError, match=r"--data.eval_fraction \+ data.test_fraction must be below 1"):
        check_pairs(PairsConfig(eval_fraction=0.5, test_fraction=0.5))


# ---- inputs of the encoders --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(word for group in WORDS.values() for word in group)]
    return transformers.BertTokenizerFast(vocab={word: number for number, word in enumerate(words)})


def text_pairs(count=6, keys=True, negatives=2, labels=None):
    """Return rows of known words, with more of them in each row."""
    words = [word for group in WORDS.values() for word in group]
    queries = [" ".join(words[: i + 1]) for i in range(count)]
    key_texts = [" ".join(words[i : 2 * i + 2]) for i in range(count)] if keys else None
    hard = [[" ".join(words[i + j : 2 * i + 2 * j + 1]) for j in range(negatives)] for i in range(count)]
    ids = [number // 2 for number in range(count)]
    return Pairs(queries, key_texts, hard if negatives else None, ids, labels, [], (False, False), "row {}".format)


def expected_inputs(tokenizer, texts, length):
    return dict(tokenizer(texts, truncation=True, max_length=length, padding=True, return_tensors="pt"))


def test_texts_are_tokenised_cut_and_padded_like_a_call_of_the_tokenizer(tokenizer):
    pairs = text_pairs()
    rows = PairRows(pairs, tokenizer, tokenizer, 5, 7)
    chosen = [4, 0, 5]
    inputs = rows.inputs(torch.tensor(chosen), "cpu", seed=3)
    assert list(inputs) == ["query", "key", "negatives", "ids", "labels"]
    flat = [text for row in chosen for text in pairs.negatives[row]]
    for name, texts, length in (
        ("query", [pairs.queries[row] for row in chosen], 5),
        ("key", [pairs.keys[row] for row in chosen], 7),
        ("negatives", flat, 7),
    ):
        expected = expected_inputs(tokenizer, texts, length)
        for part in ("input_ids", "attention_mask"):
            assert torch.equal(inputs[name][part], expected[part])
    assert inputs["ids"].dtype == torch.int64 and inputs["ids"].tolist() == [2, 0, 2]
    assert inputs["labels"] is None and len(rows) == 6 and rows.negatives == 2
    for row in range(6):
        texts = [(pairs.queries[row], 5), (pairs.keys[row], 7), *((text, 7) for text in pairs.negatives[row])]
        assert rows.lengths[row] == sum(min(len(text.split()) + 2, length) for text, length in texts)


def test_the_views_of_a_text_are_the_same_tokens_and_labels_have_no_key(tokenizer):
    inputs = PairRows(text_pairs(keys=False, negatives=0), tokenizer, tokenizer, 9, 9).inputs(torch.arange(3), "cpu", 1)
    assert torch.equal(inputs["query"]["input_ids"], inputs["key"]["input_ids"]) and inputs["negatives"] is None
    labelled = text_pairs(keys=False, negatives=0, labels=[3, 1, 0, 1, 2, 2])
    inputs = PairRows(labelled, tokenizer, tokenizer, 9, 9).inputs(torch.tensor([5, 1]), "cpu", 1)
    assert inputs["key"] is None and inputs["labels"].tolist() == [2, 1]


def test_the_fingerprint_follows_from_every_value(tokenizer):
    def fingerprint(**changes):
        return PairRows(replace(text_pairs(), **changes), tokenizer, tokenizer, 9, 9).fingerprint()

    swap = [0, 1, 2, 3, 5, 4]
    pairs = text_pairs()
    different = {
        fingerprint(),
        fingerprint(queries=[pairs.queries[i] for i in swap]),
        fingerprint(keys=[pairs.keys[i] for i in swap]),
        fingerprint(negatives=[pairs.negatives[i] for i in swap]),
        fingerprint(ids=[0, 1, 2, 3, 4, 5]),
        fingerprint(labels=[0, 1, 0, 1, 0, 1]),
        fingerprint(labels=[0, 1, 0, 1, 1, 0]),
    }
    assert len(different) == 7 and fingerprint() == fingerprint()


class Processor:
    """Scales images to 8 x 8 pixels of 0 ... 1."""

    def __call__(self, images, return_tensors):
        assert return_tensors == "pt"
        arrays = [np.asarray(image.resize((8, 8))).astype(np.float32) / 255 for image in images]
        return {"pixel_values": torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)}


def test_the_views_of_an_image_depend_on_the_seed_and_the_row_alone(pictures):
    rows = PairRows(load(pictures / "classes", "views")["train"], Processor(), None, 9, 9)
    whole = rows.inputs(torch.arange(8), "cpu", seed=5)
    query, key = (whole[name]["pixel_values"] for name in ("query", "key"))
    one = rows.inputs(torch.tensor([6, 2]), "cpu", seed=5)
    assert torch.equal(one["query"]["pixel_values"], query[[6, 2]])
    assert torch.equal(one["key"]["pixel_values"], key[[6, 2]])
    other = rows.inputs(torch.arange(8), "cpu", seed=6)
    plain = rows.inputs(torch.arange(8), "cpu")
    assert torch.equal(plain["query"]["pixel_values"], plain["key"]["pixel_values"])
    views = (query, key, other["query"]["pixel_values"], other["key"]["pixel_values"], plain["query"]["pixel_values"])
    for first in range(5):
        for second in range(first):
            assert all(not torch.equal(views[first][row], views[second][row]) for row in range(8))
    assert rows.lengths.tolist() == [0] * len(rows)


def test_two_rows_of_one_image_get_different_views(pictures, tmp_path):
    listing = [{"file_name": "03.png"} for _ in range(20)]
    pairs = load(listed_pictures(tmp_path, pictures, listing), "views", eval=str(tmp_path / "listed"), test_fraction=0)
    rows = PairRows(pairs["train"], Processor(), None, 9, 9)
    pixels = rows.inputs(torch.arange(20), "cpu", seed=1)["query"]["pixel_values"]
    assert len(pixels.flatten(1).unique(dim=0)) == 20


def test_only_views_are_augmented_unless_it_is_asked_for(pictures, tmp_path, tokenizer):
    labelled = load(pictures / "classes", "labels")["train"]
    listing = [{"file_name": f"{i:02d}.png", "query": f"water {i}"} for i in range(12)]
    pairs = load(listed_pictures(tmp_path, pictures, listing))["train"]
    for rows, name in ((labelled, "query"), (pairs, "key")):
        processors = (Processor(), None) if name == "query" else (tokenizer, Processor())
        plain, augmented = (PairRows(rows, *processors, 9, 9, augment) for augment in (None, True))
        pixels = [r.inputs(torch.arange(4), "cpu", seed)[name]["pixel_values"]
                  for r, seed in ((plain, None), (plain, 1), (augmented, None), (augmented, 1))]  # fmt: skip
        assert torch.equal(pixels[0], pixels[1]) and torch.equal(pixels[0], pixels[2])
        assert not torch.equal(pixels[0], pixels[3])


def test_a_view_is_half_of_the_image_or_more_at_its_size_and_may_be_mirrored():
    """The red of a pixel says its column, the green its row."""
    across, down = np.meshgrid(np.arange(200), np.arange(100))
    image = Image.fromarray(np.stack([across, down, 0 * down], -1).astype(np.uint8))
    areas, mirrored = [], 0
    for seed in range(300):
        view = np.asarray(random_view(image, random.Random(seed))).astype(int)
        assert view.shape == (100, 200, 3)
        width = view[50, -1, 0] - view[50, 0, 0]
        height = view[-1, 100, 1] - view[0, 100, 1]
        mirrored += width < 0
        areas.append((abs(width) + 1) * (height + 1) / 20000)
        assert 0.74 < (abs(width) / 200) / (height / 100) < 1.36
    assert 0.48 < min(areas) < 0.53 and 0.95 < max(areas) <= 1.01
    assert 110 < mirrored < 190


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "a").mkdir()
    for number in range(6):
        (tmp_path / f"a/{number}.png").write_bytes(b"no image")
    rows = PairRows(load(tmp_path, "views")["train"], Processor(), None, 9, 9)
    for seed in (None, 1):
        with pytest.raises(UserError, match=r"a/\d\.png cannot be read"):
            rows.inputs(torch.arange(1), "cpu", seed)
