"""What a report shows, of results that are made up: good, bad, exact, without a number."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from pi0.engines.threshold import Threshold
from pi0.figures import RED, to_svg
from pi0.verify import error_axis, plots
from pi0.verify.action_plots import plot_differences
from pi0.verify.compare import Comparison, compare
from pi0.verify.report import (
    Header,
    outcome,
    part_verdicts,
    to_data,
    to_html,
    verdict,
    worst_of_blocks,
)
from pi0.verify.rows import Row
from pi0.verify.run import VerifyResult

LIMIT = Threshold(0.999, 3e-2, "made up", 1e-3)
EXACT = Threshold(0.999999, 0.0, "made up")
GOOD = Comparison(0.99995, 0.99995, 1e-2, 0.1, None)
ZERO = Comparison(1 - 1e-16, 1.0, 0.0, 0.0, None)
LOW_PCC = Comparison(0.9912, 0.9912, 5.6e-3, 0.1, None)
LARGE_GAIN = Comparison(0.9995, 0.9995, 5e-3, 0.1, None, 4e-3)
LARGE_L2 = Comparison(0.9995, 0.9995, 5.6e-2, 0.1, None)
NAN = compare(torch.tensor([1.0, 2.0]), torch.tensor([1.0, float("nan")]))
HEADER = Header(
    "ckpt", "reference:float32", "cpu:int8", "chained", "3 cameras", "lerobot", "", True
)
VOID = {"area", "br", "hr", "img", "input", "link", "meta", "use"}


def result(*comparisons: Comparison, cases: int = 2, blocks: int = 3) -> VerifyResult:
    """Rows of every kind; the comparisons take turns in the stages."""
    turns = itertools.cycle(comparisons)
    names = [f"case {i}" for i in range(cases)]
    stages = ("vision_tower", "prefix", "velocity", "actions", "sample")
    rows = [
        Row(case, stage, next(turns), LIMIT, 1.0, 2.0, part)
        for part in ("structure", "chained")
        for case in names
        for stage in stages
    ]
    for case in names:
        for i in range(blocks):
            for part in ("", ".keys", ".values"):
                name = f"vlm_transformer.block.{i}{part}"
                rows.append(Row(case, name, next(turns), LIMIT, 1.0, 2.0))
        rows += [Row(case, f"velocity.{i}", next(turns), LIMIT, 0, 0) for i in range(4)]
        rows.append(Row(case, "masked_content.candidate", ZERO, EXACT, 0, 0))
        rows += [Row(case, f"oracle.velocity.{i}", GOOD, LIMIT, 0, 0) for i in range(4)]
        rows.append(Row(case, "oracle.actions", GOOD, LIMIT, 0, 0))
    torch.manual_seed(0)
    a = torch.randn(1, 50, 12)
    error = 0 if comparisons == (ZERO,) else 1e-3
    actions = {case: (a, a + error * torch.randn(1, 50, 12)) for case in names}
    if any(c.fault for c in comparisons):
        actions[names[0]][1][:] = float("nan")
        if cases > 1:
            actions[names[1]][1][0, 3, 4] = float("nan")
    return VerifyResult("chained", rows, actions, {})


RESULTS = {
    "good": result(GOOD),
    "failing": result(GOOD, LOW_PCC, LARGE_L2),
    "nan": result(NAN),
    "some nan": result(GOOD, NAN, ZERO),
    "zero": result(ZERO),
    "one case": result(GOOD, ZERO, cases=1),
    "many cases": result(GOOD, LARGE_L2, cases=7, blocks=27),
    "no blocks": result(GOOD, blocks=0),
}


class Page(HTMLParser):
    """Text, ids and tags that were not closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in ("src", "href", "xlink:href"):
                self.links.append(str(value))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())


@pytest.mark.parametrize("name", [name for name in RESULTS if name != "good"])
def test_page_is_valid_and_needs_nothing_else(name: str) -> None:
    """Warnings are errors here, also those of matplotlib about empty data."""
    html = to_html(HEADER, RESULTS[name])
    page = Page(html)
    assert not page.open
    assert len(page.ids) == len(set(page.ids))
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids), "no outside request"
    assert not re.search(r"@import|url\((?!#)", html)
    assert html.count("<svg") == (5 if name == "no blocks" else 6)
    for text in ("relative L2 error", "1 − PCC", "|gain − 1|", "denoising step"):
        assert text in page.words
    assert ("block" in page.words) == (name != "no blocks")
    assert "ms reference:float32" in page.words
    assert "ms cpu:int8" in page.words


def test_figures_are_the_same_each_time() -> None:
    first, second = (to_svg(plots.plot_stages(RESULTS["failing"].rows), "x") for _ in range(2))
    assert first == second


def test_names_of_cases_and_checkpoints_are_text() -> None:
    case = "<b>_$x{ & 抓.npz"
    row = Row(case, "velocity", GOOD, LIMIT, 0, 0)
    a = torch.randn(1, 5, 2)
    header = Header(case, "a:float32", "a:float32", "chained", "", "none", "", False)
    html = to_html(header, VerifyResult("chained", [row], {case: (a, a + 1)}, {}))
    assert "<b>" not in html
    page = Page(html)
    assert case in page.words
    assert "ms a:float32 (reference)" in page.words, "no two columns of the same name"
    assert "ms a:float32 (candidate)" in page.words


def test_a_failure_says_which_limit_fell_with_both_numbers() -> None:
    fallen = {
        "low PCC": Row("c", "s", LOW_PCC, LIMIT, 0, 0),
        "large L2": Row("c", "s", LARGE_L2, LIMIT, 0, 0),
        "both": Row("c", "s", Comparison(0.5, 0.5, 1.0, 1.0, None), LIMIT, 0, 0),
        "nan": Row("c", "s", NAN, LIMIT, 0, 0),
        "gain": Row("c", "s", LARGE_GAIN, LIMIT, 0, 0),
    }
    assert {name: outcome(row) for name, row in fallen.items()} == {
        "low PCC": "FAILS PCC",
        "large L2": "FAILS L2",
        "both": "FAILS PCC and L2",
        "nan": "FAILS",
        "gain": "FAILS gain",
    }
    assert fallen["gain"].exceeded == ["gain off by +4.00e-03 (limit: at most 1.00e-03)"]
    assert fallen["low PCC"].exceeded == ["PCC 0.9912 (limit: at least 0.999)"]
    assert fallen["large L2"].exceeded == ["relative L2 5.60e-02 (limit: at most 3.00e-02)"]
    assert len(fallen["both"].exceeded) == 2
    assert fallen["nan"].exceeded == ["candidate has 1 NaN or infinite values"]


def test_verdict() -> None:
    assert verdict(HEADER, RESULTS["good"]) == "agree: all 58 comparisons are within their limits"
    row = Row("c", "suffix", GOOD, LIMIT, 0, 0)
    alone = verdict(replace(HEADER, judged=False), VerifyResult("chained", [row], {}, {}))
    assert alone.endswith("within their limits; no independent implementation was compared")
    assert verdict(HEADER, RESULTS["failing"]) == (
        "FAILS first at prefix (case 0): PCC 0.9912 (limit: at least 0.999)"
    )
    nan = torch.tensor([1.0, float("nan")])
    broken = Row("c", "suffix", compare(nan, nan), LIMIT, 0, 0)
    assert verdict(HEADER, VerifyResult("chained", [broken], {}, {})).endswith(
        "The reference itself is not finite: the checkpoint is damaged."
    )
    assert to_data(HEADER, RESULTS["failing"])["first_failure"] == "prefix (case 0)"


def test_two_verdicts() -> None:
    good = replace(RESULTS["good"], structure="cpu:float32")
    computation, rounding = part_verdicts(HEADER, good)
    assert computation == (
        "same computation (cpu:float32, each stage on the reference's input): all 10 comparisons "
        "are within their limits"
    )
    assert rounding.startswith("rounding of cpu:int8: all ")
    wrong = [Row("c", "prefix", LARGE_L2, LIMIT, part="chained"), *good.rows]
    computation, rounding = part_verdicts(HEADER, replace(good, rows=wrong, structure=None))
    assert computation.startswith("same computation: not tested apart from rounding, because")
    assert rounding == (
        "rounding of cpu:int8: FAILS first at prefix (c): relative L2 5.60e-02 (limit: at most "
        "3.00e-02)"
    )


def test_the_block_nearest_to_its_limit_stands_for_all() -> None:
    rows = [
        Row("c", f"vlm_transformer.block.{i}.keys", comparison, LIMIT)
        for i, comparison in enumerate((GOOD, LARGE_L2, ZERO))
    ]
    assert [row.name for row in worst_of_blocks(rows)] == ["vlm_transformer.block.1.keys"]


def test_zero_and_no_number_have_rows_of_their_own() -> None:
    axis = error_axis.ErrorAxis.of([0.0, 1e-17, 2e-3, float("nan"), 3e-2], rounding=1e-9)
    assert (axis.low, axis.high) == (pytest.approx(1e-3), pytest.approx(0.1))
    assert axis.place(2e-3) == 2e-3
    assert 1e-4 < axis.place(0.0) == axis.place(1e-17) < 1e-3, "it does not squeeze the decades"
    assert axis.place(float("nan")) > 0.1
    assert error_axis.REL_L2.rounding == 0, "what must not move a single bit"
    svg = to_svg(plots.plot_stages(RESULTS["some nan"].rows), "x")
    assert ">no number<" in svg
    assert ">0<" in svg
    good = to_svg(plots.plot_velocities(RESULTS["good"].rows), "x")
    assert ">no number<" not in good
    assert ">0<" in good  # the first step


def test_failing_marks_are_red_and_labelled() -> None:
    for name, shown in (("good", False), ("failing", True)):
        top, bottom, _ = plots.plot_stages(RESULTS[name].rows).axes
        for axes, numbers in ((top, "5.6e-02\n> 3e-02"), (bottom, "0.991200\n< 0.999")):
            red = [line for line in axes.lines if line.get_color() == RED]
            assert bool(red) == shown
            assert (numbers in [text.get_text() for text in axes.texts]) == shown


def test_cases_differ_in_colour_marker_and_place() -> None:
    styles = error_axis.case_styles(RESULTS["many cases"].rows)
    assert len({(style.colour, style.marker) for style in styles.values()}) == 7
    top, *_ = plots.plot_stages(RESULTS["good"].rows).axes
    marks = [line for line in top.lines if line.get_marker() in ("o", "s")]
    first, second = (next(m for m in marks if m.get_marker() == marker) for marker in "os")
    assert first.get_color() != second.get_color()
    assert not set(first.get_xdata()) & set(second.get_xdata())


def test_last_keys_that_stand_for_a_stage_are_shown_among_stages() -> None:
    rows = [Row("c", f"vlm_transformer.block.7.{n}", GOOD, LIMIT, 0, 0) for n in ("keys", "values")]
    assert plots.plot_blocks(rows) is None
    svg = to_svg(plots.plot_stages(rows), "x")
    assert ">vlm_transformer.block.7.keys<" in svg


def test_oracle_and_masked_content_are_drawn() -> None:
    rows = RESULTS["good"].rows
    stages = to_svg(plots.plot_stages(rows), "x")
    assert ">masked_content.candidate<" in stages
    assert ">oracle.actions<" in stages
    assert ">oracle against reference<" in to_svg(plots.plot_velocities(rows), "x")


def test_the_worst_actions_are_shown_and_said_to_be_no_numbers() -> None:
    actions = RESULTS["some nan"].actions
    figure = plot_differences(actions, error_axis.case_styles(RESULTS["some nan"].rows))
    assert [axes.get_title(loc="right") for axes in figure.axes].count(error_axis.NO_NUMBER) == 8
    one = {"case 0": (torch.zeros(1, 4, 9), torch.eye(9)[:4][None] * torch.arange(9))}
    figure = plot_differences(one, {"case 0": error_axis.Style("#000000", "o")})
    assert [axes.get_title(loc="left") for axes in figure.axes][-1] == "action 7"


def test_in_a_browser(tmp_path: Path) -> None:
    """Nothing but the frames of figures and table scrolls sideways on a phone."""
    browser = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None
    )
    if browser is None:
        pytest.skip("needs Chromium")
    page, picture = tmp_path / "page.html", tmp_path / "page.png"
    script = (
        "<script>document.title = document.documentElement.scrollWidth > innerWidth;"
        "if (document.documentElement.scrollWidth > innerWidth)"
        " document.body.style.background = 'red';</script>"
    )
    page.write_text(to_html(HEADER, RESULTS["failing"]) + script, encoding="utf-8")
    words = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    words += ["--window-size=400,900", f"--user-data-dir={tmp_path}", f"--screenshot={picture}"]
    try:
        subprocess.run([*words, page.as_uri()], check=True, capture_output=True, timeout=120)
    except (subprocess.SubprocessError, OSError) as error:
        pytest.skip(f"Chromium does not run here: {error}")
    with Image.open(picture) as image:
        assert image.convert("RGB").getpixel((2, 2)) == (255, 255, 255)
