"""Normalisation statistics in openpi's form: where they lie in a checkpoint, and reading them.

A file is `{"norm_stats": {"state": {"mean": […], "std": […], "q01": …, …}, "actions": {…}}}`, under
assets/<robot>/norm_stats.json. Accepted are also files without the outer key, with "action" for
"actions", and in the other places where people keep them.
"""

from __future__ import annotations

import os
import reprlib
from pathlib import Path

import numpy as np

from pi0.checkpoint.files import read_json
from pi0.checkpoint.load import Checkpoint
from pi0.errors import Pi0Error
from pi0.policy.normalize import NEEDED, OPENPI_MODES, Statistics
from pi0.policy.robots import robot_of_assets

FILE_NAME = "norm_stats.json"
PLACES = ("assets/**/", "", "*/", "*/*/")  # in a checkpoint's folder, in this order
READ = {name for names in NEEDED.values() for name in names} | {"q10", "q90"}
NAMES = {"state": ("state", "observation.state"), "actions": ("actions", "action")}


def statistics_folder(checkpoint: Checkpoint) -> Path:
    """The folder whose norm_stats.json counts: an adapter's, or its base's if that has none."""
    return checkpoint.folder_of(*(f"{place}{FILE_NAME}" for place in PLACES))


def stated_mode(checkpoint: Checkpoint) -> str:
    """How openpi's statistics normalise: what `pi0 convert` wrote into the config.json of a
    checkpoint whose LeRobot files did otherwise than openpi, else openpi's way for this model.

    Raises:
        Pi0Error: a mode that openpi does not have.
    """
    usual = OPENPI_MODES[checkpoint.config.adaptive_norm].lower()
    stated = checkpoint.settings.get("norm_mode")
    if stated is None or stated in (*NEEDED,):
        return stated or usual
    raise Pi0Error(
        f"config.json norm_mode: expected one of {', '.join(NEEDED)}, found {stated!r}. Use the "
        "checkpoint that it was converted from, or name a mode with --norm-mode."
    )


def find_origin(checkpoint: Checkpoint, named: Path | str | None) -> str | None:
    """The nearest folder above statistics that names a known robot; None: none does.

    Args:
        named: a file or folder, or "none"; None: the checkpoint's, whose own name tells nothing.
    """
    if named == "none":
        return None
    folder = statistics_folder(checkpoint)
    try:
        path = Path(named).expanduser() if named else find_norm_stats(folder)
    except Pi0Error:  # said where the statistics are read
        return None
    whole = Path(os.path.abspath(path))  # also of `.` and bare names
    parts = whole.parts[-4:] if named else path.relative_to(folder).parts
    return next((part for part in reversed(parts) if robot_of_assets(part)), None)


def list_norm_stats(folder: Path) -> list[Path]:
    """A checkpoint's files of statistics: under assets/, else at its root, else in <a>/<b>/.

    Raises:
        Pi0Error: there is one under assets/, and another in one of the other places.
    """
    places = [sorted(folder.glob(place + FILE_NAME)) for place in PLACES]
    found: list[Path] = next(filter(None, places), [])
    for other in {path: None for hits in places for path in hits if path not in found}:
        if all(read_json(other) != read_json(path) for path in found):
            one, two = (path.relative_to(folder) for path in (found[0], other))
            raise Pi0Error(
                f"statistics: expected one {FILE_NAME} in {folder}, found {one} and {two}, which "
                "differ. Name the one that it was trained with, with --norm-stats."
            )
    return found


def find_norm_stats(folder: Path) -> Path:
    """The only norm_stats.json of a checkpoint.

    Raises:
        Pi0Error: there is none, or more than one.
    """
    found = list_norm_stats(folder)
    if len(found) == 1:
        return found[0]
    expected = f"statistics: expected one assets/<robot>/{FILE_NAME} in {folder}, found "
    if not found:
        deeper = next(iter(sorted(folder.glob(f"**/{FILE_NAME}"))), None)
        if deeper:
            raise Pi0Error(f"{expected}{deeper}. If it is this checkpoint's, use --norm-stats.")
        raise Pi0Error(
            expected + "none. Name the file with --norm-stats, or pass --norm-stats none to hand "
            "over states and actions in the model's own normalised units."
        )
    names = ", ".join(str(path.parent.relative_to(folder)) for path in found)
    raise Pi0Error(f"{expected}{len(found)} ({names}). Name one with --norm-stats.")


def read_norm_stats(path: Path) -> dict[str, Statistics]:
    """Statistics of "state" and "actions", each by name ("mean", "std", "q01", …).

    Raises:
        Pi0Error: not a file of that form, or statistics that are no vectors of numbers.
    """
    path = path.expanduser()
    if (path / FILE_NAME).is_file():
        path = path / FILE_NAME
    if not path.is_file():
        found = "a folder without one" if path.is_dir() else "no file"
        raise Pi0Error(f"statistics {path}: expected a {FILE_NAME}, found {found}.")
    content = read_json(path)
    tables = {what: _table(path, what, content) for what in NAMES}
    missing = [what for what, table in tables.items() if table is None]
    if missing:
        raise Pi0Error(
            f'statistics {path}: expected {{"norm_stats": {{"state": {{"mean": …}}, "actions": '
            f"{{…}}}}}}, found no {' and no '.join(missing)}."
        )
    return {what: _vectors(path, what, table or {}) for what, table in tables.items()}


def _table(path: Path, what: str, content: dict[str, object]) -> dict[str, object] | None:
    """The statistics under any of their names; None if there are none.

    Raises:
        Pi0Error: they are there under two names and differ.
    """
    inner = content.get("norm_stats")
    scopes = {"norm_stats.": inner if isinstance(inner, dict) else {}, "": content}
    found = {
        f"{prefix}{name}": table
        for prefix, scope in scopes.items()
        for name in NAMES[what]
        if isinstance(table := scope.get(name), dict)
    }
    first = next(iter(found.values()), None)
    if any(table != first for table in found.values()):
        raise Pi0Error(
            f"statistics {path}: expected one table of {what}, found {' and '.join(found)}, which "
            "differ. Remove those that are not this checkpoint's."
        )
    return first


def _vectors(path: Path, what: str, table: dict[str, object]) -> Statistics:
    vectors = {}
    for name, values in table.items():
        if values is None:
            continue
        odd = [v for v in values if not _is_number(v)] if isinstance(values, list) else []
        bad = odd or not isinstance(values, list) or not values
        if bad and name not in READ:
            continue  # such as a count of samples
        if bad:
            raise Pi0Error(
                f"statistics {path}: {what}.{name}: expected a list of numbers, one for each "
                f"dimension, found {reprlib.repr(odd[0] if odd else values)}. Compute them again, "
                "or copy the file again."
            )
        vectors[name] = np.array(values, np.float64)
    return vectors


def _is_number(value: object) -> bool:
    """Whether a value of a JSON file is a number; numpy would read "1.0" and true, too."""
    return type(value) is float or (type(value) is int and abs(value) < 1e300)
