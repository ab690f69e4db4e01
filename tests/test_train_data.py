"""Reading rows: formats, labels, splits, and the errors of bad files."""

import json

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from train_cases import made_rows, quick, tiny_model, write_csv

from tlkernels.train import UserError
from tlkernels.train.config import DataConfig
from tlkernels.train.data import IGNORE, load_data
from tlkernels.train.model import load_preprocessor
from tlkernels.train.rows import TextRows

pytestmark = pytest.mark.usefixtures(quick.__name__)

ROWS = made_rows(30)
ROWS0 = [{"text": "x", "label": number % 3} for number in range(20)]


def write_tsv(path, rows):
    path.write_text("text\tlabel\n" + "".join(f"{row['text']}\t{row['label']}\n" for row in rows))


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(path, rows):
    datasets.Dataset.from_list(rows).to_parquet(str(path))


WRITERS = {"csv": write_csv, "tsv": write_tsv, "jsonl": write_jsonl, "parquet": write_parquet}


def rows_of(table):
    return list(zip(table.rows["text"], table.labels, strict=True))


@pytest.mark.parametrize("kind", WRITERS)
def test_formats_give_the_same_rows(kind, tmp_path):
    WRITERS[kind](tmp_path / f"rows.{kind}", ROWS)
    data = load_data(DataConfig(path=str(tmp_path / f"rows.{kind}")), seed=0)
    assert data.classes == ["chess", "oven", "river"]
    rows = rows_of(data.train) + rows_of(data.eval) + rows_of(data.test)
    assert sorted(rows) == sorted((row["text"], data.classes.index(row["label"])) for row in ROWS)
    assert [len(side.labels) for side in (data.train, data.eval, data.test)] == [23, 3, 4]


def test_the_split_follows_from_the_seed(tmp_path):
    path = write_csv(tmp_path / "rows.csv", ROWS)
    first, same, other = (load_data(DataConfig(path=path), seed=seed) for seed in (1, 1, 2))
    assert rows_of(first.test) == rows_of(same.test)
    assert rows_of(first.test) != rows_of(other.test)


def test_given_files_and_splits(tmp_path):
    for name, part in (("train", ROWS[:15]), ("validation", ROWS[15:21]), ("test", ROWS[21:])):
        write_csv(tmp_path / f"{name}.csv", part)
    files = DataConfig(path=str(tmp_path / "train.csv"), eval=str(tmp_path / "validation.csv"), test_fraction=0.0)
    data = load_data(files, seed=0)
    assert [row["text"] for row in ROWS[15:21]] == data.eval.rows["text"]
    assert len(data.train.labels) == 15
    assert data.test is None
    splits = load_data(DataConfig(path=str(tmp_path), eval="validation", test="test"), seed=0)
    assert [row["text"] for row in ROWS[21:]] == splits.test.rows["text"]
    assert rows_of(splits.eval) == rows_of(data.eval)


def test_integer_labels_and_missing_ones(tmp_path):
    rows = [{"t": f"text {i}", "y": ["0", "2", "", "-100"][i % 4]} for i in range(40)]
    config = DataConfig(path=write_csv(tmp_path / "rows.csv", rows), text_column="t", label_column="y")
    for num_labels, classes in ((None, ["0", "2"]), (7, list("0123456"))):
        config.num_labels = num_labels
        data = load_data(config, seed=0)
        assert data.classes == classes
        expected = [classes.index("0"), classes.index("2"), IGNORE, IGNORE]
        for table in (data.train, data.eval, data.test):
            for text, label in zip(table.rows["t"], table.labels, strict=True):
                assert label == expected[int(text.split()[1]) % 4]


@pytest.mark.parametrize(
    "names",
    [
        [str(number) for number in range(1, 11)],
        ["-1", "0", "1"],
        ["1.0", "2.0", "10.0"],
        ["01", "1", "2"],
        ["10", "9", "nine"],
    ],
    ids=" ".join,
)
def test_the_classes_are_the_labels_that_occur(names, tmp_path):
    """Ratings from 1 to 5 are five classes; numbers are sorted as numbers."""
    rows = [{"text": f"text {i}", "label": name} for i, name in enumerate(reversed(names * 8))]
    config = DataConfig(path=write_csv(tmp_path / "rows.csv", rows))
    assert load_data(config, seed=0).classes == names
    config.eval = str(tmp_path / "eval.jsonl")
    write_jsonl(tmp_path / "eval.jsonl", [{"text": "x", "label": names[-1]}, {"text": "x", "label": names[0]}])
    assert load_data(config, seed=0).eval.labels == [len(names) - 1, 0]  # by its name, not by its number


@pytest.mark.parametrize("num_labels", [None, 3])
def test_one_class_alone_is_refused(num_labels, tmp_path):
    rows = [{"text": "x", "label": name} for name in [2] * 19 + [""]]
    config = DataConfig(path=write_csv(tmp_path / "rows.csv", rows), num_labels=num_labels)
    with pytest.raises(UserError, match=r"all 1\d labelled training rows have the class '2'; expected two or more"):
        load_data(config, seed=0)


def test_declared_classes_keep_their_order(tmp_path):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["z", "a", "m"])}
    )
    rows = datasets.Dataset.from_dict({"text": ["x"] * 20, "label": [0, 1, -1, None] * 5}, features=features)
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    config = DataConfig(path=str(tmp_path / "rows.parquet"))
    data = load_data(config, seed=0)
    assert data.classes == ["z", "a", "m"]
    assert set(data.train.labels) == {0, 1, IGNORE}
    config.eval = write_csv(tmp_path / "eval.csv", [{"text": "x", "label": "m"}])
    assert load_data(config, seed=0).eval.labels == [2]
    config.num_labels = 4
    with pytest.raises(UserError, match=r"num_labels is 4, but column 'label' declares 3 classes \(z, a, m\)"):
        load_data(config, seed=0)
    rows = rows.with_format("arrow")[:].set_column(1, "label", [[7] * 20])
    pq.write_table(rows.replace_schema_metadata(features.arrow_schema.metadata), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"label 7 in row 0 \(from 0\) of .* is not one of the 3 declared classes"):
        load_data(DataConfig(path=str(tmp_path / "rows.parquet")), seed=0)


def test_texts_are_cut_and_padded_to_their_batch(tmp_path):
    tokenizer = load_preprocessor(tiny_model(tmp_path / "model"), images=False)
    data = load_data(DataConfig(path=write_csv(tmp_path / "rows.csv", ROWS)), seed=0)
    rows = TextRows(data.train, tokenizer, 9, 3)
    assert int(rows.lengths.max()) == 9
    short, long = int(rows.lengths.argmin()), int(rows.lengths.argmax())
    inputs = rows.inputs(torch.tensor([short, long]), "cpu")
    assert inputs["input_ids"].shape == (2, 9)
    assert inputs["attention_mask"].sum(1).tolist() == [int(rows.lengths[short]), 9]
    other = TextRows(data.train, tokenizer, 8, 3)
    assert rows.fingerprint() != other.fingerprint()
    assert rows.fingerprint() == TextRows(data.train, tokenizer, 9, 3).fingerprint()


def binary(path):
    path.write_bytes(bytes(range(256)) * 20)


def header_only(path):
    path.write_text("text,label\n")


def csv_of(rows):
    return lambda path: write_csv(path, rows)


@pytest.mark.parametrize(
    ("name", "write", "options", "message"),
    [
        ("rows.csv", lambda path: None, {}, "no such file"),
        ("rows.csv", lambda path: path.write_text(""), {}, "rows.csv is empty"),
        ("rows.csv", lambda path: path.write_text("\n\n"), {}, "cannot read .*rows.csv"),
        ("rows.csv", header_only, {}, "rows"),
        ("rows.csv", binary, {}, "cannot read .*rows.csv"),
        ("rows.parquet", binary, {}, "cannot read .*rows.parquet"),
        ("rows.jsonl", binary, {}, "cannot read .*rows.jsonl"),
        ("rows.xlsx", binary, {}, "unknown file type; supported: .csv .tsv .jsonl .json .parquet"),
        ("rows.csv", csv_of(ROWS), {"text_column": "body"}, "no text column 'body'; the columns are text, label"),
        ("rows.csv", csv_of(ROWS), {"label_column": "y"}, "no label column 'y'; the columns are text, label"),
        ("rows.csv", csv_of(ROWS), {"split": "validation"}, "no split 'validation', only train"),
        ("rows.csv", csv_of(ROWS), {"eval": "gone.csv"}, "no such file or folder: gone.csv"),
        ("rows.csv", csv_of(ROWS[:2]), {}, "too few"),
        (
            "rows.csv",
            csv_of([*ROWS0[:5], {"text": "x", "label": -1}, *ROWS0]),
            {"num_labels": 3},
            "label '-1' in line 7 of .*rows.csv is not one of the 3 classes",
        ),
        ("rows.csv", csv_of([{"text": "x", "label": 3}] * 20), {"num_labels": 3}, "label '3' in line 2"),
        ("rows.csv", csv_of(ROWS), {"num_labels": 3}, r"label 'river' in line 2 .* 3 classes \(0, 1, 2\)"),
        ("rows.csv", csv_of([{"text": "x", "label": ""}] * 20), {}, "no training row has a label"),
    ],
)
def test_bad_files(name, write, options, message, tmp_path):
    write(tmp_path / name)
    with pytest.raises(UserError, match=message):
        load_data(DataConfig(path=str(tmp_path / name), **options), seed=0)


def test_a_label_that_training_does_not_know(tmp_path):
    path = write_csv(tmp_path / "rows.csv", ROWS)
    other = write_csv(tmp_path / "eval.csv", [*ROWS[:4], {"text": "x", "label": "piano"}])
    with pytest.raises(UserError, match=r"label 'piano' in line 6 of .*eval.csv is not one of the 3 classes"):
        load_data(DataConfig(path=path, eval=other), seed=0)


def test_a_row_without_a_text(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [*ROWS, {"text": None, "label": "oven"}])
    with pytest.raises(UserError, match=r"line 31 of .*rows.jsonl has no text in column 'text'"):
        load_data(DataConfig(path=str(tmp_path / "rows.jsonl")), seed=0)


def test_a_class_with_a_single_row_may_fall_to_any_side(tmp_path):
    path = write_csv(tmp_path / "rows.csv", [*ROWS, {"text": "a key", "label": "piano"}])
    sides = set()
    for seed in range(12):
        data = load_data(DataConfig(path=path, eval_fraction=0.3, test_fraction=0.3), seed=seed)
        assert data.classes == ["chess", "oven", "piano", "river"]
        sides |= {side for side in ("train", "eval", "test") if 2 in getattr(data, side).labels}
    assert sides == {"train", "eval", "test"}


def test_a_side_without_any_label(tmp_path):
    path = write_csv(tmp_path / "rows.csv", ROWS)
    write_jsonl(tmp_path / "eval.jsonl", [{"text": "x", "label": ""}] * 4)
    with pytest.raises(UserError, match="none of the 4 eval rows has a label in column 'label'"):
        load_data(DataConfig(path=path, eval=str(tmp_path / "eval.jsonl")), seed=0)


def test_empty_strings_are_no_labels(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"text": row["text"], "label": ""} for row in ROWS[:9]] + ROWS[9:])
    data = load_data(DataConfig(path=str(tmp_path / "rows.jsonl")), seed=0)
    assert data.classes == ["chess", "oven", "river"]
    labels = data.train.labels + data.eval.labels + data.test.labels
    assert labels.count(IGNORE) == 9


def test_a_hub_name_without_a_network(impatient):
    with pytest.raises(UserError, match="cannot read nobody/nothing-of-this-name"):
        load_data(DataConfig(path="nobody/nothing-of-this-name"), seed=0)
