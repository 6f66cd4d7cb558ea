"""What all figures share: colours, text drawn as it is written, and how they are saved.

Text from users (prompts, joint names, paths) is never read as mathematics, and a character that the
default font lacks is looked for in the fonts of the system.
"""

from __future__ import annotations

import io
import re
import textwrap
import unicodedata
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, RED = "#1a202c", "#718096", "#c53030"
BLUE, ORANGE, GREEN, PURPLE, PINK = "#2b6cb0", "#dd6b20", "#2f855a", "#805ad5", "#d53f8c"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, PINK, "#4a5568")
# For every text that a user wrote: "$" and "\" are characters like others.
VERBATIM: dict[str, Any] = {"parse_math": False, "usetex": False}
MISSING = "□"


def new_figure(width: float, height: float) -> Figure:
    """A figure, sized in inches, whose parts never overlap."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def one_line(text: str) -> str:
    """Text without line breaks, control characters and other characters that no font draws."""
    spaced = " ".join(text.split())
    return "".join(MISSING if unicodedata.category(c) in ("Cc", "Cs", "Cn") else c for c in spaced)


def wrapped(text: str, width: int, lines: int) -> str:
    """Text wrapped to a number of lines and of narrow characters; "…" where it was cut."""
    from rich.cells import cell_len

    text = one_line(text)
    wide = cell_len(text) > 1.2 * len(text)  # Chinese, for instance: two narrow ones each
    return "\n".join(
        textwrap.wrap(text, width // 2 if wide else width, max_lines=lines, placeholder=" …")
    )


@dataclass(frozen=True)
class Lettering:
    """How a figure draws its users' text: the font families, and the characters in none of them."""

    families: tuple[str, ...]
    lacking: frozenset[str]

    def draw(self, text: str) -> str:
        """The text with "□" for what no installed font has."""
        return "".join(MISSING if c in self.lacking else c for c in text)


def lettering(*texts: str) -> Lettering:
    """Fonts for all these texts, those of the system where the default one is not enough.

    What no installed font has is told in one warning.
    """
    from matplotlib import font_manager, rcParams

    families = list(rcParams["font.family"])
    default = font_manager.findfont(font_manager.FontProperties(family=families))
    wanted = {c for text in texts for c in one_line(text) if not c.isspace()}
    lacking = wanted - _characters(default)
    for font in font_manager.fontManager.ttflist if lacking else []:
        # "Last Resort" has a box for every character.
        if font.name not in families and not font.name.startswith("Last Resort"):
            covered = lacking & _characters(font.fname)
            if covered:
                families.append(font.name)
                lacking -= covered
    if lacking:
        warnings.warn(
            f"figure: expected a font that has {''.join(sorted(lacking))}, found none; {MISSING} "
            "stands for these characters. Install one, such as Noto Sans CJK for Chinese.",
            stacklevel=2,
        )
    return Lettering(tuple(families), frozenset(lacking))


def _characters(path: str) -> set[str]:
    """All characters that a font file has; none if it has no outlines (emoji as pictures)."""
    from matplotlib.font_manager import get_font

    try:
        font = get_font(path)
        return {chr(code) for code in font.get_charmap()} if font.scalable else set()
    except (OSError, RuntimeError):  # a file that is damaged or of another kind
        return set()


def bare(axes: Axes, grid: str = "both") -> None:
    """No frame at the top and right, and a faint grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, alpha=0.25)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)


def to_svg(figure: Figure, name: str) -> str:
    """The figure as an <svg> element; the same figure gives the same text.

    Args:
        name: put before every id, so that figures of one page do not share ids.
    """
    import matplotlib

    text = io.StringIO()
    # No date and no random ids; text stays text, which a reader can search and copy.
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", metadata=nothing)
    svg = text.getvalue()[text.getvalue().index("<svg") :]
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    return re.sub(r'(url\(|href=")#', rf"\1#{name}-", svg)
