"""Folders: the split of each file, images in folders of their classes' names, and what is refused as ambiguous."""

import gzip
import os

import datasets
import pytest
from PIL import Image
from test_train_files import ROWS, jsonl, lines, named, refused, write
from train_cases import quick

from tlkernels.train.config import DataConfig
from tlkernels.train.data import load_data

pytestmark = pytest.mark.usefixtures(quick.__name__)


def sides(path, **options):
    """Return the number of rows of each side."""
    data = load_data(DataConfig(path=str(path), **options), seed=0)
    return [len(side.labels) for side in (data.train, data.eval, data.test) if side is not None]


def picture(path, color=(200, 30, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), color).save(path)


@pytest.mark.parametrize(
    "names",
    [
        ("train.csv", "validation.jsonl", "test.parquet"),
        ("TRAIN.CSV", "Val.csv.gz", "Test-set.csv"),
        ("my_training.csv", "my-dev.csv", "my.eval.csv"),
        ("train-00000-of-00001.csv", "validation-00000-of-00001.csv", "test-00000-of-00001.csv"),
        ("data/train.csv", "data/valid.csv", "data/testing.csv"),
        ("train/0000.csv", "validation/part.csv", "test/rows.csv"),
        ("train.csv", ".hidden/x.csv", "validation.csv", ".test.csv", "__pycache__/a.csv", "test.csv", "README.md"),
    ],
    ids=" ".join,
)
def test_the_splits_of_a_folder(names, tmp_path):
    counts = iter((12, 5, 7))
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        hidden = name.startswith((".", "_")) or name.endswith(".md")
        rows = [("hidden", "no")] if hidden else ROWS[: next(counts)]
        text = write(tmp_path / ".written.csv", rows).read_bytes()
        if path.suffix in (".jsonl", ".parquet"):
            write(path, rows)
        elif path.suffix == ".gz":
            path.write_bytes(gzip.compress(text))
        else:
            path.write_bytes(text)
    assert sides(tmp_path, eval="validation", test="test") == [12, 5, 7]


def test_shards_are_one_split_and_say_where_a_row_stands(tmp_path):
    for number, rows in enumerate((ROWS[:5], ROWS[5:12], ROWS[12:])):
        write(tmp_path / f"train-{number:05d}-of-00003.csv", rows)
    assert named(tmp_path) == sorted(ROWS)
    lines(tmp_path / "train-00001-of-00003.csv", [*ROWS[5:11], ("", "ham")])
    refused(tmp_path, "line 8 of .*train-00001-of-00003.csv has no text")
    lines(tmp_path / "train-00001-of-00003.csv", ROWS[5:11], header=("text", "team"))
    refused(tmp_path, "the files of .* differ: columns text, label .* but text, team")


def test_files_that_name_no_split_are_training_rows(tmp_path):
    write(tmp_path / "a.csv", ROWS[:10])
    write(tmp_path / "b.csv", ROWS[10:])
    assert named(tmp_path) == sorted(ROWS)
    write(tmp_path / "test.csv", ROWS)
    refused(tmp_path, "a.csv belongs to no split, while other files belong to test")


def test_what_a_folder_leaves_open_is_refused(tmp_path):
    refused(tmp_path, "has no images and no files with the endings .csv .tsv")
    write(tmp_path / "train.csv", ROWS)
    write(tmp_path / "train.jsonl", ROWS)
    refused(tmp_path, r"has train more than once: as .csv and as .jsonl")
    (tmp_path / "train.jsonl").unlink()
    refused(tmp_path, "no split 'validation', only train", split="validation")
    picture(tmp_path / "red/1.png")
    refused(tmp_path, r"has images \(red/1.png\) and data files \(train.csv\)")
    (tmp_path / "dataset_dict.json").write_text("{}")
    refused(tmp_path, "was written by save_to_disk")


def test_the_folders_of_images_are_their_classes(tmp_path):
    for number in range(20):
        picture(tmp_path / "a" / ("red", "[blue] *")[number % 2] / f"test_{number}.PNG")
    (tmp_path / "a/red/notes.txt").write_text("no image")
    (tmp_path / "a/linked").symlink_to(tmp_path / "a/red")
    data = load_data(DataConfig(path=str(tmp_path / "a")), seed=0)
    assert data.images and data.classes == ["[blue] *", "linked", "red"]
    assert [len(side.labels) for side in (data.train, data.eval, data.test)] == [23, 3, 4]
    assert data.train.rows[0][data.train.column].size == (8, 8)
    os.rename(tmp_path / "a/red/test_0.PNG", os.fsencode(tmp_path / "a/red") + b"/\xe9.png")
    refused(tmp_path / "a", r"linked/.*udce9.png' is not UTF-8")
    picture(tmp_path / "a/loose.png")
    refused(tmp_path / "a", "loose.png is not in the subfolder of a class")


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    for number in range(20):
        picture(tmp_path / ("red", "blue")[number % 2] / f"{number}.png")
    scandir = os.scandir

    def refuses(path):
        if str(path).endswith("blue"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuses)
    refused(tmp_path, "cannot read .*blue: PermissionError")


def test_a_row_without_an_image(tmp_path):
    picture(tmp_path / "a.png")
    rows = {"image": [str(tmp_path / "a.png")] * 19 + [None], "label": ["x", "y"] * 10}
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    table.to_parquet(str(tmp_path / "rows.parquet"))
    refused(tmp_path / "rows.parquet", r"row 19 \(from 0\) of .*rows.parquet has no image in column 'image'")


def test_classes_called_as_splits(tmp_path):
    for number in range(20):
        picture(tmp_path / "a" / ("train", "test")[number % 2] / f"{number}.png")
        picture(tmp_path / "b" / ("train", "test")[number % 2] / "xy"[number // 2 % 2] / f"{number}.png")
    assert load_data(DataConfig(path=str(tmp_path / "a")), seed=0).classes == ["test", "train"]
    data = load_data(DataConfig(path=str(tmp_path / "b"), test="test"), seed=0)
    assert data.classes == ["x", "y"] and len(data.test.labels) == 10


def test_a_list_of_images(tmp_path):
    for number in range(20):
        picture(tmp_path / f"all/{number}.png", (number, 0, 0))
    records = [{"file_name": f"all/{number}.png", "label": "xy"[number % 2]} for number in range(20)]
    jsonl(tmp_path / "metadata.jsonl", records)
    data = load_data(DataConfig(path=str(tmp_path)), seed=0)
    for side in (data.train, data.eval, data.test):
        for row, label in zip(side.rows, side.labels, strict=True):
            assert row["image"].getpixel((0, 0))[0] % 2 == label
    jsonl(tmp_path / "metadata.jsonl", [*records, {"file_name": "all/x.png", "label": "x"}])
    refused(tmp_path, "no such image: 'all/x.png' in line 21 of .*metadata.jsonl")
    jsonl(tmp_path / "metadata.jsonl", [{"file": "a.png", "label": "x"}])
    refused(tmp_path, "has no column 'file_name', only file, label")
