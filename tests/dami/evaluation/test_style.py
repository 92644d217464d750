"""Pictures: on light and dark pages, labels apart from each other, no line through two points; pages on a phone."""

from __future__ import annotations

import json
import re
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from dami.evaluation import JsonLines
from dami.evaluation.frontier import Frontier
from dami.evaluation.plots import curve_figures, draw_frontier
from dami.evaluation.report import write_report
from dami.evaluation.style import BLUE, DARK, INK, Label, label_ends, label_points, panels, save, styled, svg

from tests.dami.evaluation.test_frontier import RISING, records

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))


def luminance(color: str) -> float:
    """Of WCAG, from 0 to 1."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(share * c for share, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    low, high = sorted(luminance(each) + 0.05 for each in (one, other))
    return high / low


def test_every_color_of_a_picture_can_be_read_on_light_and_dark() -> None:
    for drawn in map(svg, curve_figures(Frontier.of(records(*RISING))).values()):
        assert drawn.startswith("<svg")
        style, shapes = re.search(r"<style>(.*?)</style>(.*)", drawn, re.DOTALL).groups()  # type: ignore[union-attr]
        assert "<g id" not in drawn  # several stand on a page
        used = set(re.findall(r"(?:fill|stroke): (#\w{6})", shapes))
        assert {BLUE, INK} <= used <= DARK.keys()
        assert style.startswith("@media (prefers-color-scheme: dark)")
        assert all(f'[style*="fill: {color}"]{{fill:{DARK[color]}!important}}' in style for color in used)
    paper = next(color for color in DARK if luminance(color) == 1)
    for color in DARK.keys() - {paper, "#d1d9e0"}:  # the grid is to be faint
        assert contrast(color, paper) > 3, color
        assert contrast(DARK[color], DARK[paper]) > 3, color


def test_levels_are_told_apart_where_there_are_several() -> None:
    several = Frontier.of(records(*RISING))
    for frontier, title, labels in (
        (several, "Right answers over λ, by level of difficulty", ["level 1", "level 2"]),
        (several.of_level(1), "Right answers over λ", [""]),
    ):
        (axes,) = curve_figures(frontier)[title].axes
        assert sorted(text.get_text() for text in axes.texts) == labels
        assert len(axes.lines) == len(labels)


def test_the_same_picture_is_the_same_file(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        (figure,) = list(curve_figures(Frontier.of(records(*RISING))).values())[:1]
        save(figure, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def boxes(axes: Any) -> list[Any]:
    axes.figure.draw_without_rendering()
    return [text.get_window_extent() for text in axes.texts]


@styled()
def test_labels_of_points_hide_no_other() -> None:
    _, (axes,) = panels(5, 4)
    axes.set(xlim=(0, 10), ylim=(0, 10))
    line = [(1 + 0.45 * i, 10 - 9 / (1 + i)) for i in range(11)]  # dense at the end, as λ near 1
    label_points(axes, line, [Label(x, y, f"{i / 10:g}") for i, (x, y) in enumerate(line)])
    assert len(axes.texts) == 11
    assert not any(a.overlaps(b) for a, b in combinations(boxes(axes), 2))


@styled()
def test_labels_of_lines_hide_no_other_and_keep_their_order() -> None:
    _, (axes,) = panels(5, 4)
    axes.set(xlim=(0, 1), ylim=(0, 100))
    label_ends(axes, [(100.0, "a", INK), (99.0, "b", INK), (40.0, "c", INK), (100.0, "d", INK)])
    found = boxes(axes)
    assert not any(a.overlaps(b) for a, b in combinations(found, 2))
    assert [text.get_text() for text in sorted(axes.texts, key=lambda text: text.get_position()[1])][:2] == ["c", "b"]


@pytest.mark.parametrize(("lams", "joined"), [([0.0, 1.0], False), ([0.0, 0.5, 1.0], True)])
@styled()
def test_two_points_are_not_joined(lams: list[float], joined: bool) -> None:
    _, (axes,) = panels(5, 4)
    draw_frontier(axes, Frontier.of([r for r in records([0.2, 0.6, 0.8], [10, 20, 40]) if r.intensity in lams]).points)
    assert next(line.get_linestyle() != "None" for line in axes.lines if len(line.get_xdata()) == len(lams)) is joined


@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium: on Debian, apt install chromium chromium-driver")
def test_a_page_fits_a_phone_and_follows_its_colors(tmp_path: Path) -> None:
    questions = tmp_path / "q.jsonl"
    questions.write_text("\n".join([json.dumps({"question": "Is 1 < 2?" + " and so" * 50, "answer": "x"})] * 6))
    write_report(JsonLines(questions, "word"), records(*RISING, questions=6), tmp_path, {"pair": "a" * 300})
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
        )
        for scheme, paper in (("light", "rgb(255, 255, 255)"), ("dark", "rgb(13, 17, 23)")):
            media = [{"name": "prefers-color-scheme", "value": scheme}]
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
            browser.get((tmp_path / "report.html").as_uri())
            assert browser.execute_script("return document.documentElement.scrollWidth") == 400
            for chart in browser.find_elements("css selector", "svg"):
                assert chart.size["width"] > 350
            page = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
            chart = browser.execute_script("return getComputedStyle(document.querySelector('svg path')).fill")
            assert page == chart == paper
    finally:
        browser.quit()
