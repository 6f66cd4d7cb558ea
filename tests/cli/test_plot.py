"""The plot of a chunk, whatever the prompt, the names and the numbers are."""

from __future__ import annotations

import warnings
from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest
from PIL import Image

from pi0.cli.plot import plot_chunk

CHUNK = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[matplotlib.figure.Figure]:
    """The figures that were saved."""
    figures: list[matplotlib.figure.Figure] = []
    savefig = matplotlib.figure.Figure.savefig

    def keep(figure: matplotlib.figure.Figure, *args: object, **options: object) -> None:
        figures.append(figure)
        savefig(figure, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    return figures


def titles(figure: matplotlib.figure.Figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes if axes.get_visible()]


@pytest.mark.parametrize(
    "prompt",
    [
        "pick $\\bad{$ up",
        "$$ \\frac{",
        "a\nb\tc\x07\x00\x1b[31m",
        "\ud800 a lone surrogate",
        "put it there " * 300,
        "x" * 4000,
        "امسك المكعب الأحمر",
        "",
    ],
)
def test_any_prompt(tmp_path: Path, prompt: str) -> None:
    """Warnings are errors here."""
    plot_chunk(tmp_path / "chunk.png", CHUNK, prompt, names=["$x_{", "_y", "\\z"])
    with Image.open(tmp_path / "chunk.png") as image:
        assert image.height < image.width < 2000


def test_characters_without_a_font_are_told_once(tmp_path: Path, drawn: list) -> None:
    prompt = "抓取红色方块 " + chr(0x12000) * 3  # cuneiform is hardly ever installed
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plot_chunk(tmp_path / "chunk.png", CHUNK, prompt, names=["抓"])
    if not caught:
        pytest.skip("a font of this machine has all of these characters")
    assert len(caught) == 1
    assert "figure: expected a font that has " in str(caught[0].message)
    assert "□" in drawn[0].get_suptitle()


def test_names_units_and_limits(tmp_path: Path, drawn: list) -> None:
    plot_chunk(
        tmp_path / "chunk.png",
        CHUNK,
        "go",
        names=["pan", "lift"],
        units=["rad", None],
        limits=[(-1.0, 1.0), (None, 1e6)],
        rate_hz=50,
    )
    (figure,) = drawn
    assert titles(figure)[:3] == ["pan (rad)", "lift", "action 2"]
    assert figure.get_suptitle() == "“go”\n50 actions, 1 s at 50 Hz"
    pan, lift, free = figure.axes[:3]
    beyond = {int(x) for line in pan.lines if line.get_marker() == "o" for x in line.get_xdata()}
    assert beyond == set(np.flatnonzero(np.abs(CHUNK[:, 0]) > 1).tolist())
    low, high = lift.get_ylim()
    assert high - low < 10, "a limit far away does not flatten the curve"
    assert len(free.lines) == 1
    assert pan.xaxis.get_major_formatter()(25, 0) == "25\n0.5 s"


def test_constant_columns_are_told_in_one_line(tmp_path: Path, drawn: list) -> None:
    chunk = np.zeros((50, 32), np.float32)
    chunk[:, :6], chunk[:, 6] = CHUNK[:, :6], 1
    plot_chunk(tmp_path / "a.png", chunk, "go")
    plot_chunk(tmp_path / "b.png", chunk, "go", names=[f"joint {i}" for i in range(7)])
    unnamed, named = drawn
    assert titles(unnamed) == [f"action {i}" for i in range(6)]
    assert unnamed.get_supxlabel().endswith(" action 6: 1; actions 7 to 31: 0")
    assert titles(named) == [f"joint {i}" for i in range(7)], "a gripper that rests is shown"
    assert named.get_supxlabel().endswith(" actions 7 to 31: 0")


@pytest.mark.parametrize(
    "chunk",
    [np.full((50, 3), 2.0), np.ones((1, 2)), CHUNK[:, :1] * 1e-6 + 3, CHUNK * 1e30, CHUNK[:2]],
)
def test_odd_chunks(tmp_path: Path, drawn: list, chunk: np.ndarray) -> None:
    plot_chunk(tmp_path / "chunk.png", chunk.astype(np.float32), "go", rate_hz=15)
    assert len(titles(drawn[0])) == chunk.shape[1]


def test_the_lowest_panel_of_each_column_shows_steps(tmp_path: Path, drawn: list) -> None:
    plot_chunk(tmp_path / "chunk.png", CHUNK, "go")
    labelled = [axes.get_title() for axes in drawn[0].axes if axes.get_xlabel() == "step"]
    assert labelled == ["action 3", "action 4", "action 5", "action 6"]
