"""The page is whole HTML, says what the data say, and lets nothing in."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

from foreshock.report import render, report_data, write_report
from tests.report.runs import HOSTILE, add_autopsy, add_layerwise, add_other_series, write_run

VOID = {"meta", "img", "input", "link", "br"}
ROOT = Path(__file__).parents[2]
STYLE = ROOT / "src" / "foreshock" / "report" / "page" / "report.css"


class Page(HTMLParser):
    """The elements of a page, in order; fails where one is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[int, str] = {}
        self._open: list[tuple[str, int]] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append((tag, len(self.elements) - 1))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for _, index in self._open:
            self.texts[index] = self.texts.get(index, "") + data

    def all(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        """Attributes and text of each element of this kind."""
        return [
            (attributes, self.texts.get(index, ""))
            for index, (found, attributes) in enumerate(self.elements)
            if found == tag
        ]


def page_of(run: Path) -> Page:
    return Page(write_report(run).read_text())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    add_autopsy(write_run(tmp_path / "run"))
    add_other_series(tmp_path / "run")
    add_layerwise(tmp_path / "run")
    return tmp_path / "run"


def drawing_in(page: Page) -> dict[str, Any]:
    (text,) = (text for attributes, text in page.all("script") if attributes.get("id") == "data")
    drawing: dict[str, Any] = json.loads(text)
    return drawing


def test_the_page_holds_the_data_that_it_draws(run: Path) -> None:
    wanted = json.loads(json.dumps(report_data(run)["drawing"]))
    assert drawing_in(page_of(run)) == wanted


def test_the_page_says_in_words_what_the_run_was(run: Path) -> None:
    page = page_of(run)
    ((_, text),) = page.all("main")
    for said in (
        "RECOVERED",
        "rolled back to step 15, learning rate times 0.5",
        "parameter head.weight: 1 NaN of 40 values",
        "nothing is wrong with head.weight",
        "0.25 ms a step, 1.5 %",
        "complete up to line 1, the head in summary.json",
        "monitoring/activations.jsonl: 2 lines skipped",
        "Too large to be shown here",
        "2.13.0",
        "INSTABILITY",
        "sha256:",
    ):
        assert said in " ".join(text.split()), said


def test_headings_tables_and_links_are_in_order(run: Path) -> None:
    page = page_of(run)
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [attributes["href"] or "" for attributes, _ in page.all("a")]
    assert links[0] == "#main"
    assert {link[1:] for link in links} <= set(ids)
    assert all(attributes.get("scope") in ("col", "row") for attributes, _ in page.all("th"))
    assert page.all("html")[0][0]["lang"] == "en"
    assert all(attributes["alt"] for attributes, _ in page.all("img"))
    labelled = [a["aria-labelledby"] for a, _ in page.all("section")]
    assert set(labelled) <= set(ids)


def test_the_page_loads_nothing_and_allows_its_own_script_and_style_only(run: Path) -> None:
    page = page_of(run)
    for _, attributes in page.elements:
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/")), attributes
    (policy,) = (a["content"] or "" for a, _ in page.all("meta") if "http-equiv" in a)
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    ((_, style),) = page.all("style")
    _, (_, script) = page.all("script")
    for text in (style, script):
        assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in policy


def test_names_and_reasons_that_are_html_stay_text(tmp_path: Path) -> None:
    run = write_run(tmp_path / "<b>run", name=HOSTILE)
    add_autopsy(run, HOSTILE)
    add_layerwise(run, HOSTILE)
    page = page_of(run)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"img", "b"}
    assert len(page.all("script")) == 2
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert page.all("h1")[0][1] == "Run <b>run"
    assert "</script><img" in page.all("main")[0][1]
    names = [curve["name"] for curve in drawing_in(page)["curves"]]
    assert f"largest_gradients.{HOSTILE}" in names


def test_every_breakage_still_makes_a_page(run: Path) -> None:
    for name in ("ledger.jsonl", "summary.json", "config.json", "telemetry.jsonl"):
        (run / name).unlink()
        page_of(run)
    (run / "summary.json").write_text('{"guard": 3, "overhead": {"x": 1}, "final_loss": {"a": 1}}')
    page_of(run)


def test_numbers_that_are_not_finite_reach_no_script(run: Path) -> None:
    data = report_data(run)
    data["drawing"]["curves"][0]["mean"][0] = float("nan")
    with pytest.raises(ValueError, match="not JSON compliant"):
        render(data)


# ---- colours


def colours(style: Path = STYLE) -> dict[str, tuple[str, str]]:
    """By name: in the light theme, and in the dark one."""
    found = re.findall(r"--([a-z0-9-]+): light-dark\((#\w+), (#\w+)\)", style.read_text())
    return {name: (light, dark) for name, light, dark in found}


def luminance(colour: str) -> float:
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_black_on_white_has_the_contrast_that_the_definition_says() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


@pytest.mark.parametrize("text", ["text", "faint", "accent", "bad", "good", "warn"])
@pytest.mark.parametrize("ground", ["page", "card"])
@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_can_be_read(text: str, ground: str, theme: int) -> None:
    known = colours()
    assert contrast(known[text][theme], known[ground][theme]) >= 4.5


@pytest.mark.parametrize("level", range(5))
@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_the_names_of_levels_and_the_curves_can_be_read_over_their_colours(
    level: int, theme: int
) -> None:
    known = colours()
    ground = known[f"risk-{level}"][theme]
    assert contrast(known["text"][theme], ground) >= 4.5
    assert contrast(known["accent"][theme], ground) >= 3


# ---- where it is installed


def test_the_wheel_holds_the_files_of_the_page(tmp_path: Path) -> None:
    wheel = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    options = ["--config-settings=wheel.cmake=false", "--wheel-dir", str(tmp_path)]
    subprocess.run([*wheel, *options, str(ROOT)], check=True, capture_output=True)
    (built,) = tmp_path.glob("*.whl")
    held = {Path(name).name for name in ZipFile(built).namelist() if "/report/page/" in name}
    assert held == {path.name for path in STYLE.parent.iterdir()}
    assert len(held) == 7
