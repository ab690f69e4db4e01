"""Chromium for the tests of HTML pages, and a result for them to show."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tlkernels import html

MISSING = "needs chromium and chromedriver (Debian: apt install chromium chromium-driver) and selenium"
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


class Browser:
    """A page in Chromium, and what it did."""

    def __init__(self, driver: Any, downloads: Path) -> None:
        self.driver, self.downloads = driver, downloads

    def open(self, path: Path, fragment: str = "", width: int = 1200, dark: bool = False) -> None:
        """Load the page anew, in a window of this width, with the light or the dark setting."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get("about:blank")
        self.driver.get(f"{path.as_uri()}#{fragment}")

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def texts(self, selector: str) -> list[str]:
        """Return the text of every element, also of those scrolled out of sight."""
        found: list[str] = self.js(
            "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", selector
        )
        return found

    def click(self, element_id: str) -> None:
        element = self.js("return document.getElementById(arguments[0])", element_id)
        assert element is not None, element_id
        self.js("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def errors(self) -> list[str]:
        """Return the errors and warnings of the console since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Return the addresses of all requests since the last call, without files and the browser itself."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith(("file:", "data:", "blob:", "chrome:"))]


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """Start Chromium with an empty profile in `folder`; skip the test where it is not installed."""
    webdriver = pytest.importorskip("selenium.webdriver", reason=MISSING)
    paths = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in paths:
        pytest.skip(MISSING)
    options = webdriver.ChromeOptions()
    options.binary_location = paths[0]
    for flag in (*FLAGS.split(), f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    options.add_experimental_option("prefs", {"download.default_directory": str(folder)})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(paths[1]))
    try:
        yield Browser(driver, folder)
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("chromium")) as running:
        yield running


@pytest.fixture
def chromium(started: Browser) -> Iterator[Browser]:
    """Every test ends with a look at the console and at the network."""
    yield started
    assert started.errors() == []
    assert started.requests() == []


def written(folder: Path, shown: dict[str, Any], before: dict[str, Any] | None = None) -> Path:
    html.write(folder / "report.html", shown, before)
    return folder / "report.html"


COPY, MATMUL, CALL = 2e10, {"float32": 2e11, "bfloat16": 4e11}, 2e-5


def case(
    loss: str, dims: dict[str, int], dtype: str, ours: float, others: dict[str, float], **more: Any
) -> dict[str, Any]:
    """Return a case whose medians are `ours` and `others` in seconds, with quartiles 10 % away."""
    seconds = {"auto": ours, **others}
    wrong = more.get("wrong", {})
    options = more.pop("options", {})
    shape = list(dims.values())
    name = "-".join([loss, "x".join(map(str, shape)), dtype, *map(str, options)])
    return {
        "id": name,
        "group": "table",
        "loss": loss,
        "shape": shape,
        "dims": dims,
        "dtype": dtype,
        "device": "cpu",
        "options": options,
        "cold": True,
        "ours": "auto",
        "served": "native",
        "seconds": {who: [0.9 * time, time, 1.1 * time] for who, time in seconds.items()},
        "speedup": {
            who: [0.95 * time / ours, time / ours, 1.05 * time / ours]
            for who, time in others.items()
            if who not in wrong
        },
        "first": {"auto": 0.01, "compile": 12.5},
        "memory": {"auto": 4_000_000, "eager": 12_000_000},
        "error": {"auto": {"value": 1e-8, "gradient": 2e-7}, "eager": {"value": 2e-8, "gradient": 3e-7}},
        "wrong": {},
        "absent": {},
        "bytes": 8_000_000,
        "flops": 0,
        "roof": 8e6 / COPY,
        "limit": "memory",
        "rounds": 7,
        "wall": 1.0,
        "busy": 0.01,
        "bars": {},
        "verdicts": {},
        **more,
    }


def result() -> dict[str, Any]:
    """Return a small result that has everything: sizes, losses, products, wrong and absent contestants, scales."""
    cases = [
        case(
            "cross_entropy",
            {"N": n, "V": v},
            dtype,
            n * v * 1e-9,
            {"eager": factor * n * v * 1e-9, "floor": n * v * 5e-10},
        )
        for dtype, factor in (("float32", 4.0), ("bfloat16", 3.0))
        for n, v in ((256, 1000), (1024, 1000), (4096, 1000), (256, 32000), (1024, 32000))
    ]
    cases.append(
        case(
            "cross_entropy",
            {"N": 32, "V": 10},
            "float32",
            9e-5,
            {"eager": 4.5e-5, "compile": 1.8e-4},
            limit="call",
            absent={"cce": "needs a GPU"},
            roof=CALL,
        )
    )
    products = {"flops": 4e10, "bytes": 2e8, "roof": 0.2, "limit": "compute"}
    cases.append(
        case(
            "linear_cross_entropy",
            {"N": 2048, "H": 384, "V": 30522},
            "float32",
            0.4,
            {"eager": 0.8, "liger": 0.36, "quack": 0.3},
            options={"softcap": 30.0},
            wrong={"quack": "computes no softcap"},
            absent={"cce": "needs a GPU"},
            **products,
        )
    )
    scale = {"dtype": "float32", "device": "cpu", "contestant": "auto", "dim": "N"}
    points = [[n, n * 1e-5] for n in (256, 512, 1024, 2048)]
    return {
        "kind": "bench",
        "date": "2026-11-28T02:00:00+00:00",
        "commit": "0123456789",
        "dirty": False,
        "whole": True,
        "machine": {"device": "cpu", "cpu": "A processor", "cores": 2, "threads": 2, "isa": "avx512", "busy": 0.0123},
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "ceilings": {"copy": COPY, "matmul": MATMUL, "call": CALL},
        "cases": cases,
        "scales": [
            {
                **scale,
                "loss": "cross_entropy",
                "quantity": "time",
                "points": points,
                "exponent": [0.97, 1.0, 1.03],
                "expected": 1.0,
            },
            {
                **scale,
                "loss": "mse",
                "quantity": "time",
                "points": points,
                "exponent": [-2.0, 1.5, 5.0],
                "expected": 1.0,
            },
            {
                **scale,
                "loss": "info_nce",
                "quantity": "memory",
                "points": points,
                "exponent": [1.9, 2.0, 2.1],
                "expected": 1.0,
            },
        ],
    }
