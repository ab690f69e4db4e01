"""The HTML page of a result in Chromium: clicked through, without network, without an error in the console."""

from __future__ import annotations

import copy
import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, result, written

RESULTS = Path(__file__).parents[1] / "bench" / "results"
TRACES = (
    "return document.getElementById(arguments[0]).data.map(t => ({name: t.name, x: t.x, y: t.y, visible: t.visible}))"
)


@pytest.fixture
def report(tmp_path: Path) -> Path:
    before = copy.deepcopy(result())
    before["cases"][0]["speedup"]["eager"] = [5.0, 5.5, 6.0]
    before["cases"][1]["speedup"]["eager"] = [1.0, 1.5, 2.0]
    before["versions"]["torch"] = "2.12.0"
    return written(tmp_path, result(), before)


def column(page: Browser, heading: str) -> list[str]:
    """Return the texts of a column of the table of all cases; of a cell the large figure."""
    headings = page.texts("#table thead button")
    place = [each.rstrip("▲▼") for each in headings].index(heading)
    rows = "return [...document.querySelectorAll('#table tbody tr')]"
    cells: list[str] = page.js(f"{rows}.map(row => row.cells[arguments[0]].firstChild.textContent)", place)
    return cells


def traces(page: Browser, figure: str) -> dict[str, Any]:
    return {trace["name"]: trace for trace in page.js(TRACES, figure)}


def test_a_page_opens_without_network_or_errors_and_a_filter_acts_on_table_plots_and_address(
    chromium: Browser, report: Path
) -> None:
    chromium.open(report)
    assert len(column(chromium, "Loss")) == 12
    assert "auto (ours)" in traces(chromium, "time")
    chromium.click("filter-loss-linear_cross_entropy")
    assert column(chromium, "Loss") == ["linear_cross_entropy, softcap=30.0"]
    assert traces(chromium, "time")[None]["y"] == [
        "eager: 800\u00a0ms",
        "auto (ours): 400\u00a0ms",
        "liger: 360\u00a0ms",
        "quack (wrong): 300\u00a0ms",
    ]
    assert chromium.js("return location.hash") == "#loss=linear_cross_entropy"


@pytest.mark.full
def test_filters_act_on_every_section_and_can_be_taken_back(chromium: Browser, report: Path) -> None:
    chromium.open(report)
    chromium.click("filter-dtype-bfloat16")
    assert set(column(chromium, "Dtype")) == {"bfloat16"}
    assert chromium.texts("#lose tbody tr") == []  # the slower ones are float32
    assert all("bfloat16" in text for text in chromium.texts("#win tbody tr"))
    assert all("bfloat16" in name for trace in traces(chromium, "share").values() for name in trace["y"])
    assert chromium.texts("#scales .body") == ["Nothing was fitted for what the filters show."]
    assert chromium.texts("#before .body p") == [
        "Of 15 figures in both runs 0 became worse and 0 better; the others did not change."
    ]
    assert chromium.texts("#filters p") == ["5 of 12 casesShow all"]
    chromium.click("filter-loss-linear_cross_entropy")
    assert "No case passes the filters." in chromium.texts("#peers .note")
    chromium.click("clear")
    assert len(column(chromium, "Loss")) == 12


@pytest.mark.full
def test_what_we_lose_comes_first_the_worst_at_the_top_in_the_type_of_what_we_win(
    chromium: Browser, report: Path
) -> None:
    chromium.open(report)
    assert chromium.js("return document.querySelector('main h3').textContent") == "Slower than a contestant: 2"
    assert [text.split("×")[0] for text in chromium.texts("#lose tbody tr")] == ["0.500", "0.900"]
    assert chromium.texts("#win tbody tr")[0].startswith("4.00×")
    size = "return getComputedStyle(document.querySelector(arguments[0])).fontSize"
    for part in ("td", "td small"):
        assert chromium.js(size, f"#lose {part}") == chromium.js(size, f"#win {part}")
    last = "linear_cross_entropy, softcap=30.0 2048×384×30522 float32"
    assert chromium.texts("#wrong > li") == [f"quack: computes no softcap 1 case{last}"]
    assert chromium.texts("#absent > li") == [f"cce: needs a GPU 2 casescross_entropy 32×10 float32{last}"]


@pytest.mark.full
def test_the_table_gives_no_speed_up_of_what_is_wrong_and_colours_what_is_slower(
    chromium: Browser, report: Path
) -> None:
    chromium.open(report)
    assert column(chromium, "over quack")[-1] == "wrong"
    assert column(chromium, "over cce")[-1] == "did not run"
    assert column(chromium, "over liger")[-1] == "0.900"
    assert column(chromium, "Of roof")[-2:] == ["22\u00a0%", "50\u00a0%"]
    assert column(chromium, "Of eager’s") == ["33\u00a0%"] * 12
    assert column(chromium, "Our error")[0] == "2.0e-7"
    assert column(chromium, "Time")[-2:] == ["90.0\u00a0µs", "400\u00a0ms"]
    slower = chromium.texts("#table td.slower")
    assert [text[:5] for text in slower] == ["0.500", "0.900"]  # not the floor, which is a limit


@pytest.mark.full
def test_headings_sort_by_click_and_by_key_and_keep_the_focus(chromium: Browser, report: Path) -> None:
    chromium.open(report)
    chromium.click("table-time")
    up = column(chromium, "Time")
    assert (up[0], up[-1]) == ("90.0\u00a0µs", "400\u00a0ms")
    assert chromium.js("return document.activeElement.id") == "table-time"
    chromium.find("#table-time").send_keys("\ue007")  # Enter
    assert column(chromium, "Time") == up[::-1]
    order = "return document.getElementById('table-time').parentElement.getAttribute('aria-sort')"
    assert chromium.js(order) == "descending"
    chromium.click("table-over liger")  # one case has it: it comes first, both ways
    assert column(chromium, "over liger")[0] == "0.900"
    chromium.click("table-over liger")
    assert column(chromium, "over liger")[0] == "0.900"


@pytest.mark.full
def test_the_address_brings_back_filters_order_and_choices(chromium: Browser, report: Path) -> None:
    chromium.open(report)
    chromium.click("filter-loss-cross_entropy")
    chromium.click("table-memory")
    chromium.js("const s = document.getElementById('x'); s.value = 'V'; s.dispatchEvent(new Event('change'))")
    chromium.click("filter-dtype-float32")
    fragment = chromium.js("return location.hash.slice(1)")
    parts = "return [...document.querySelectorAll('#table, #x, .chip input')]"
    view = f"{parts}.map(part => [part.id, part.value, part.checked, part.innerText])"
    before = chromium.js(view)
    chromium.open(report, fragment)
    assert chromium.js(view) == before
    assert chromium.js("return document.getElementById('x').value") == "V"
    chromium.js("location.hash = 'dtype=bfloat16&loss=nonsense'")
    time.sleep(0.3)
    assert set(column(chromium, "Dtype")) == {"bfloat16"}


@pytest.mark.full
def test_time_and_memory_are_drawn_against_the_chosen_size_a_line_for_each_rest(
    chromium: Browser, report: Path
) -> None:
    chromium.open(report, "loss=cross_entropy&dtype=float32")
    whole = traces(chromium, "time")
    assert set(whole) == {"auto (ours)", "eager", "torch.compile", "the floor"}
    assert whole["eager"]["x"] == [320, 256_000, 1_024_000, 4_096_000, 8_192_000, 32_768_000]
    assert whole["eager"]["y"] == pytest.approx([4.5e-5, *(4e-9 * size for size in whole["eager"]["x"][1:])])
    chromium.js("const s = document.getElementById('x'); s.value = 'N'; s.dispatchEvent(new Event('change'))")
    lines = [trace["x"] for trace in chromium.js(TRACES, "time") if trace["name"] == "eager"]
    assert sorted(lines) == [[32], [256, 1024], [256, 1024, 4096]]
    assert {"V=1000", "V=32000", "V=10"} <= traces(chromium, "memory").keys()
    axes = "const l = document.getElementById('memory').layout; return [l.xaxis.type, l.yaxis.type, l.xaxis.title.text]"
    assert chromium.js(axes) == ["log", "log", "N"]


@pytest.mark.full
def test_a_line_that_the_legend_hides_stays_hidden_when_the_table_is_sorted(chromium: Browser, report: Path) -> None:
    chromium.open(report)
    hidden = "return document.getElementById('time')._fullData.filter(t => t.visible === 'legendonly').map(t => t.name)"
    assert chromium.js(hidden) == []
    toggle = "const all = [...document.querySelectorAll('#time .legendtoggle')]; return all[1]"
    chromium.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", chromium.find("#time"))
    webdriver = pytest.importorskip("selenium.webdriver")
    webdriver.ActionChains(chromium.driver).move_to_element(chromium.js(toggle)).click().perform()
    time.sleep(0.6)  # Plotly waits for a second click
    assert chromium.js(hidden) == ["eager"]
    chromium.click("table-time")
    assert chromium.js(hidden) == ["eager"]


@pytest.mark.full
def test_the_roofline_has_the_roof_of_the_dtype_and_the_attained_rates(chromium: Browser, report: Path) -> None:
    chromium.open(report)
    rates = traces(chromium, "rates")
    assert rates["roof float32"]["y"][1:] == pytest.approx([2e11, 2e11])
    assert rates["roof float32"]["x"][1] == pytest.approx(2e11 / 2e10)  # flop per byte where both limits meet
    assert (rates["auto (ours)"]["x"], rates["auto (ours)"]["y"]) == ([200], [4e10 / 0.4])
    assert (rates["eager"]["visible"], rates["liger"]["visible"]) == (True, "legendonly")
    share = traces(chromium, "share")
    assert share["ours, limit: compute"]["x"] == pytest.approx([50])
    assert share["ours, limit: call"]["x"] == pytest.approx([100 * 2e-5 / 9e-5])
    assert len(share["ours, limit: memory"]["x"]) == 10


@pytest.mark.full
def test_growth_that_is_too_fast_and_changes_for_the_worse_come_first(chromium: Browser, report: Path) -> None:
    chromium.open(report)
    assert chromium.texts("#exponents-table tbody th") == ["info_nce", "cross_entropy", "mse"]
    assert chromium.texts("#exponents-table td:last-child") == ["too fast", "as it should be", "unclear"]
    assert chromium.texts("#exponents-table td.slower") == ["too fast"]
    changed = chromium.texts("#changes tbody tr")
    assert [text.endswith(word) for text, word in zip(changed, ("slower", "faster"), strict=True)] == [True, True]
    assert chromium.texts("#differences li") == ["versions.torch: 2.12.0 -> 2.13.0"]


@pytest.mark.full
def test_text_of_a_result_never_runs_or_becomes_markup(chromium: Browser, tmp_path: Path) -> None:
    shown, hostile = result(), '<img src=x onerror="hit=1"><b>bold</b></script><script>hit=1</script>'
    shown["versions"]["torch"] = hostile
    shown["cases"][0] |= {"loss": hostile, "dtype": hostile, "absent": {hostile: hostile}}
    shown["cases"][-1]["speedup"][hostile] = [1.0, 2.0, 3.0]
    shown["cases"][-1]["seconds"][hostile] = [1.0, 2.0, 3.0]
    chromium.open(written(tmp_path, shown))
    for fragment in ("", "loss=linear_cross_entropy"):
        chromium.open(tmp_path / "report.html", fragment)
        assert chromium.js("return [typeof hit, document.querySelectorAll('img, main section b b').length]") == [
            "undefined",
            0,
        ]
    assert any(hostile in text for text in chromium.texts("dd"))
    assert any("<b>bold</b>" in text for text in chromium.texts("#time text"))


@pytest.mark.full
def test_the_dark_setting_colours_page_and_plots(chromium: Browser, report: Path) -> None:
    colours = (
        "return [getComputedStyle(document.body).backgroundColor, document.getElementById('time').layout.paper_bgcolor]"
    )
    chromium.open(report)
    assert chromium.js(colours) == ["rgb(255, 255, 255)", "#ffffff"]
    dark = {"name": "prefers-color-scheme", "value": "dark"}
    chromium.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [dark]})
    time.sleep(0.5)
    assert chromium.js(colours) == ["rgb(20, 23, 28)", "#14171c"]


@pytest.mark.full
@pytest.mark.parametrize("name", ["new", "old"])
@pytest.mark.parametrize("width", [480, 1200])
def test_no_page_is_wider_than_its_window(
    chromium: Browser, report: Path, tmp_path: Path, name: str, width: int
) -> None:
    if name == "old":
        files = ("2026-11-27-2574311fbc-cpu.json", "2026-11-27-f5959aaeef-cpu.json")
        now, then = (json.loads((RESULTS / each).read_text()) for each in files)
        report = written(tmp_path, now, then)
    chromium.open(report, width=width)
    assert chromium.js("return document.documentElement.scrollWidth") <= width
    for plot in chromium.driver.find_elements("css selector", ".plot"):
        assert plot.size["width"] <= width - 24


@pytest.mark.full
def test_a_figure_is_downloaded_as_a_png(chromium: Browser, report: Path) -> None:
    chromium.open(report)
    button = chromium.find("#memory .modebar-btn[data-title*=Download i], #memory .modebar-btn[data-attr=toImage]")
    chromium.js("arguments[0].scrollIntoView({block: 'center'})", button)
    button.click()
    picture = chromium.downloads / "tlkernels-memory.png"
    end = time.monotonic() + 10
    while not picture.exists() and time.monotonic() < end:
        time.sleep(0.1)
    head = picture.read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    assert struct.unpack(">I", head[16:20])[0] > 800  # pixels, at twice the size on the page
