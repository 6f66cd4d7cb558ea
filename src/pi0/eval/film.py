"""Films of episodes, and a contact sheet of their last pictures.

The sentence is written above every picture; at the end the last one is held for a moment with the
outcome, in its colour.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from pi0.checkpoint.outputs import replacing
from pi0.errors import Pi0Error, install_hint
from pi0.eval.plan import FilmOptions
from pi0.eval.results import Episode
from pi0.eval.rollout import Trial
from pi0.figures import GREEN, INK, ORANGE, RED, one_line

SHEET = "contact-sheet.png"
COLORS = {"success": GREEN, "wrong": ORANGE, "failed": RED}
LEAST_HEIGHT = 240  # pixels; smaller pictures are enlarged, so that the text can be read
HELD_S = 1.5  # seconds of the last picture
THUMBNAIL_WIDTH = 240
BORDER = 6  # pixels in the outcome's colour
SHEET_COLUMNS = 8


def require_encoder(form: str) -> None:
    """Raises Pi0Error if the package for this form of film is not installed."""
    if form == "mp4" and importlib.util.find_spec("av") is None:
        raise Pi0Error(
            f"--video: expected the package av for MP4, found none. {install_hint('sim')} Or use "
            "--video-format gif."
        )


def write_film(options: FilmOptions, trial: Trial, fps: float) -> NDArray[np.uint8]:
    """Writes an episode's film, named by its task and seed.

    Returns:
        The last picture, with sentence and outcome, for the contact sheet: [H, W, 3].

    Raises:
        Pi0Error: the file cannot be written.
    """
    episode = trial.episode
    pictures = [_captioned(frame, episode.prompt, None) for frame in trial.frames]
    last = _captioned(trial.frames[-1], episode.prompt, episode.outcome)
    pictures += [last] * max(1, round(HELD_S * fps))
    task = re.sub(r"[^\w.-]+", "-", episode.task)
    name = f"{task}-{episode.seed}.{options.format}"
    with replacing(options.folder / name) as temporary:
        (_write_mp4 if options.format == "mp4" else _write_gif)(temporary, pictures, fps)
    width = THUMBNAIL_WIDTH
    small = last.resize((width, round(last.height * width / last.width)), Image.Resampling.LANCZOS)
    return np.asarray(small)


def write_sheet(path: Path, pictures: Sequence[tuple[Episode, NDArray[np.uint8]]]) -> None:
    """Writes a PNG with the last picture of each filmed episode, framed in its outcome's colour.

    Raises:
        Pi0Error: the file cannot be written.
    """
    framed = [
        ImageOps.expand(Image.fromarray(picture), BORDER, COLORS[episode.outcome])
        for episode, picture in pictures
    ]
    columns = min(SHEET_COLUMNS, math.ceil(math.sqrt(len(framed))))
    width, height = (max(image.size[axis] for image in framed) + BORDER for axis in (0, 1))
    rows = math.ceil(len(framed) / columns)
    sheet = Image.new("RGB", (columns * width + BORDER, rows * height + BORDER), "white")
    for i, image in enumerate(framed):
        sheet.paste(image, (BORDER + i % columns * width, BORDER + i // columns * height))
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG")


def _captioned(frame: NDArray[np.uint8], prompt: str, outcome: str | None) -> Image.Image:
    """The picture under a bar with the sentence, and the outcome if there is one; of even size, as
    video wants it."""
    picture = Image.fromarray(frame)
    if picture.height < LEAST_HEIGHT:
        factor = math.ceil(LEAST_HEIGHT / picture.height)
        picture = ImageOps.scale(picture, factor, Image.Resampling.NEAREST)
    size = max(12, picture.height // 22)
    font = _font(prompt, size)
    label = outcome or ""
    room = picture.width - 3 * size - font.getlength("success")
    bar = 2 * size
    width, height = picture.width + picture.width % 2, picture.height + bar
    out = Image.new("RGB", (width, height + height % 2), INK)
    out.paste(picture, (0, bar))
    draw = ImageDraw.Draw(out)
    draw.text((size, bar / 2), _fitted(one_line(prompt), font, room), "white", font, anchor="lm")
    if outcome:
        box = (width - 2 * size - font.getlength(label), 0, width, bar)
        draw.rectangle(box, fill=COLORS[outcome])
        draw.text((width - size, bar / 2), label, "white", font, anchor="rm")
        draw.rectangle((0, 0, out.width - 1, out.height - 1), outline=COLORS[outcome], width=3)
    return out


def _font(text: str, size: int) -> Any:
    """Pillow's own font has the letters of English alone; the one in matplotlib's package has those
    of most alphabets."""
    package = importlib.util.find_spec("matplotlib")
    if not text.isascii() and package and package.origin:
        path = Path(package.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf"
        if path.is_file():
            return ImageFont.truetype(str(path), size)
    return ImageFont.load_default(size)


def _fitted(text: str, font: Any, room: float) -> str:
    """The text, cut with "…" where it is longer than the room."""
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(text + "…") > room:
        text = text[:-1]
    return text.rstrip() + "…"


def _write_mp4(path: Path, pictures: list[Image.Image], fps: float) -> None:
    import av

    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", Fraction(fps).limit_denominator(1000))
        stream.width, stream.height = pictures[0].size
        stream.pix_fmt = "yuv420p"  # which every player reads
        for picture in pictures:
            frame = av.VideoFrame.from_image(picture)  # type: ignore[no-untyped-call]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _write_gif(path: Path, pictures: list[Image.Image], fps: float) -> None:
    """Its clock ticks every 10 ms, and browsers show for 100 ms what lasts less than two ticks:
    above 50 pictures a second some are left out."""
    shown, starts = [pictures[0]], [0]
    for number, picture in enumerate(pictures):
        if (start := round(100 * number / fps)) >= starts[-1] + 2:
            shown.append(picture)
            starts.append(start)
    ends = [*starts[1:], max(round(100 * len(pictures) / fps), starts[-1] + 2)]
    milliseconds = [10 * (end - start) for start, end in zip(starts, ends, strict=True)]
    shown[0].save(
        path, format="GIF", save_all=True, append_images=shown[1:], duration=milliseconds, loop=0
    )
