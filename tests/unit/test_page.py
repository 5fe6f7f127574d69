# SPDX-License-Identifier: Apache-2.0
"""The report's page in a browser: on a phone, on a desktop, in dark mode and on paper, and by axe-core's rules."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from matplotlib.image import imread
from playwright.sync_api import Browser, Page

import cwndtrace
from cwndtrace.fleet import summary
from cwndtrace.report import content, fleet
from cwndtrace.report.page import page
from tests.harness.browser import chromium
from tests.unit import drawing, fleets, frames, hostile

SAMPLE = Path(__file__).parents[1] / "data" / "sample.cwnd"
PHONE, DESKTOP, PAPER = 375, 1280, 718
"""Widths in CSS pixels; PAPER is A4 with margins of 1 cm."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("sample"), page(content.report(cwndtrace.load(SAMPLE))))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    drawing.leave_undrawn(monkeypatch)


def written(folder: Path, text: str) -> Path:
    (folder / "a.html").write_text(text, encoding="utf-8")
    return folder / "a.html"


@contextmanager
def opened(browser: Browser, file: Path, width: int = DESKTOP, **options: Any) -> Iterator[Page]:
    with browser.new_context(viewport={"width": width, "height": 900}, **options) as context:
        tab = context.new_page()
        tab.goto(file.as_uri())
        yield tab


def overflow(tab: Page) -> float:
    """Return by how many CSS pixels the page is wider than its window."""
    return float(tab.evaluate("document.documentElement.scrollWidth - innerWidth"))


# ---- its script -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_the_script_sorts_the_connections(browser: Browser, tmp_path: Path) -> None:
    trace = frames.two_idle_connections(tmp_path / "a.cwnd")
    with opened(browser, written(tmp_path, page(content.report(trace)))) as tab:
        head = tab.locator("#connections th button", has_text="Cost")
        head.click()
        head.click()
        cells = tab.locator("#connections tbody tr td:nth-child(5)").all()
        assert [float(str(cell.get_attribute("data-sort"))) for cell in cells] == pytest.approx(
            sorted(trace.summary()["lost_us"])
        )
        assert tab.locator("#connections th[aria-sort=ascending]").inner_text().startswith("Cost")


@pytest.mark.usefixtures("undrawn")
def test_scripts_forms_and_bases_that_are_injected_have_no_effect(browser: Browser, tmp_path: Path) -> None:
    text = page(content.report(hostile.everywhere(tmp_path / "a.cwnd")))
    evil = "<base href='https://example.org/'><form action='/'></form><script>document.title = 'owned'</script>"
    with opened(browser, written(tmp_path, text.replace("</body>", f"{evil}</body>"))) as tab:
        assert "owned" not in tab.title()
        assert tab.locator("th button", has_text="Remedy").count() == 1
        assert tab.evaluate("document.baseURI").startswith("file:")


# ---- layout and colours -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_axe_finds_no_violation(browser: Browser, sample: Path, width: int, scheme: str) -> None:
    # The page's policy would block axe-core, which isn't a script of its own.
    with opened(browser, sample, width, color_scheme=scheme, bypass_csp=True) as tab:
        violations = Axe().run(tab).response["violations"]
    assert [(v["impact"], v["id"], v["nodes"][0]["html"]) for v in violations] == []


@pytest.mark.slow
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_the_page_of_a_fleet_is_accessible_sorts_and_does_not_overflow(
    browser: Browser, tmp_path: Path, width: int
) -> None:
    captures = [fleets.capture(f"web{n}", day, day) for n in range(6) for day in (fleets.BEFORE, fleets.AFTER)]
    rows = [
        fleets.harmful(each["host"], each["capture"], 1e6 + n, workload="default/web/" + "long-name" * 9)
        for n, each in enumerate(captures)
    ]
    spaces = [fleets.setting(each["host"], each["capture"], n == 11) for n, each in enumerate(captures)]
    found = summary.report(fleets.fleet(captures, rows, spaces), since=fleets.SINCE)
    with opened(browser, written(tmp_path, fleet.page(found)), width, bypass_csp=True) as tab:
        assert overflow(tab) <= 0
        assert tab.locator("#settings li, #change tbody tr").count() == 2
        violations = Axe().run(tab).response["violations"]
        tab.locator("#by-host th button", has_text="Cost").click()
        costs = [cell.get_attribute("data-sort") for cell in tab.locator("#by-host tbody td:nth-child(6)").all()]
    assert [(v["impact"], v["id"], v["nodes"][0]["html"]) for v in violations] == []
    assert [float(str(cost)) for cost in costs] == [2e6 + 4 * n + 1 for n in range(5, -1, -1)]


@pytest.mark.slow
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_nothing_overflows_and_verdicts_have_room(browser: Browser, sample: Path, width: int) -> None:
    with opened(browser, sample, width) as tab:
        assert overflow(tab) <= 0
        verdicts = tab.locator("td.verdict").all()
        assert len(verdicts) == 8
        for verdict in verdicts:
            box = verdict.bounding_box()
            assert box
            assert box["width"] > 180
            # The verdict is visible without scrolling.
            assert box["x"] + box["width"] <= width
        lines = "e => Math.round(e.getBoundingClientRect().height / parseFloat(getComputedStyle(e).lineHeight))"
        assert all(verdict.locator(".v").evaluate(lines) <= 2 for verdict in verdicts)
        for region in tab.locator(".scroll").all():
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


@pytest.mark.slow
def test_no_line_breaks_between_a_number_and_its_unit(browser: Browser, sample: Path) -> None:
    with opened(browser, sample) as tab:
        for width in range(320, 700, 20):
            tab.set_viewport_size({"width": width, "height": 900})
            assert tab.evaluate(BROKEN_UNITS) == []


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("name", ["256 bytes of UTF-8", "HTML", "mathtext"])
def test_no_name_makes_the_page_wider(browser: Browser, name: str, tmp_path: Path) -> None:
    text = page(content.report(hostile.named(tmp_path / "a.cwnd", hostile.NAMES[name] * 3)))
    with opened(browser, written(tmp_path, text), PHONE) as tab:
        assert overflow(tab) <= 0


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
def test_pictures_follow_light_and_dark_mode(browser: Browser, sample: Path, dark: bool) -> None:
    with opened(browser, sample, 1200, color_scheme="dark" if dark else "light") as tab:
        pixels = imread(BytesIO(tab.screenshot(full_page=True)))[:, :, :3]
    assert (pixels[5, 5].mean() < 0.2) == dark
    # Most of the page is background.
    assert (abs(pixels - pixels[5, 5]).max(axis=2) < 0.02).mean() > 0.6
    assert pixels.std() > 0.05


@pytest.mark.slow
def test_on_paper_the_page_is_light_and_complete(browser: Browser, sample: Path) -> None:
    with opened(browser, sample, PAPER, color_scheme="dark") as tab:
        tab.emulate_media(media="print", color_scheme="dark")
        assert overflow(tab) <= 0
        # Paper doesn't scroll.
        assert tab.evaluate("[...document.querySelectorAll('.scroll')].every(e => e.scrollWidth <= e.clientWidth)")
        pixels = imread(BytesIO(tab.screenshot(full_page=True)))[:, :, :3]
        assert pixels[5, 5].min() == 1
        assert (pixels.min(axis=2) < 0.2).mean() < 0.1
        printed = tab.pdf(format="A4")
    assert printed.startswith(b"%PDF-")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 8


# ---- screen readers ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_pictures_and_regions_have_distinct_labels(browser: Browser, sample: Path) -> None:
    with opened(browser, sample) as tab:
        for label in ("img => img.alt", "region => region.ariaLabel"):
            selector = "img" if label.startswith("img") else ".scroll"
            texts = tab.eval_on_selector_all(selector, f"all => all.map({label})")
            assert len(texts) >= 3
            assert len(set(texts)) == len(texts)
            assert all(texts)
        assert tab.locator("main").count() == 1
        assert tab.locator("th:not([scope])").count() == 0


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_single_item_is_in_the_singular(browser: Browser, tmp_path: Path) -> None:
    seen = [frames.snapshot(t, bytes_sent=40_100_000 + t * 100_000) for t in (0, 9)]
    resets, blocks = frames.table("cwnd_reset", frames.reset(5)), frames.table("block_io", frames.block(1))
    trace = frames.capture(tmp_path / "a.cwnd", resets=resets, connections=frames.snapshots(*seen), block_io=blocks)
    with opened(browser, written(tmp_path, page(content.report(trace)))) as tab:
        text = tab.inner_text("body") + " ".join(tab.eval_on_selector_all("img", "all => all.map(i => i.alt)"))
    assert "with 1 reset" in text
    assert "of 1 request" in text
    many = "requests|resets|connections|segments|bursts|records|times|block I/Os|snapshots|recoveries"
    assert re.findall(rf"(?<![\d.,:])1\s(?:more )?(?:{many})", text) == []
