# SPDX-License-Identifier: Apache-2.0
"""The report's page in a real browser: on a phone, on a desk, in the dark and on paper, and by axe-core's rules."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from matplotlib.image import imread
from playwright.sync_api import Browser, Page, sync_playwright

import cwndtrace
from cwndtrace.report import content
from cwndtrace.report.page import page
from tests.unit import frames
from tests.unit.test_hostile_names import NAMES
from tests.unit.test_hostile_names import hostile as named
from tests.unit.test_report import hostile, story

SAMPLE = Path(__file__).parents[1] / "data" / "sample.cwnd"
PHONE, DESK, PAPER = 375, 1280, 718
"""Widths in CSS pixels; the last is A4 with margins of a centimetre."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        pytest.skip("needs a browser without a screen: make develop, or sudo apt install chromium")
    quiet = ["--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        # A browser's own sandbox refuses to run as root.
        sandbox = os.geteuid() != 0
        started = playwright.chromium.launch(executable_path=found, chromium_sandbox=sandbox, args=quiet)
        yield started
        started.close()


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("sample"), page(content.report(cwndtrace.load(SAMPLE))))


def written(folder: Path, text: str) -> Path:
    (folder / "a.html").write_text(text, encoding="utf-8")
    return folder / "a.html"


@contextmanager
def opened(browser: Browser, file: Path, width: int = DESK, **options: Any) -> Iterator[Page]:
    with browser.new_context(viewport={"width": width, "height": 900}, **options) as context:
        shown = context.new_page()
        shown.goto(file.as_uri())
        yield shown


def overflow(shown: Page) -> float:
    """CSS pixels by which the page is wider than what shows it."""
    return float(shown.evaluate("document.documentElement.scrollWidth - innerWidth"))


# ---- its script -------------------------------------------------------------------------------------


def test_its_script_runs_and_sorts(browser: Browser, tmp_path: Path) -> None:
    trace = story(tmp_path / "a.cwnd")
    with opened(browser, written(tmp_path, page(content.report(trace)))) as shown:
        head = shown.locator("#connections th button", has_text="Lost")
        head.click()
        head.click()
        cells = shown.locator("#connections tbody tr td:nth-child(5)").all()
        assert [float(str(cell.get_attribute("data-sort"))) for cell in cells] == pytest.approx(
            sorted(trace.summary()["lost_us"])
        )
        assert shown.locator("#connections th[aria-sort=ascending]").inner_text().startswith("Lost")


def test_the_page_alone_runs(browser: Browser, tmp_path: Path) -> None:
    text = page(content.report(hostile(tmp_path / "a.cwnd")))
    evil = "<base href='https://example.org/'><form action='/'></form><script>document.title = 'owned'</script>"
    with opened(browser, written(tmp_path, text.replace("</body>", f"{evil}</body>"))) as shown:
        assert "owned" not in shown.title()
        assert shown.locator("th button", has_text="Remedy").count() == 1
        assert shown.evaluate("document.baseURI").startswith("file:")


# ---- what it looks like -----------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_axe_finds_nothing(browser: Browser, sample: Path, width: int, scheme: str) -> None:
    # Its script isn't the page's own.
    with opened(browser, sample, width, color_scheme=scheme, bypass_csp=True) as shown:
        found = Axe().run(shown).response["violations"]
    assert [(v["impact"], v["id"], v["nodes"][0]["html"]) for v in found] == []


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_nothing_sticks_out_and_verdicts_have_room(browser: Browser, sample: Path, width: int) -> None:
    with opened(browser, sample, width) as shown:
        assert overflow(shown) <= 0
        verdicts = shown.locator("td.verdict").all()
        assert len(verdicts) == 9
        for verdict in verdicts:
            box = verdict.bounding_box()
            assert box
            assert box["width"] > 180
            # In view without scrolling.
            assert box["x"] + box["width"] <= width
        lines = "e => Math.round(e.getBoundingClientRect().height / parseFloat(getComputedStyle(e).lineHeight))"
        assert all(verdict.locator(".v").evaluate(lines) <= 2 for verdict in verdicts)
        for region in shown.locator(".scroll").all():
            region.focus()
            assert region.evaluate("e => e === document.activeElement && e.ariaLabel.length > 0")
            assert width == PHONE or region.evaluate("e => e.scrollWidth <= e.clientWidth")


BROKEN_UNITS = r"""() => {
  const broken = [], texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const text = texts.currentNode;
    for (const match of text.data.matchAll(/\d\s(us|ms|s|B|kB|MB|GB|%|segments|round trips?|requests?)(?!\w)/g)) {
      const range = document.createRange();
      range.setStart(text, match.index);
      range.setEnd(text, match.index + match[0].length);
      if (new Set([...range.getClientRects()].map(box => Math.round(box.top))).size > 1) broken.push(match[0]);
    }
  }
  return broken;
}"""


def test_no_unit_stands_alone_on_a_line(browser: Browser, sample: Path) -> None:
    with opened(browser, sample) as shown:
        for width in range(320, 700, 20):
            shown.set_viewport_size({"width": width, "height": 900})
            assert shown.evaluate(BROKEN_UNITS) == []


@pytest.mark.parametrize("name", ["256 bytes of UTF-8", "HTML", "mathtext"])
def test_no_name_makes_it_wider(browser: Browser, name: str, tmp_path: Path) -> None:
    text = page(content.report(named(tmp_path / "a.cwnd", NAMES[name] * 3)))
    with opened(browser, written(tmp_path, text), PHONE) as shown:
        assert overflow(shown) <= 0


@pytest.mark.parametrize("dark", [False, True])
def test_its_pictures_follow_light_and_dark(browser: Browser, tmp_path: Path, dark: bool) -> None:
    file = written(tmp_path, page(content.report(story(tmp_path / "a.cwnd"))))
    with opened(browser, file, 1200, color_scheme="dark" if dark else "light") as shown:
        pixels = imread(BytesIO(shown.screenshot(full_page=True)))[:, :, :3]
    assert (pixels[5, 5].mean() < 0.2) == dark
    # Nearly all of the page is its paper.
    assert (abs(pixels - pixels[5, 5]).max(axis=2) < 0.02).mean() > 0.6
    assert pixels.std() > 0.05


def test_on_paper_it_is_light_and_whole(browser: Browser, sample: Path) -> None:
    with opened(browser, sample, PAPER, color_scheme="dark") as shown:
        shown.emulate_media(media="print", color_scheme="dark")
        assert overflow(shown) <= 0
        # Paper doesn't scroll.
        assert shown.evaluate("[...document.querySelectorAll('.scroll')].every(e => e.scrollWidth <= e.clientWidth)")
        pixels = imread(BytesIO(shown.screenshot(full_page=True)))[:, :, :3]
        assert pixels[5, 5].min() == 1
        assert (pixels.min(axis=2) < 0.2).mean() < 0.1
        printed = shown.pdf(format="A4")
    assert printed.startswith(b"%PDF-")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 8


# ---- what a screen reader says ----------------------------------------------------------------------


def test_pictures_and_regions_are_told_apart(browser: Browser, sample: Path) -> None:
    with opened(browser, sample) as shown:
        for what in ("img => img.alt", "region => region.ariaLabel"):
            selector = "img" if what.startswith("img") else ".scroll"
            texts = shown.eval_on_selector_all(selector, f"all => all.map({what})")
            assert len(texts) > 3
            assert len(set(texts)) == len(texts)
            assert all(texts)
        assert shown.locator("main").count() == 1
        assert shown.locator("th:not([scope])").count() == 0


def test_one_is_one(browser: Browser, tmp_path: Path) -> None:
    seen = [frames.snapshot(t, bytes_sent=40_100_000 + t * 100_000) for t in (0, 9)]
    resets, blocks = frames.table("cwnd_reset", frames.reset(5)), frames.table("block_io", frames.block(1))
    trace = frames.capture(tmp_path / "a.cwnd", resets=resets, connections=frames.snapshots(*seen), block_io=blocks)
    with opened(browser, written(tmp_path, page(content.report(trace)))) as shown:
        text = shown.inner_text("body") + " ".join(shown.eval_on_selector_all("img", "all => all.map(i => i.alt)"))
    assert "with 1 reset" in text
    assert "of 1 request" in text
    many = "requests|resets|connections|segments|bursts|records|times|block I/Os|snapshots|recoveries"
    assert re.findall(rf"(?<![\d.,:])1\s(?:more )?(?:{many})", text) == []
