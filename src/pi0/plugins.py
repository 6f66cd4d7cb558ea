"""Engines and robots of other distributions, found by entry-point group.

Listing names imports none of them: a plug-in is imported when its name is first used, and one that
cannot be imported does not affect the others. Knows nothing of engines or robots.
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pi0.errors import Pi0Error

ENGINES, ROBOTS = "pi0.engines", "pi0.robots"  # the groups


@cache
def find_plugins(group: str, built_in: frozenset[str]) -> dict[str, EntryPoint]:
    """The entry points of a group by name, without importing them.

    One that takes a built-in name, or the name of another plug-in, is left out with a warning.
    """
    plugins: dict[str, EntryPoint] = {}
    for entry in entry_points(group=group):
        if entry.name in built_in:
            warnings.warn(
                f"plug-in {describe(entry)}: expected a name of its own, found {entry.name!r}, "
                "which pi0 has itself. The plug-in is ignored.",
                stacklevel=2,
            )
        elif plugins.setdefault(entry.name, entry).value != entry.value:
            warnings.warn(
                f"plug-in {describe(entry)}: expected a name of its own, found {entry.name!r}, "
                f"which {describe(plugins[entry.name])} has. The plug-in is ignored.",
                stacklevel=2,
            )
    return plugins


def load_plugin(entry: EntryPoint) -> Any:
    """What an entry point names.

    Raises:
        Pi0Error: importing it fails; the sentence names the distribution and the error.
    """
    try:
        return entry.load()
    except (Exception, SystemExit) as error:  # code of somebody else, which may raise anything
        raise Pi0Error(
            f"plug-in {describe(entry)}: expected {entry.value} to be importable, found "
            f"{type(error).__name__}: {error}."
        ) from error


def describe(entry: EntryPoint) -> str:
    """The distribution of an entry point, its version, and the entry point's name."""
    origin = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "of unknown origin"
    return f"{origin} ({entry.group}: {entry.name})"
