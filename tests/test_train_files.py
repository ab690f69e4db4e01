"""Every row of a file is read, its strings unchanged, or the error says in one line why not."""

import csv
import gzip
import json
import os

import pyarrow as pa
import pytest
from pyarrow import parquet
from train_cases import quick

from tlkernels.train import UserError
from tlkernels.train.config import DataConfig
from tlkernels.train.data import IGNORE, load_data

pytestmark = pytest.mark.usefixtures(quick.__name__)

ROWS = [(f"text number {i}", ("spam", "ham")[i % 2]) for i in range(20)]


def named(path, **options):
    """Return every row's text and the name of its class or None, sorted by text."""
    data = load_data(DataConfig(path=str(path), **options), seed=0)
    sides = [side for side in (data.train, data.eval, data.test) if side is not None]
    rows = [(t, i) for side in sides for t, i in zip(side.rows[side.column], side.labels, strict=True)]
    return sorted((t, None if i == IGNORE else data.classes[i]) for t, i in rows)


def refused(path, match, **options):
    with pytest.raises(UserError, match=match) as error:
        load_data(DataConfig(path=str(path), **options), seed=0)
    assert "\n" not in str(error.value)


def lines(path, rows=ROWS, separator=",", header=("text", "label"), **options):
    text = "".join(separator.join(row) + "\n" for row in (header, *rows))
    path.write_text(text, newline="", **{"encoding": "utf-8"} | options)
    return path


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write(path, rows):
    """Write rows in the format of the path's ending, quoted if it has quotes."""
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *rows])
    elif path.suffix == ".tsv":
        lines(path, rows, "\t")
    elif path.suffix == ".parquet":
        parquet.write_table(pa.table({"text": [t for t, _ in rows], "label": [y for _, y in rows]}), path)
    else:
        jsonl(path, [{"text": t, "label": y} for t, y in rows])
    return path


WORDS = [
    "NA", "N/A", "nan", "null", "None", "true", "FALSE", "01", "1.0", "1e5", " x ", '"', "#", "\\N", "日本",
    "2020-01-01",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_texts_and_labels_are_the_strings_that_stand_there(kind, tmp_path):
    rows = sorted((f"{word}{'' if i < 1 else i}", word) for word in WORDS for i in range(3))
    assert named(write(tmp_path / f"rows.{kind}", rows)) == rows


def test_the_first_rows_do_not_say_what_the_others_are(tmp_path):
    rows = sorted((f"text {i:05d}", "other" if i == 11_000 else str(100 + i % 3)) for i in range(12_000))
    assert named(write(tmp_path / "rows.csv", rows)) == rows
    late = [(t, None if i < 9_000 else y) for i, (t, y) in enumerate(rows)]
    assert named(jsonl(tmp_path / "rows.jsonl", [{"text": t} | ({"label": y} if y else {}) for t, y in late])) == late


def test_what_is_empty_is_missing(tmp_path):
    rows = [(f"text {i:02d}", ("a", "b", "")[i % 3]) for i in range(30)]
    expected = [(t, y or None) for t, y in rows]
    assert named(write(tmp_path / "rows.csv", rows)) == expected
    quoted = [(t, f'"{y}"') for t, y in rows]
    assert named(lines(tmp_path / "quoted.csv", quoted)) == expected
    for missing in ({"label": None}, {"label": ""}, {"label": float("nan")}, {"label": -100}, {}):
        records = [{"text": t} | ({"label": y} if y else missing) for t, y in rows]
        assert named(jsonl(tmp_path / "rows.jsonl", records)) == expected, missing
    for text in ("", None):
        records = [{"text": t, "label": y} for t, y in [*ROWS, (text, "ham")]]
        refused(jsonl(tmp_path / "empty.jsonl", records), "line 21 of .*empty.jsonl has no text in column 'text'")
    refused(lines(tmp_path / "empty.csv", [*ROWS[:3], ("", "ham"), *ROWS]), "line 5 of .*empty.csv has no text")


def test_a_json_value_is_its_writing(tmp_path):
    labels = ["1", '"1"', "1.0", "true", '"true"', "1e2", "-7", "12345678901234567890123", '"x"']
    texts = [(f"text {i:02d}", label) for i, label in enumerate(labels * 3)]
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"text": "{t}", "label": {y}}}\n' for t, y in texts))
    assert named(tmp_path / "rows.jsonl") == [(t, y.strip('"')) for t, y in texts]


@pytest.mark.parametrize(
    ("values", "kind", "names"),
    [
        ([1, None, 10, 2], pa.int64(), ["1", "2", "10"]),
        ([1.0, None, 10.0, 2.0], pa.float64(), ["1", "2", "10"]),
        ([0.1, 2.5, float("nan"), 0.1], pa.float32(), ["0.1", "2.5"]),
        ([True, False, None, True], pa.bool_(), ["false", "true"]),
        (["b", "a", None, ""], pa.large_string(), ["a", "b"]),
        (["b", "a", None, ""], pa.string_view(), ["a", "b"]),
        (["b", "a", None, ""], pa.dictionary(pa.int8(), pa.string()), ["a", "b"]),
        ([b"b", b"a", None, b""], pa.binary(), ["a", "b"]),
    ],
    ids=lambda value: str(value) if isinstance(value, pa.DataType) else "",
)
def test_types_of_parquet(values, kind, names, tmp_path):
    table = pa.table({"text": [f"text {i}" for i in range(40)], "label": pa.array(values * 10, kind)})
    parquet.write_table(table, tmp_path / "rows.parquet")
    assert load_data(DataConfig(path=str(tmp_path / "rows.parquet")), seed=0).classes == names


def test_a_list_is_no_label(tmp_path):
    table = pa.table({"text": ["x"] * 20, "label": [["a"]] * 20})
    parquet.write_table(table, tmp_path / "rows.parquet")
    refused(tmp_path / "rows.parquet", "column 'label': expected strings or numbers, got list<")
    refused(
        jsonl(tmp_path / "rows.jsonl", [{"text": "x", "label": "a"}, {"text": "x", "label": ["a"]}]),
        "line 2 of .*rows.jsonl, column 'label': expected a string or a number, got a list",
    )
    refused(
        jsonl(tmp_path / "rows.jsonl", [{"text": {"en": "x"}, "label": "a"}]),
        "line 1 of .*, column 'text': .* got an object",
    )


# ---- quotation marks and widths ----------------------------------------------------------------------------------


def test_quotation_marks_of_csv(tmp_path):
    rows = [('a "quoted" word', "x"), ("two\nlines, and\r\nthree", "y,z"), ('"', "x"), (" kept ", "y,z")] * 5
    rows = sorted((f"{i:02d} {t}", y) for i, (t, y) in enumerate(rows))
    assert named(write(tmp_path / "rows.csv", rows)) == rows
    stray = lines(tmp_path / "stray.csv", [*ROWS, ('5" disk', "ham"), ('say "so"', "spam")])
    assert {t for t, _ in named(stray)} >= {'5" disk', 'say "so"'}
    refused(
        lines(tmp_path / "r.csv", [('"a\nb"', "x"), ('"so" he said', "x")]), "row on line 4, ',' expected after '\"'"
    )
    refused(
        lines(tmp_path / "r.csv", [*ROWS, ('"never', "x"), *ROWS]), "row on line 22, a quotation mark is never closed"
    )


def test_quotation_marks_of_tsv_are_text(tmp_path):
    rows = list(ROWS)
    rows[2], rows[8], rows[9] = ('"Well said he', "ham"), ('and then she left"', "spam"), ('"whole ""field"""', "ham")
    path = lines(tmp_path / "rows.tsv", rows, "\t")
    assert named(path) == sorted(rows)
    assert len(named(path, quotes=True)) == 14  # as asked for: the text between two quotation marks is one field
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([("text", "label"), *ROWS, ("a\ttab", "ham"), ('"', "ham")])
    refused(path, r"line 22 of .*rows.tsv has 3 fields, the header has 2; .*--data.quotes true")
    assert named(path, quotes=True) == sorted([*ROWS, ("a\ttab", "ham"), ('"', "ham")])
    assert ('"Well', "said") in named(lines(tmp_path / "q.csv", [*ROWS, ('"Well', "said")]), quotes=False)


@pytest.mark.parametrize(("row", "fields"), [("only one", 1), ("one,two,three", 3), ("one,two,", 3), (" ", 1)])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_rows_that_are_not_as_wide_as_the_header(row, fields, end, tmp_path):
    rows = ["text,label", '"two', 'lines",ham', "", *(",".join(row) for row in ROWS), row, "x,ham"]
    (tmp_path / "rows.csv").write_text(end.join(rows) + end, newline="")
    refused(tmp_path / "rows.csv", f"line 25 of .*rows.csv has {fields} fields, the header has 2")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_and_blank_lines(end, tmp_path):
    rows = ["text,label", *(",".join(row) for row in ROWS[:9]), "", *(",".join(row) for row in ROWS[9:])]
    (tmp_path / "rows.csv").write_text(end.join(rows) + 3 * end, newline="")
    assert named(tmp_path / "rows.csv") == sorted(ROWS)
    (tmp_path / "no_end.csv").write_text(end.join(rows), newline="")
    assert named(tmp_path / "no_end.csv") == sorted(ROWS)


def test_characters_that_are_no_line_ends(tmp_path):
    rows = sorted((f"{i:02d} a\u2028b\x85c\x0bd\x0ce\x00f\ufefff", "xy"[i % 2]) for i in range(20))
    for kind in ("csv", "tsv", "jsonl"):
        assert named(write(tmp_path / f"rows.{kind}", rows)) == rows, kind
    allowed = [{"text": t.translate(dict.fromkeys(b"\0\x0b\x0c")), "label": y} for t, y in rows]
    raw = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in allowed)
    (tmp_path / "raw.jsonl").write_text(raw)
    assert len(named(tmp_path / "raw.jsonl")) == 20


def test_headers(tmp_path):
    path = tmp_path / "rows.csv"
    refused(lines(path, header=("text", "text")), "column 'text' occurs 2 times in the header of .*rows.csv")
    extra = [(t, y, "", "") for t, y in ROWS]
    assert named(lines(path, extra, header=("text", "label", "", ""))) == sorted(ROWS)  # unread columns may repeat
    refused(lines(path, separator=";"), r"the columns are text;label \(--data.label_column, --data.separator\)")
    refused(lines(path, header=("", "")), "no label column 'label'; the columns are '', ''")
    refused(lines(path, encoding="utf-16-le"), "NUL characters: is it UTF-16")
    refused(jsonl(path.with_suffix(".jsonl"), [{"a": 1}, {"b": 2}]), "no label column 'label'; the columns are a, b")


# ---- names, encodings, options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["run[12].csv", "a*.csv", "what?.csv", "{a,b}.csv", "two words.csv", "größe.csv", "a%20b.csv", "x=1/#1.csv"]
)
def test_characters_of_paths(name, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    for other in ("run1.csv", "ab.csv", "whatx.csv", "a.csv", "a b.csv"):
        lines(tmp_path / other, [(f"other {i}", "xy"[i % 2]) for i in range(20)])
    assert named(lines(path)) == sorted(ROWS)
    folder = tmp_path / f"{path.stem} data"
    folder.mkdir()
    lines(folder / "train.csv")
    lines(folder / "test[1].csv", ROWS[:4])
    assert named(folder, test="test") == sorted(ROWS + ROWS[:4])
    table = pa.table({"text": [t for t, _ in ROWS], "label": [y for _, y in ROWS]})
    parquet.write_table(table, path.with_suffix(".parquet"))
    assert named(path.with_suffix(".parquet")) == sorted(ROWS)


def test_home_and_links(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    lines(tmp_path / "blob")
    (tmp_path / "rows.csv").symlink_to("blob")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/train.csv").symlink_to(tmp_path / "blob")
    (tmp_path / "linked/again").symlink_to(tmp_path / "linked")
    for path in ("~/rows.csv", tmp_path / "linked", "~/linked/train.csv"):
        assert named(path) == sorted(ROWS)
    refused("~nobody-of-this-name/rows.csv", "no such file or folder")


def test_a_file_that_was_replaced_is_read_anew(tmp_path):
    path = lines(tmp_path / "rows.csv")
    before = path.stat()
    assert named(path) == sorted(ROWS)
    other = [(t.replace("text", "next"), y) for t, y in ROWS]
    lines(path, other)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert named(path) == sorted(other)


def test_endings(tmp_path):
    csv_text, jsonl_text = (write(tmp_path / name, ROWS).read_bytes() for name in ("rows.csv", "rows.jsonl"))
    names = "a.CSV a.Csv.gz A.CSV.GZ a.ndjson a.JSONL a.jsonl.gz a.json a.json.gz a.NDJSON.gz"
    for name in names.split():
        text = csv_text if "csv" in name.lower() else jsonl_text
        (tmp_path / name).write_bytes(gzip.compress(text) if name.lower().endswith("gz") else text)
        assert named(tmp_path / name) == sorted(ROWS), name
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(csv_text)[:-20])
    refused(tmp_path / "a.csv.gz", "cannot read .*a.csv.gz: ")
    (tmp_path / "a.csv.gz").write_bytes(csv_text)
    refused(tmp_path / "a.csv.gz", "cannot read .*a.csv.gz: BadGzipFile")
    refused(tmp_path / "gone.CSV.gz", "no such file or folder")


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json"])
def test_encodings(kind, tmp_path):
    rows = sorted((f"{t} – “é€”", y) for t, y in ROWS)
    text = write(tmp_path / f"rows.{kind}", rows).read_text(encoding="utf-8")
    if kind.startswith("json"):
        text = "".join(json.dumps(json.loads(line), ensure_ascii=False) + "\n" for line in text.splitlines())
    path = tmp_path / f"other.{kind}"
    for written, given in (
        ("utf-8-sig", None), ("utf-8-sig", "utf-8"), ("utf-16", None), ("utf-16", "utf-16"), ("utf-16-le", "UTF-16LE"),
        ("utf-16-be", "utf-16-be"), ("cp1252", "cp1252"),
    ):  # fmt: skip
        path.write_bytes(text.encode(written))
        assert named(path, encoding=given) == rows, (written, given)
    packed = path.with_name(path.name + ".gz")
    packed.write_bytes(gzip.compress(b"\xff\xfe" + text.encode("utf-16-le")))
    assert named(packed) == rows
    refused(path, r"cannot read .*byte \d+ \(0x96, line \d+\) is not valid utf-8 \(--data.encoding")


def test_the_byte_that_is_none_of_the_encoding(tmp_path):
    path = lines(tmp_path / "rows.csv", ROWS * 9_000)  # far beyond the first block that is decoded
    data = path.read_bytes()
    at = data.index(b"text number 7,", 400_000)
    path.write_bytes(data[:at] + b"caf\xe9," + data[at:])
    refused(path, rf"byte {at + 3} \(0xe9, line {data.count(chr(10).encode(), 0, at) + 1}\) is not valid utf-8")
    path.write_bytes(data + "é".encode()[:1])
    refused(path, "ends in the middle of a character of utf-8")
    refused(path, "cannot read .*rows.csv as utf-16: UTF-16 stream", encoding="utf-16")


def test_separators(tmp_path):
    rows = sorted((f"a, b\tc {i}", "xy"[i % 2]) for i in range(20))
    for separator, name in ((";", "a.csv"), ("|", "a.CSV"), ("|", "a.tsv"), ("\x1f", "b.csv")):
        assert named(lines(tmp_path / name, rows, separator), separator=separator) == rows
    lines(tmp_path / "tab.csv", ROWS, "\t")
    assert named(tmp_path / "tab.csv", separator=r"\t") == named(tmp_path / "tab.csv", separator="\t") == sorted(ROWS)


def test_options_that_nothing_takes(tmp_path):
    path = write(tmp_path / "rows.parquet", ROWS)
    for name, value in (("encoding", "cp1252"), ("separator", ";"), ("quotes", True), ("subset", "a")):
        refused(path, f"--data.{name} applies to .*the data are of another kind", **{name: value})
    refused(write(tmp_path / "rows.jsonl", ROWS), "--data.separator applies to .csv, .tsv", separator=";")
    eval_rows = write(tmp_path / "eval.csv", ROWS)
    assert len(named(path, eval=str(eval_rows), encoding="cp1252")) == 40


# ---- JSON --------------------------------------------------------------------------------------------------------


def test_forms_of_json(tmp_path):
    records = [{"text": t, "label": y} for t, y in ROWS]
    texts = {
        "array": json.dumps(records),
        "indented": json.dumps(records, indent=2),
        "windows": "\r\n\r\n" + json.dumps(records, indent="\t").replace("\n", "\r\n"),
        "objects": "\n".join(json.dumps(record, indent=1) for record in records),
        "lines": "\n\n".join(json.dumps(record) for record in records),
    }
    for form, text in texts.items():
        (tmp_path / f"{form}.json").write_text(text, newline="")
        assert named(tmp_path / f"{form}.json") == sorted(ROWS), form
    (tmp_path / "array.jsonl").write_text(texts["indented"])
    assert named(tmp_path / "array.jsonl") == sorted(ROWS)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('[{"text": "a",\n"label": "b"},\n{"text": "a" "label"}]', "line 3, column 14: Expecting"),
        ('[{"text": "a", "label": "b"}\n{"text": "a"}]', "line 2, column 1: expected a comma"),
        ('[{"text": "a", "label": "b"},\n]', "line 2, column 1: Expecting value"),
        ('[{"text": "a", "label": "b"}', "column 29: expected a comma or the array's end"),
        ('[{"text": "a", "label": "b"}]\n[]', "expected a comma or the array's end, and no more"),
        ('[{"text": "a", "label": "b"},\n"text"]', "line 2 is not an object"),
        ('{"text": ["a"], "label": ["b"]}', "line 1 of .*, column 'text': .* got a list"),
        ('{"text": "a", "label": "b"}\n{"text": "a", "label": "b", "text": "c"}', "'text' occurs 2 times in line 2"),
        (
            '{"text": "a", "label": "b"}\n\n{"text": "\\ud800", "label": "b"}',
            r"line 3 .* half a surrogate pair, '.ud800'",
        ),
        ('{"text": "a", "x": ' + "[" * 100_000, "line 1 is nested too deeply"),
        ("[]", "no rows in 'train'"),
    ],
)
def test_json_that_is_wrong(text, match, tmp_path):
    (tmp_path / "rows.json").write_text(text)
    refused(tmp_path / "rows.json", match)


def test_lines_of_json_that_are_wrong(tmp_path):
    good = '{"text": "a", "label": "b", "other": {"x": [1, {"y": 2}], "x": 3}}\n'
    for bad, match in (
        ('{"text": "a"', "line 4, column 13: Expecting ',' delimiter"),
        ('{"text": "a", "label": "b"} {}', "line 4, column 29: Extra data"),
        ("7", "line 4 is not an object"),
        ('{"label": "a", "label": "b"}', "column 'label' occurs 2 times in line 4"),
    ):
        (tmp_path / "rows.jsonl").write_text(good * 2 + "\n" + bad + "\n" + good)
        refused(tmp_path / "rows.jsonl", match)
