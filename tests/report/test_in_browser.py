"""The page as a browser shows it, and as it is worked by hand."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from foreshock.records import TelemetryWriter
from foreshock.report import write_report
from tests.report.runs import (
    HOSTILE,
    STRUCK_STEP,
    add_autopsy,
    add_layerwise,
    add_other_series,
    loss_at,
    rank_folder,
    write_ranks,
    write_run,
)

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

METRICS_LOSS = "loss, metrics/training_metrics.json over steps"
Opened = tuple[Any, list[str]]
Open = Callable[..., Opened]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Tests run as root in containers, where Chromium's own sandbox does not start.
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_run(tmp_path_factory.mktemp("run"))
    add_autopsy(run)
    add_other_series(run)
    add_layerwise(run)
    return write_report(run)


@pytest.fixture
def show(browser: Any) -> Iterator[Open]:
    """Opens a file; what the console said and what was asked for is in the list."""
    contexts = []

    def open_page(path: Path, **options: Any) -> Opened:
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}} | options)
        contexts.append(context)
        page, said = context.new_page(), []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.goto(path.as_uri())
        page.wait_for_selector("#main-curves svg path")
        return page, said

    yield open_page
    for context in contexts:
        context.close()


def plot(page: Any, name: str) -> Any:
    return page.locator(f"[aria-label='{name} over steps']").first


def told(page: Any, name: str) -> str:
    text = plot(page, name).get_attribute("aria-valuetext")
    assert isinstance(text, str)
    return text


def test_nothing_is_asked_for_and_nothing_is_complained_of(show: Open, report: Path) -> None:
    page, said = show(report)
    pictures = [address for address in said if address.startswith("data:image/")]
    assert [address for address in said if address not in pictures] == [report.as_uri()]
    assert page.locator("#main-curves figure").count() == 4 + 2  # loss and rate of the recorder too


def test_html_in_names_does_not_run(show: Open, tmp_path: Path) -> None:
    run = write_run(tmp_path, name=HOSTILE)
    page, said = show(write_report(run))
    assert said == [(run / "report.html").as_uri()]
    assert page.locator("img").count() == 0
    assert page.evaluate("document.querySelectorAll('script').length") == 2
    assert HOSTILE in page.locator("#more-curves").text_content()


def test_the_policy_stops_a_script_that_got_in(show: Open, report: Path, tmp_path: Path) -> None:
    page_with_script = report.read_text().replace(
        "</header>", "</header><img src='data:,' onerror='document.title=1'>"
    )
    (tmp_path / "worse.html").write_text(page_with_script)
    page, said = show(tmp_path / "worse.html")
    assert "foreshock report" in page.title()
    assert any("Content Security Policy" in message for message in said)


def test_arrow_keys_move_the_cursor_over_the_values_of_the_telemetry(
    show: Open, report: Path
) -> None:
    page, _ = show(report)
    plot(page, "train_loss").focus()
    for key, step in [("Home", 0), ("ArrowRight", 1), ("Shift+ArrowRight", 11), ("ArrowLeft", 10)]:
        page.keyboard.press(key)
        at, value = re.fullmatch(r"step (\d+): (\S+)", told(page, "train_loss")).groups()  # type: ignore[union-attr]
        assert (int(at), float(value)) == (step, pytest.approx(loss_at(step), rel=1e-4))
        assert plot(page, "train_loss").get_attribute("aria-valuenow") == str(step)
    assert told(page, "grad_norm") == "step 10: 2"


def test_page_keys_go_from_event_to_event_which_the_event_chart_tells(
    show: Open, report: Path
) -> None:
    page, _ = show(report)
    plot(page, "train_loss").focus()
    page.keyboard.press("Home")
    page.keyboard.press("PageDown")
    assert (
        told(page, "train_loss") == f"step {STRUCK_STEP}: {loss_at(STRUCK_STEP):.5g}, 1 not finite"
    )
    said = told(page, "events and risk")
    assert f"step {STRUCK_STEP}, risk DANGER" in said
    assert "rolled back to step 15" in said


def test_keys_and_buttons_zoom_and_show_all(show: Open, report: Path) -> None:
    page, _ = show(report)
    shown = page.locator("#range")
    assert shown.text_content() == "steps 0 to 39"
    plot(page, "train_loss").focus()
    page.keyboard.press("+")
    assert shown.text_content() == "steps 20 to 39"
    page.keyboard.press("Home")  # the view follows the cursor
    assert shown.text_content() == "steps 0 to 19"
    page.keyboard.press("0")
    assert shown.text_content() == "steps 0 to 39"
    page.click("text=Zoom in")
    assert shown.text_content() != "steps 0 to 39"
    page.click("text=Zoom out")
    assert shown.text_content() == "steps 0 to 39"
    page.click("text=Zoom in")
    page.click("text=Show all")
    assert shown.text_content() == "steps 0 to 39"


def test_dragging_zooms_and_a_double_click_shows_all(show: Open, report: Path) -> None:
    page, _ = show(report)
    chart = plot(page, "train_loss")
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] * 0.5, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.8, middle)
    assert chart.locator(".selection").count() == 1
    page.mouse.up()
    first, last = map(int, re.findall(r"\d+", page.locator("#range").text_content()))
    assert 15 <= first <= 20
    assert 28 <= last <= 33
    page.mouse.dblclick(box["x"] + box["width"] * 0.6, middle)
    assert page.locator("#range").text_content() == "steps 0 to 39"


def test_each_layer_has_a_strip_of_its_samples(show: Open, report: Path) -> None:
    page, _ = show(report)
    strips = page.locator("canvas")
    assert strips.evaluate_all("strips => strips.map(strip => strip.width)") == [4, 4]
    pixels = "[...strip.getContext('2d').getImageData(0, 0, 4, 1).data]"
    first = strips.first.evaluate(f"strip => {pixels}")
    assert first[:4] == [240, 244, 250, 255]
    assert first[12:] == [8, 48, 107, 255]


def test_a_logarithmic_axis_can_be_had(show: Open, report: Path) -> None:
    page, _ = show(report)
    before = plot(page, "train_loss").locator("path.line").get_attribute("d")
    page.check("#log")
    assert plot(page, "train_loss").locator("path.line").get_attribute("d") != before


def test_everything_is_reached_by_the_keyboard_and_the_focus_is_seen(
    show: Open, report: Path
) -> None:
    page, _ = show(report)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.locator(".skip").bounding_box()["x"] >= 0
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('main') !== null")
    plot(page, "train_loss").focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == METRICS_LOSS
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_the_theme_is_that_of_the_system_until_it_is_chosen(show: Open, report: Path) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    light, dark = (show(report, color_scheme=name)[0] for name in ("light", "dark"))
    assert light.evaluate(ground) != dark.evaluate(ground)
    light.select_option("#theme", "dark")
    assert light.evaluate(ground) == dark.evaluate(ground)
    dark.select_option("#theme", "light")
    assert light.evaluate(ground) != dark.evaluate(ground)


@pytest.mark.parametrize("width", [320, 1200])
def test_the_page_is_no_wider_than_the_screen(show: Open, report: Path, width: int) -> None:
    page, _ = show(report, viewport={"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_on_paper_all_is_open_and_the_tools_are_gone(show: Open, report: Path) -> None:
    page, _ = show(report, color_scheme="dark")
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    assert not page.locator("#tools").is_visible()
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(27, 36, 48)"
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details:not([open])").count() > 0
    assert len(page.pdf()) > 10_000
    assert page.locator("details:not([open])").count() > 0


def test_nothing_moves_for_those_who_do_not_want_it(show: Open, report: Path) -> None:
    page, _ = show(report, reduced_motion="reduce")
    assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "auto"


# ---- many ranks


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By the number of ranks."""
    runs = {size: write_ranks(tmp_path_factory.mktemp("ranks"), size) for size in (3, 12)}
    return {size: write_report(run) for size, run in runs.items()}


def test_every_rank_has_a_line_and_a_value_at_the_cursor(
    show: Open, of_ranks: dict[int, Path]
) -> None:
    page, said = show(of_ranks[3])
    assert said == [of_ranks[3].as_uri()]
    plot(page, "alignment by rank").focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert told(page, "alignment by rank") == "step 1: rank 0: 0.1, rank 1: 0.2, rank 2: 0.4"
    assert told(page, "train_loss").startswith("step 1: ")  # one cursor for all charts
    chart = page.locator("#rank-curves figure").first
    lines = chart.locator(".plot path.of-rank")
    colours = lines.evaluate_all("lines => lines.map(line => getComputedStyle(line).stroke)")
    assert len(set(colours)) == 3
    shown = "line => getComputedStyle(line).display"
    assert chart.locator(".plot path.line").evaluate(shown) == "none"
    assert chart.locator(".plot path.of-rank").first.evaluate(shown) != "none"
    assert chart.locator("li").all_text_contents() == [
        " rank 0",
        " rank 1",
        " rank 2, the farthest",
    ]


def test_many_ranks_are_a_band_and_the_farthest_one(show: Open, of_ranks: dict[int, Path]) -> None:
    page, said = show(of_ranks[12])
    assert said == [of_ranks[12].as_uri()]
    chart = page.locator("#rank-curves figure").first
    assert chart.locator(".plot path.envelope").is_visible()
    assert chart.locator(".plot path.of-rank").count() == 1
    colours = chart.locator(".plot path.of-rank, .plot path.line").evaluate_all(
        "lines => lines.map(line => getComputedStyle(line).stroke)"
    )
    assert len(set(colours)) == 2
    plot(page, "alignment by rank").focus()
    assert told(page, "alignment by rank") == "step 39: median 0.65 (0.1 to 1.3), rank 11: 1.3"


def test_a_value_between_two_that_are_not_there_is_a_dot(show: Open, tmp_path: Path) -> None:
    run = write_ranks(tmp_path, 2)
    for rank, steps in enumerate([(50, 51, 52), (51,)]):
        with TelemetryWriter(rank_folder(run, rank) / "telemetry.jsonl") as writer:
            for step in steps:
                writer.write("telemetry", step, seldom=1.0 + rank)
    page, _ = show(write_report(run))
    chart = plot(page, "seldom by rank")
    dots = [chart.locator(f"circle.rank-{rank}").count() for rank in range(2)]
    assert dots == [0, 1]


@pytest.mark.parametrize("width", [320, 1200])
def test_the_page_of_many_ranks_is_no_wider_than_the_screen(
    show: Open, of_ranks: dict[int, Path], width: int
) -> None:
    page, _ = show(of_ranks[12], viewport={"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_page_of_one_rank_has_no_place_for_ranks(show: Open, report: Path) -> None:
    page, _ = show(report)
    assert page.locator("#rank-curves, #ranks").count() == 0
