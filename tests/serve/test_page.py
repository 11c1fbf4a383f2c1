"""The page in headless Chromium: a chat of two turns by keyboard alone, the drafts in it, the race, a small screen.

Truth: plain decoding. Needs playwright and a Chromium (`pip install playwright`; Debian's `chromium`).
"""

import os
import shutil
import time

import pytest

from kangaroo_jax.config import ServeConfig
from tests.bench.models import small_chat_target
from tests.serve.servers import alone, serving

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.long, pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium")]
SECONDS = 120_000  # milliseconds


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        # As root, Chromium has no sandbox.
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = started.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def served():
    with serving(ServeConfig(api_keys=("none",))) as running:
        yield running


@pytest.fixture
def page(browser, served):
    """The page, loaded with the API key; fails where it logs an error or asks another site."""
    page = browser.new_page(viewport={"width": 360, "height": 740})
    page.set_default_timeout(SECONDS)
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: request.url.startswith((served.url, "data:")) or problems.append(request.url))
    page.goto(served.url)
    playwright.expect(page.locator("#error")).to_contain_text("an API key is needed")
    page.click("summary")
    page.fill("#key", "none")
    page.fill("#max-tokens", "40")
    page.keyboard.press("Tab")
    playwright.expect(page.locator("#about")).to_contain_text("small")
    yield page
    page.close()
    assert problems == []


def answer_to(messages):
    options = {"add_generation_prompt": True, "return_dict": False}
    ids = small_chat_target().tokenizer.apply_chat_template(messages, **options)
    return alone(tuple(ids), 40).texts[0]


def without_drafts(page, turn):
    """The text of a turn that is not a rejected draft."""
    return (
        page.locator(".turn .text")
        .nth(turn)
        .evaluate("text => [...text.childNodes].filter(e => e.nodeName !== 'DEL').map(e => e.textContent).join('')")
    )


def test_a_chat_of_two_turns_by_keyboard(page):
    page.focus("#to-chat")
    for _ in range(40):
        if page.evaluate("document.activeElement.id") == "said":
            break
        page.keyboard.press("Tab")
    messages = []
    for turn, said in enumerate(("hello you", "and then")):
        page.keyboard.type(said)
        page.keyboard.press("Enter")
        playwright.expect(page.locator("#send")).to_be_disabled(timeout=SECONDS)
        playwright.expect(page.locator("#send")).to_be_enabled(timeout=SECONDS)
        messages.append({"role": "user", "content": said})
        truth = answer_to(messages)
        assert without_drafts(page, 2 * turn + 1) == truth
        messages.append({"role": "assistant", "content": truth})
        assert page.locator("#tokens").inner_text() == "40"
        assert float(page.locator("#accept").inner_text()) > 1
        assert float(page.locator("#speed").inner_text()) > 0
        assert page.evaluate("document.activeElement.id") == "said"
    kinds = page.evaluate("[...new Set([...document.querySelectorAll('.turn .text *')].map(e => e.className))].sort()")
    assert kinds == ["a", "t", "x"]
    page.uncheck("#rejected")
    assert not page.locator(".turn .x").first.is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.click("#reset")
    assert page.locator(".turn").count() == 0


def test_the_race_shows_the_same_text_twice(page):
    page.click("#to-race")
    page.fill("#prompt", "hello you")
    page.click("#start")
    playwright.expect(page.locator("#replay")).to_be_enabled(timeout=SECONDS)
    assert page.locator("#verdict").inner_text().endswith("times as fast as plain decoding; the same text.")
    for lane in ("plain", "kangaroo"):
        playwright.expect(page.locator(f"#{lane} .figures")).to_contain_text("40 tokens in", timeout=SECONDS)
        assert page.locator(f"#{lane} .text").inner_text() == answer_to([{"role": "user", "content": "hello you"}])
    assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_an_answer_can_be_stopped_and_errors_are_shown(page, served, monkeypatch):
    page.fill("#temperature", "-1")
    page.fill("#said", "hello you")
    page.click("#send")
    playwright.expect(page.locator("#error")).to_contain_text("temperature must be")
    assert page.locator("#said").input_value() == "hello you"
    page.fill("#temperature", "0")
    page.fill("#max-tokens", "600")
    engine = served.server._thread._engines[False]
    step = engine.step

    def slowly():
        time.sleep(0.3)
        return step()

    monkeypatch.setattr(engine, "step", slowly)
    page.click("#send")
    playwright.expect(page.locator(".turn .text").nth(1)).not_to_be_empty(timeout=SECONDS)
    page.click("#stop")
    playwright.expect(page.locator("#send")).to_be_enabled(timeout=SECONDS)
    served.settle()
    assert without_drafts(page, 1)
    assert served.log[-1]["status"] == 499
