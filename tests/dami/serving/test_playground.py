"""The playground before a running server, in headless Chromium as its users have it."""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import combinations, count
from pathlib import Path
from threading import Event, Semaphore
from typing import Any

import dami
import httpx
import pytest
from dami.evaluation.tasks import last_word
from dami.serving.engine import Load
from dami.serving.playground import FILES, read_frontier
from dami.serving.settings import ServiceSettings
from PIL import Image

from benchmarks.serving.server import Server
from tests.dami.serving.conftest import KEY, POINTS
from tests.dami.serving.test_server import LIMITS, Running, running
from tests.marks import slow

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
in_chromium = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no Chromium: on Debian or Ubuntu, apt install chromium chromium-driver"
)
HARD = "State the final answer to the following arithmetic problem: 47 + 38 - 12 + 95 - 23 + 61 ="
SUM = "47 + 38 - 12 ="  # wrong at λ = 0, right at λ = 1
SECONDS = 60  # that a page may take to show something


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Page:
    """The page as a person sees it."""

    def __init__(self, browser: Any, url: str) -> None:
        from selenium.webdriver.common.keys import Keys
        from selenium.webdriver.support.ui import WebDriverWait

        self.browser, self.keys = browser, Keys
        self.wait = WebDriverWait(browser, SECONDS, poll_frequency=0.05)
        browser.get(url)

    def one(self, selector: str) -> Any:
        return self.browser.find_element("css selector", selector)

    def all(self, selector: str) -> list[Any]:
        return self.browser.find_elements("css selector", selector)

    def until(self, true: Callable[[], Any]) -> Any:
        return self.wait.until(lambda _: true())

    def fill(self, selector: str, text: str) -> None:
        self.one(selector).clear()
        self.one(selector).send_keys(text)

    def status(self) -> str:
        return self.one("#status").text

    def bring_key(self) -> None:
        """Waits until the server has asked for a key, and gives it; the next question takes it."""
        self.until(lambda: "API key" in self.status())
        self.fill("#key", KEY)

    def ask(self, prompt: str, lams: str) -> list[Any]:
        """Compares answers, greedily."""
        self.fill("#prompt", prompt)
        self.fill("#lams", lams)
        self.browser.execute_script("document.querySelector('.settings').open = true")
        self.fill("#temperature", "0")
        self.one("#run").click()
        self.until(lambda: self.status().startswith("Done"))
        return self.all(".answer")

    def complaints(self) -> list[str]:
        """Errors of the console, but for the server's word that a key is missing."""
        lines = [entry["message"] for entry in self.browser.get_log("browser") if entry["level"] == "SEVERE"]
        return [line for line in lines if "401" not in line]


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Page]:
    page = Page(browser, server.url)
    page.bring_key()
    yield page
    assert page.complaints() == []


def asked_directly(server: Server, prompt: str, lam: float) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": prompt}], "intensity": lam, "temperature": 0}
    response = httpx.post(
        f"{server.url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=SECONDS
    )
    return response.raise_for_status().json()


@in_chromium
def test_several_lams_are_answered_side_by_side_with_thoughts_folded(page: Page, server: Server) -> None:
    cards = page.ask(SUM, "0, 0.5, 1")
    assert [card.find_element("css selector", "h2 span").text for card in cards] == ["λ = 0", "λ = 0.5", "λ = 1"]
    for card, lam in zip(cards, (0, 0.5, 1), strict=True):
        wanted = asked_directly(server, SUM, lam)
        message, usage = wanted["choices"][0]["message"], wanted["usage"]
        details = card.find_element("css selector", "details")
        text = card.find_element("css selector", ":scope > .text").text
        assert text == message["content"].strip()
        assert card.find_element("css selector", "small").text == "done"
        assert card.find_element("css selector", ".counts").text.startswith(f"{usage['completion_tokens']} token")
        assert details.is_displayed() == ("reasoning_content" in message)
        if details.is_displayed():
            assert details.get_property("open") is False
            thoughts = usage["completion_tokens_details"]["reasoning_tokens"]
            assert details.find_element("css selector", "summary").text == f"Thought, {thoughts} tokens"
            thought = details.find_element("css selector", ".thought")
            assert not thought.is_displayed()
            details.find_element("css selector", "summary").click()
            assert thought.is_displayed()
            assert thought.get_property("textContent").strip() == message["reasoning_content"].strip()
    assert cards[2].find_element("css selector", "details").is_displayed()
    assert "tokens/s" in cards[2].find_element("css selector", ".counts").text


@in_chromium
def test_an_answer_is_turned_and_wrapped_up_while_it_streams(browser: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a slider, with the keyboard, and by a button; both go when the answer has ended. The server waits for us."""
    steps = Semaphore(8)
    with running() as server, ExitStack() as after:
        after.callback(steps.release, 10_000)
        forward = server.engine.model.lm_head.forward

        def slowed(*arguments: Any, **options: Any) -> Any:
            assert steps.acquire(timeout=3 * SECONDS)
            return forward(*arguments, **options)

        monkeypatch.setattr(server.engine.model.lm_head, "forward", slowed)
        page = Page(browser, server.url)
        page.fill("#prompt", HARD)
        page.fill("#lams", "1")
        page.one("#run").click()
        page.until(lambda: page.all(".answer details:not([hidden])"))
        [active] = server.app.state.service.active.values()
        guide = active.choices[0].guide
        slider, wrap = page.one(".answer input[type=range]"), page.one(".answer button")
        assert slider.get_property("value") == "1"
        slider.send_keys(page.keys.HOME, page.keys.ARROW_RIGHT)
        page.until(lambda: guide._by_hand == 0.05)
        steps.release(4)
        page.until(lambda: page.one(".answer h2 span").text == "λ = 0.05")
        wrap.click()
        page.until(lambda: guide._wrap_up == 16 or guide.limit is not None)  # at once, or with the next step
        assert not wrap.is_enabled()
        steps.release(10_000)
        page.until(lambda: page.status().startswith("Done"))
        assert not slider.is_displayed()
        assert not wrap.is_displayed()
        assert guide.lams[0] == 1
        assert guide.limit is not None
        assert page.complaints() == []


@in_chromium
def test_a_prompt_that_is_read_at_a_lam_of_its_own_is_read_once(page: Page) -> None:
    """And the page shows how many tokens that saved."""
    cards = page.ask(HARD, "0.1, 0.6, 1.1")
    assert page.status() == "Done"  # each prompt was read at the λ of its answer
    assert not page.one("#prompt-slider").is_displayed()
    page.one("#own").click()
    slider = page.one("#prompt-slider")
    slider.send_keys(page.keys.HOME, page.keys.ARROW_RIGHT, page.keys.ARROW_RIGHT)
    assert page.one("#prompt-number").get_property("value") == "0.1"
    cards = page.ask(HARD, "0.2, 0.6, 1.1")
    saved = [
        card.find_element("css selector", ".counts").text.partition(" prompt tokens not read again")[0]
        for card in cards
    ]
    shared = [int(text.rpartition("· ")[2].split(" of ")[0]) for text in saved]
    assert all(count >= 16 for count in shared)  # the first request of this test has read all of it at 0.1
    total = int(page.status().partition("'")[2].split()[0])
    assert page.status() == f"Done: {sum(shared)} of the prompts' {total} tokens did not have to be read"


@in_chromium
def test_one_lam_is_chosen_by_slider_or_number_with_the_keyboard_alone(page: Page) -> None:
    page.one("[name=view][value=compare]").send_keys(page.keys.ARROW_LEFT)
    assert not page.one("#lams").is_displayed()
    slider = page.one("#slider")
    slider.send_keys(page.keys.HOME, page.keys.ARROW_RIGHT)
    assert page.one("#number").get_property("value") == "0.05"
    page.fill("#number", "0.35")
    assert slider.get_property("value") == "0.35"
    page.fill("#prompt", "gcd(84, 36)")
    page.one("#prompt").send_keys(page.keys.CONTROL, page.keys.ENTER)
    page.until(lambda: page.status().startswith("Done"))
    assert [card.text.split("\n")[0] for card in page.all(".answer")] == ["λ = 0.35"]


@in_chromium
@pytest.mark.parametrize(
    ("lams", "complaint"),
    [
        ("0, much", '"much" is neither a number'),
        ("0, Infinity", '"Infinity" is neither a number'),
        ("", "one to six intensities, please, not 0"),
        ("0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6", "one to six intensities, please, not 7"),
    ],
)
def test_what_cannot_be_compared_is_said_and_not_asked(page: Page, lams: str, complaint: str) -> None:
    page.fill("#lams", lams)
    page.one("#run").click()
    page.until(lambda: page.status().startswith(complaint))
    assert not page.all(".answer")


@in_chromium
def test_what_the_server_refuses_is_shown_in_the_answers_place(browser: Any, server: Server) -> None:
    page = Page(browser, server.url)
    page.bring_key()
    page.fill("#lams", "0, 99")
    page.one("#run").click()
    page.until(lambda: page.status() == "1 of 2 answers came to their end")
    assert "intensity must be in -1 to 2 on this server, got 99" in page.all(".answer")[1].text
    assert all("400" in line for line in page.complaints())


@in_chromium
def test_stopping_ends_all_answers_here_and_on_the_server(browser: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a server that takes ten steps, and the next when they have been stopped: before these answers' ends."""
    stopped, steps = Event(), count()
    with running() as server, ExitStack() as after:
        after.callback(stopped.set)
        forward = server.engine.model.lm_head.forward

        def slowed(*arguments: Any, **options: Any) -> Any:
            assert next(steps) < 10 or stopped.wait(3 * SECONDS)
            return forward(*arguments, **options)

        monkeypatch.setattr(server.engine.model.lm_head, "forward", slowed)
        page = Page(browser, server.url)
        page.fill("#prompt", HARD)
        page.fill("#lams", "1, 1.1, 1.2, 1.3, 1.4, 1.5")
        page.one("#run").click()
        page.until(lambda: page.all(".answer details:not([hidden])"))
        page.until(lambda: len(server.engine.rows) == 6)
        page.one("#stop").click()
        page.until(lambda: page.one("#run").is_enabled())
        assert [card.text for card in page.all(".answer small")] == ["stopped"] * 6
        page.until(lambda: not server.engine.rows)
        assert next(steps) <= 11  # all this before another step
        stopped.set()
        page.until(lambda: server.engine.load == Load())
        assert page.complaints() == []


@in_chromium
def test_the_frontier_of_the_pair_is_drawn(page: Page) -> None:
    page.ask("gcd(84, 36)", "0")
    assert page.one("#frontier").is_displayed()
    assert len(page.all("#picture circle")) == len(POINTS)
    rows = [row.text for row in page.all("#points tr")]
    assert rows[1] == "0.25 18.5 (17.5–20.5) 58 (52–64) %"
    heights = [float(circle.get_attribute("cy")) for circle in page.all("#picture circle")]
    assert heights == sorted(heights, reverse=True)  # more accurate, higher up


@contextmanager
def screen(page: Page, width: int, scheme: str) -> Iterator[None]:
    """A screen so many pixels wide, without a scroll bar as on a phone, for people who like it light or dark."""
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": True}
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        yield
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def fits(page: Page, width: int) -> bool:
    """Whether nothing reaches beyond the page's edge, hidden or not."""
    widest = """return Math.max(document.documentElement.scrollWidth,
        ...[...document.querySelectorAll("body *")].map((element) => element.getBoundingClientRect().right))"""
    return page.browser.execute_script(widest) <= width


@in_chromium
@pytest.mark.parametrize(
    ("width", "scheme"),
    [(360, "light"), (1280, "dark"), *slow((360, "dark"), (400, "light"), (400, "dark"), (1280, "light"))],
)
def test_the_page_is_accessible_and_fits(page: Page, width: int, scheme: str) -> None:
    axe = pytest.importorskip("axe_selenium_python").Axe(page.browser)
    with screen(page, width, scheme):
        page.one(".settings").get_property("open") or page.one(".settings summary").click()
        for card in page.ask(SUM, "0, 1"):
            if card.find_element("css selector", "details").is_displayed():
                card.find_element("css selector", "summary").click()
        axe.inject()
        assert axe.report(axe.run()["violations"]) == "Found 0 accessibility violations:"
        assert fits(page, width)
        page.one("[name=view][value=one]").click()
        assert fits(page, width)


@in_chromium
@pytest.mark.parametrize("width", [360, 400, 1280])
def test_the_frontier_is_drawn_as_wide_as_there_is_room_in_letters_of_one_size(page: Page, width: int) -> None:
    with screen(page, width, "light"):
        page.ask("gcd(84, 36)", "0")
        page.until(lambda: page.all("#picture .lam"))
        whole = page.one("#picture").rect
        drawn = page.browser.execute_script("return document.getElementById('picture').viewBox.baseVal.width")
        assert drawn == pytest.approx(whole["width"], abs=1)  # so letters are as large as they were written
        texts = [text.rect for text in page.all("#picture text")]
        assert all(10 < text["height"] < 20 for text in texts)
        for text in texts:
            assert whole["x"] <= text["x"]
            assert text["x"] + text["width"] <= whole["x"] + whole["width"]
        names = page.all("#picture .lam")
        assert {"λ = 0", "λ = 1"} <= {name.text for name in names}
        for one, other in combinations([name.rect for name in names], 2):
            assert (
                one["x"] + one["width"] <= other["x"]
                or other["x"] + other["width"] <= one["x"]
                or (one["y"] + one["height"] <= other["y"] or other["y"] + other["height"] <= one["y"])
            )


@in_chromium
def test_the_tab_s_title_names_the_model(page: Page) -> None:
    page.ask("gcd(84, 36)", "0")
    assert page.browser.title == "shipped · dami playground"


@in_chromium
@pytest.mark.parametrize(
    ("prompt", "known"),
    [
        ("2 + 3 - 10 =", "-5"),
        ("What is this sum: 47 + 38 - 12", "73"),
        ("-4 - 6=", "-10"),
        ("gcd(84, 36)", ""),
        ("In 2024", ""),
        ("3 * 2 + 1 =", ""),
        ("12 * 23 + 1 =", ""),
        ("x - 2 + 3 =", ""),
        ("x -2 + 3 =", ""),
        ("2.5 + 3 =", ""),
        ("5 =", ""),
    ],
)
def test_the_page_knows_the_answer_to_a_sum(page: Page, prompt: str, known: str) -> None:
    page.fill("#prompt", prompt)
    assert page.one("#known").get_property("value") == known


@in_chromium
@pytest.mark.parametrize(
    "known",
    [
        pytest.param(each, marks=[pytest.mark.slow] * (each in ("7", "12")))
        for each in ("73", "7", "two-three", "12", "")
    ],
)
def test_answers_are_judged_where_the_right_one_is_known(page: Page, server: Server, known: str) -> None:
    page.fill("#prompt", SUM)
    assert page.one("#known").get_property("value") == "73"
    said = [asked_directly(server, SUM, lam)["choices"][0]["message"]["content"] for lam in (0, 1)]
    page.fill("#lams", "0, 1")
    page.fill("#temperature", "0")
    page.fill("#known", known)
    page.one("#run").click()
    page.until(lambda: page.status().startswith("Done"))
    wanted = ["✓ right" if last_word(text, known) else f"✗ wrong, the answer is {known}" for text in said]
    assert [each.text for each in page.all(".verdict")] == (wanted if known else ["", ""])
    assert known != "73" or wanted == ["✗ wrong, the answer is 73", "✓ right"]


@in_chromium
def test_the_picture_in_the_docs_is_of_this_page(browser: Any, tmp_path: Path) -> None:
    """Of the shipped pair with its own frontier; `make screenshot` names the file of the docs."""
    model, tokenizer = dami.load_pair(*dami.example_pair(), invariant=True)
    settings = ServiceSettings(name="shipped", default_intensity=0.0, frontier=dict(model.dami_patch.frontier))
    with Running(model, tokenizer, LIMITS, settings) as shipped:
        page = Page(browser, shipped.url)
        page.until(lambda: browser.title.startswith("shipped"))
        with screen(page, 1280, "light"):
            cards = page.ask("53 + 33 + 64 + 75 =", "0, 0.3, 0.6, 1")
            verdicts = [card.find_element("css selector", ".verdict").text for card in cards]
            assert verdicts == ["✗ wrong, the answer is 225", *["✓ right"] * 3]
            cards[3].find_element("css selector", "summary").click()
            page.one(".settings[open] summary").click()
            page.until(lambda: page.all("#picture .lam"))
            shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
        assert page.complaints() == []
    picture = Path(os.environ.get("PLAYGROUND_PICTURE", tmp_path / "playground.png"))
    picture.write_bytes(base64.b64decode(shot["data"]))
    docs = Path(__file__).resolve().parents[3] / "docs/images/playground.png"
    for file in (picture, docs):
        with Image.open(file) as image:
            assert image.width == 1280
            assert image.height > 1000


def test_the_page_needs_no_key_nothing_from_elsewhere_and_no_script_of_others(server: Server) -> None:
    for path, kind in (("/", "text/html"), ("/playground.js", "text/javascript"), ("/playground.css", "text/css")):
        response = httpx.get(server.url + path)
        assert response.status_code == 200
        assert response.headers["content-type"].startswith(kind)
        assert response.headers["content-security-policy"].startswith("default-src 'self';")
    for file in FILES.glob("*.*s"):
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text
        assert "https:" not in text
        assert "innerHTML" not in text


def test_the_frontier_is_the_file_s(server: Server) -> None:
    assert httpx.get(f"{server.url}/v1/frontier").status_code == 401
    response = httpx.get(f"{server.url}/v1/frontier", headers={"Authorization": f"Bearer {KEY}"})
    assert response.json() == {"points": POINTS}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no JSON", "JSONDecodeError"),
        ("[]", "TypeError"),
        ("{}", "KeyError: 'points'"),
        ('{"points": []}', "got one without points"),
        ('{"points": [{"intensity": 0}]}', "KeyError: 'accuracy'"),
        ('{"points": [{"intensity": 0, "accuracy": [1], "tokens": [1, 2, 3]}]}', "got the point"),
        ('{"points": [{"intensity": "0", "accuracy": [0, 0, 0], "tokens": [1, 2, 3]}]}', "got the point"),
    ],
)
def test_a_frontier_of_another_kind_is_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "frontier.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"must be a frontier.json of dami evaluate.*{message}"):
        read_frontier(path)


def test_a_frontier_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "frontier.json"
    path.write_text(json.dumps({"points": POINTS, "questions": 5}))
    assert read_frontier(path) == {"points": POINTS, "questions": 5}
