"""Codes of findings: each is explained on a page, and the pages explain no others."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("checkpoint", "policy", "cli")
PAGES = ("checkpoints.md", "lerobot.md", "policy.md")
# Codes that are put together where they are found.
MADE = {
    "{name.replace('_', '-')}-assumed": ("horizon-assumed", "max-tokens-assumed"),
    "{what}-of-base": ("statistics-of-base", "processors-of-base"),
    "{what}-statistics-flat": ("state-statistics-flat", "actions-statistics-flat"),
    "{what}-statistics-narrow": ("state-statistics-narrow", "actions-statistics-narrow"),
    "{what}-statistics-wide": ("state-statistics-wide", "actions-statistics-wide"),
    "{what}-too-wide": ("state-too-wide", "actions-too-wide"),
    "{code}-lost": (
        "eps-lost",
        "newline-lost",
        "targets-lost",
        "preprocessing-lost",
        "relative-actions-lost",
        "renames-lost",
        "image-statistics-lost",
        "norm-mode-lost",
        "steps-lost",
        "executed-lost",
        "aloha-lost",
        "robot-lost",
    ),
}
HEADS = ("| code |", "| finding |")  # of tables of codes


def codes_of(path: Path) -> Iterator[str]:
    """The codes in calls of `error`, `warning` and `attempt`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        plain = isinstance(node.func, ast.Name) and node.func.id in ("error", "warning")
        tried = isinstance(node.func, ast.Attribute) and node.func.attr == "attempt"
        code = node.args[0]
        if not (plain or tried):
            continue
        if isinstance(code, ast.Constant):
            yield code.value
        elif isinstance(code, ast.JoinedStr):
            yield from MADE[ast.unparse(code)[2:-1].replace('"', "'")]


def explained(page: str) -> Iterator[str]:
    """The codes in the first column of a page's tables."""
    lines = (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines()
    of_codes = False
    for line in lines:
        of_codes = line.startswith(HEADS) or (of_codes and line.startswith("|"))
        if of_codes:
            yield from re.findall(r"`([a-z0-9-]+)`", line.split("|")[1])


def test_every_code_is_explained() -> None:
    files = [path for room in ROOMS for path in (ROOT / "src" / "pi0" / room).rglob("*.py")]
    found = {code for path in files for code in codes_of(path)}
    on_pages = {code for page in PAGES for code in explained(page)}
    assert len(found) > 60
    assert found - on_pages == set()
    assert on_pages - found == set()
