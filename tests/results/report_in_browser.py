"""The report in a real browser: it draws, plays, obeys the keyboard, fits a phone, and runs nothing but its own script.

make test-report        screenshots go to $SCREENSHOTS, if that names a folder
"""

import os
import time
from pathlib import Path

import pytest
from browser import Browser
from sample_report import EVIL, made

from apprentice.results import report


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return made(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def page(data, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(report.page(data))
    return file


@pytest.fixture(scope="module")
def chromium():
    with Browser() as browser:
        yield browser


@pytest.fixture
def browser(chromium, page):
    """The page as just opened on a desktop."""
    chromium.size(1280, 900)
    chromium.scheme("light")
    chromium.problems.clear()
    chromium.requests.clear()
    chromium.open(page)
    chromium.evaluate("document.activeElement.blur()")
    chromium.evaluate("document.getElementById('replay').scrollIntoView({behavior: 'instant'})")
    yield chromium
    assert chromium.problems == []


def now(browser) -> int:
    return int(browser.evaluate("document.getElementById('scrub').value"))


def text(browser, selector: str) -> str:
    return browser.evaluate(f"document.querySelector({selector!r}).textContent")


def click(browser, selector: str) -> None:
    """With the mouse, where it is on the screen."""
    at = browser.evaluate(
        f"(() => {{ const box = document.querySelector({selector!r}).getBoundingClientRect();"
        "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
    )
    for kind in ("mousePressed", "mouseReleased"):
        browser.call("Input.dispatchMouseEvent", type=kind, x=at[0], y=at[1], button="left", clickCount=1)


def choose(browser, field: str, value: int) -> None:
    browser.evaluate(f"{field}.value = {value}; {field}.dispatchEvent(new Event('change'))")


def test_it_opens_from_disk_and_asks_for_nothing_else(browser, page):
    assert {request for request in browser.requests if not request.startswith("data:")} == {page.resolve().as_uri()}
    assert "of Crafter’s achievements" in text(browser, "h1")


def test_every_section_is_drawn(browser, data):
    assert browser.evaluate("document.querySelectorAll('#results-table tbody tr').length") == len(data["agents"])
    assert browser.evaluate("document.querySelectorAll('#bars tbody tr').length") == 22
    assert browser.evaluate("document.querySelectorAll('#tree g').length") == 22
    assert browser.evaluate("document.querySelectorAll('#curves figure').length") >= 5
    assert browser.evaluate("document.querySelectorAll('#agreement tbody tr').length") == 4
    assert browser.evaluate("document.querySelectorAll('#times tbody tr').length") == 1 + len(data["times"])
    assert browser.evaluate("document.querySelectorAll('#published-table tbody tr').length") == 26
    assert "published" in text(browser, "#published-table th")
    rows = text(browser, "#published-table tbody")
    assert "temperature 0.0" in rows and "BALROG in Zhou 2026, 2026-08, second-hand" in rows
    assert not browser.evaluate("document.body.innerText.match(/undefined|NaN|\\[object/)")


def test_it_says_of_what_run_it_is(browser):
    said = "Profile tiny. Run until 2026-11-26 at commit 1234567, on 2 cores of Abacus 9."
    assert text(browser, "#facts") == said


def test_toy_results_say_so_first(browser, data, tmp_path):
    file = tmp_path / "toy.html"
    file.write_text(report.page(data | {"facts": data["facts"] | {"toy": True}}))
    browser.open(file)
    assert "mean nothing" in text(browser, "h1")


def test_every_curve_has_both_axes_named_and_rl_is_by_iteration(browser):
    figures = browser.evaluate(
        "[...document.querySelectorAll('#curves figure')].map((one) => [one.querySelector('figcaption').textContent,"
        "...[...one.querySelectorAll('svg > text')].map((text) => text.textContent).slice(-2)])"
    )
    for title, across, up in figures:
        assert up and across == (
            "iteration" if title.startswith("RL") else "round" if "teacher" in title else "optimizer step"
        )


def test_few_worlds_are_one_sentence(browser):
    assert browser.evaluate("document.querySelectorAll('.warnings p').length") == 1
    assert "3 worlds are too few" in text(browser, ".warnings")


def test_the_last_agents_best_and_median_worlds_are_offered_to_watch(browser):
    offered = browser.evaluate("[...document.querySelectorAll('#watch button')].map((one) => one.textContent)")
    assert "Watch the best world of sft" in offered and "Watch the median world of sft" in offered
    browser.evaluate(
        "[...document.querySelectorAll('#watch button')].find((one) => /best/.test(one.textContent)).click()"
    )
    chosen = browser.evaluate("document.getElementById('world').selectedOptions[0].textContent")
    assert "the best of sft" in chosen


def test_what_a_model_writes_is_shown_and_never_run(browser, data):
    """It stands there letter by letter; no element comes of it, and no script has run."""
    said = set()
    for _ in range(len(EVIL) + 1):
        said.add(browser.evaluate("document.querySelector('pre.reply').textContent"))
        browser.press("ArrowRight")
    for words in EVIL:
        assert any(words in one for one in said), words
    assert browser.evaluate("window.hacked === undefined")
    assert browser.evaluate("document.querySelectorAll('script, iframe, main img').length") == 2  # both are ours
    assert browser.evaluate("document.querySelectorAll('pre *').length") == 0


def test_a_script_that_got_in_would_not_run(browser):
    """Even then: the policy lets none run but ours."""
    browser.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.hacked = 8'}))"
    )
    assert browser.evaluate("window.hacked === undefined")
    browser.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hacked = 9\">')")
    time.sleep(0.5)
    assert browser.evaluate("window.hacked === undefined")
    assert any("Content Security Policy" in problem for problem in browser.problems)
    browser.problems.clear()


def test_keys_step_jump_and_play(browser):
    assert now(browser) == 0
    browser.press("ArrowRight")
    assert now(browser) == 1
    browser.press("ArrowRight", shift=True)
    assert now(browser) == 11
    browser.press("ArrowLeft")
    assert now(browser) == 10
    browser.press("End")
    assert now(browser) == int(browser.evaluate("document.getElementById('scrub').max"))
    browser.press("Home")
    assert now(browser) == 0
    browser.press(" ")
    time.sleep(1.5)
    assert text(browser, "#play") == "Pause" and now(browser) >= 1
    browser.press(" ")
    at = now(browser)
    time.sleep(0.5)
    assert text(browser, "#play") == "Play" and now(browser) == at


def test_buttons_and_the_slider_do_the_same(browser):
    click(browser, "#forward")
    click(browser, "#forward")
    click(browser, "#back")
    assert now(browser) == 1
    click(browser, "#last")
    assert text(browser, "#clock").startswith(f"step {now(browser)} of")
    click(browser, "#first")
    assert now(browser) == 0
    click(browser, "#play")
    time.sleep(1.5)
    click(browser, "#play")
    assert now(browser) >= 1
    browser.evaluate(
        "scrub = document.getElementById('scrub'); scrub.value = 7; scrub.dispatchEvent(new Event('input'))"
    )
    assert "step 7 of" in text(browser, ".state")


def test_every_control_can_be_reached_with_the_tab_key(browser):
    reached = set()
    for _ in range(40):
        browser.press("Tab")
        reached.add(browser.evaluate("document.activeElement.id"))
    assert {"world", "left", "right", "first", "back", "play", "forward", "last", "speed", "scrub"} <= reached


def test_two_agents_are_side_by_side_on_the_same_world(browser, data):
    worlds = data["replays"]["worlds"]
    assert browser.evaluate("[...document.querySelectorAll('.panel h3')].map((one) => one.textContent)") == [
        "sft",
        "expert",
    ]
    browser.press("ArrowRight")
    frames = browser.evaluate(
        "[...document.querySelectorAll('canvas')].map((one) => "
        "[...one.getContext('2d').getImageData(0, 0, 72, 72).data].reduce((sum, value) => sum + value, 0))"
    )
    assert len(frames) == 2 and min(frames) > 72 * 72 * 255, "a picture is black"
    choose(browser, "right", -1)
    assert browser.evaluate("document.querySelectorAll('.panel').length") == 1
    choose(browser, "world", len(worlds) - 1)
    assert now(browser) == 0


def test_rollouts_show_the_advantage_of_each_decision(browser, data):
    place = next(place for place, world in enumerate(data["replays"]["worlds"]) if "rollouts" in world)
    choose(browser, "world", place)
    browser.press("ArrowRight")
    columns = data["replays"]["worlds"][place]["episodes"][0]["columns"]
    assert f"advantage +{columns['advantage'][1]:.2f}" in text(browser, ".did")
    assert browser.evaluate("document.querySelectorAll('svg.advantage')[0].children.length") == 1 + len(columns["step"])


def test_the_end_says_how_it_ended(browser):
    browser.press("End")
    assert "time is up" in text(browser, ".state") or "died" in text(browser, ".state")


@pytest.mark.parametrize("width", [320, 390, 768])
def test_a_phone_never_scrolls_sideways(browser, width):
    browser.size(width, 844, phone=True)
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.evaluate("innerWidth") == width
    # What can be touched is large enough for it.
    assert browser.evaluate("[...document.querySelectorAll('button, select')].every((one) => one.offsetHeight >= 36)")


def test_a_phone_cuts_no_rate_and_hides_no_column_without_a_cue(browser):
    browser.size(390, 844, phone=True)
    time.sleep(0.3)
    for table in ("#results-table", "#claims"):
        right = browser.evaluate(
            f"Math.max(...[...document.querySelectorAll('{table} .drawn')]"
            ".map((one) => one.getBoundingClientRect().right))"
        )
        assert 0 < right <= 390
    without = browser.evaluate(
        "[...document.querySelectorAll('.scroll')].filter((one) => one.scrollWidth > one.clientWidth + 1 &&"
        "(one.previousElementSibling.hidden || !one.classList.contains('more'))).length"
    )
    assert without == 0
    assert browser.evaluate("document.querySelectorAll('.scroll.more').length") > 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(browser, scheme):
    """WCAG's contrast of 4.5 for text, soft text and links on the page's ground."""
    browser.scheme(scheme)
    contrasts = browser.evaluate(
        """(() => {
          const canvas = document.createElement('canvas').getContext('2d');
          const light = (color) => {
            canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
            const part = (value) => (value /= 255) <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
            const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map(part);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const style = getComputedStyle(document.documentElement);
          const value = (name) => light(style.getPropertyValue(name));
          const ground = value('--paper');
          return ['--ink', '--soft', '--accent', '--good', '--bad'].map((name) =>
            (Math.max(value(name), ground) + 0.05) / (Math.min(value(name), ground) + 0.05));
        })()"""
    )
    assert min(contrasts) >= 4.5, contrasts


def test_screenshots_are_made_to_be_looked_at(browser, tmp_path):
    folder = Path(os.environ.get("SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    for name, scheme, width, height, phone in (
        ("light", "light", 1280, 900, False),
        ("dark", "dark", 1280, 900, False),
        ("phone", "light", 390, 844, True),
    ):
        browser.size(width, height, phone)
        browser.scheme(scheme)
        browser.screenshot(folder / f"{name}.png")
        assert (folder / f"{name}.png").stat().st_size > 50_000
    browser.size(1280, 900)
    browser.screenshot(folder / "replay.png", "#replay")
