"""README's figures and picture and bench/RESULTS.md are those of the newest result file; `make readme` writes them."""

import json
from pathlib import Path

import pytest
from test_bench import case, result

from bench import readme, report

WRITE = "run make readme"


@pytest.mark.parametrize("page", [readme.README, readme.TABLES], ids=lambda page: page.name)
def test_the_page_is_that_of_the_newest_result_file(page: Path) -> None:
    assert page.read_text() == readme.pages(report.newest())[page], WRITE


def test_the_picture_is_that_of_the_newest_result_file() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    drawn = readme.PICTURE.read_text()
    version = f"Matplotlib v{matplotlib.__version__},"
    if version not in drawn:
        pytest.skip(f"the picture was not drawn with {version}")
    assert drawn == readme.picture(report.read(report.newest())), WRITE


def test_the_readme_shows_the_picture() -> None:
    assert f"]({readme.PICTURE.relative_to(readme.ROOT)})" in readme.README.read_text()


def test_the_sentence_has_the_best_and_the_worst_row() -> None:
    best = case(loss="mse", shape=[7, 8], speedup={"eager": [8.0, 9.0, 10.0]})
    worst = case(loss="rmse", shape=[32, 10], speedup={"eager": [0.4, 0.5, 0.6]}, memory={})
    slow = case(group="grid", bars={"eager": 1 / 1.05}, speedup={"eager": [0.2, 0.3, 0.4]})
    text = readme.sentence(result(case(), worst, best, slow))
    assert "**9× at best** (`mse`, 7×8, float32)" in text
    assert "**0.5× at worst** (`rmse`, 32×10, float32; below 1 is slower)" in text
    assert "4× in the median of 3 rows" in text
    assert "peak memory above the inputs is 0.25 to 0.25 of eager's" in text
    assert "Of 1 small calls of cross entropy 1 are slower than eager by more than 5 %, at worst 0.3×." in text


def test_every_float32_row_is_drawn_the_same_each_time() -> None:
    pytest.importorskip("matplotlib")
    rows = result(case(), case(dtype="bfloat16"), case(options={"inplace_grad": True}), case(group="grid"))
    assert readme.drawn(rows) == [case()]
    order = [case(loss="mse"), case(loss="rmse"), case(loss="mse", shape=[2, 3])]
    assert [row["loss"] for row in readme.drawn(result(*order))] == ["mse", "mse", "rmse"]
    text = readme.picture(rows)
    assert text == readme.picture(rows)
    assert "<dc:date>" not in text


def test_rewrite_replaces_what_stands_between_the_markers() -> None:
    text = f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n"
    once = readme.rewrite(text, "new")
    assert once == f"before\n{readme.BEGIN}\nnew\n{readme.END}\nafter\n"
    assert readme.rewrite(once, "new") == once
    with pytest.raises(ValueError, match="figures:begin"):
        readme.rewrite("no markers", "new")


def test_a_refused_file_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "made-up-cpu.json").write_text(json.dumps(result(case(), busy=0.5)))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    for name in ("README", "TABLES", "PICTURE"):
        monkeypatch.setattr(readme, name, tmp_path / name)
    assert readme.main() == 1
    assert "made-up-cpu.json: machine.busy: expected at most 5%" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["made-up-cpu.json"]
