"""What the tests of the documentation read from a Markdown page: links, anchors, code and commands.

Of Markdown only what our pages use: fenced blocks, indented blocks that begin with a command, and
inline code.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PROGRAMS = ("pi0", "make", "python", "pip")
SHELLS = ("", "bash", "sh", "console")
FENCE = re.compile(r"^( *)```(\S*)")
NEEDS = re.compile(r"#.*\bneeds: (\S.*)$")
LINK = re.compile(r"!?\[[^\]]*\]\(([^()\s]+)\)")
INLINE = re.compile(r"`((?:[^`\n]|\n(?!\n))+)`")
ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")


@dataclass(frozen=True)
class Block:
    """Code between fences, or indented. `language` is what follows the fence."""

    page: Path
    line: int  # of its first line of code, from 1
    language: str
    code: str

    @property
    def where(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def needs(self) -> str | None:
        """What a mark in the first line says that this code needs."""
        mark = NEEDS.search(self.code.partition("\n")[0])
        return mark.group(1) if mark else None


@dataclass(frozen=True)
class Command:
    """One command line of a page. `needs`: what its mark says that it needs, if it has one."""

    where: str
    words: tuple[str, ...]
    needs: str | None = None

    def __str__(self) -> str:
        return f"{self.where}: {shlex.join(self.words)}"


@cache
def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, and the indented ones that begin with a command."""
    found: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    i = 0
    while i < len(lines):
        start = FENCE.match(lines[i])
        end = i + 1
        if start:
            closing = start.group(1) + "```"
            while end < len(lines) and lines[end].rstrip() != closing:
                end += 1
            cut = [line.removeprefix(start.group(1)) for line in lines[i + 1 : end]]
            found.append(Block(page, i + 2, start.group(2), "\n".join(cut)))
            end += 1
        elif lines[i].startswith("    "):
            while end < len(lines) and lines[end].startswith("    "):
                end += 1
            cut = [line[4:] for line in lines[i:end]]
            if _words(next((line for line in cut if not line.startswith("#")), "")):
                found.append(Block(page, i + 1, "", "\n".join(cut)))
        i = end
    return found


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    text = page.read_text(encoding="utf-8")
    return re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.MULTILINE | re.DOTALL)


def links(page: Path) -> list[str]:
    """Targets of links and pictures that are not on the web."""
    targets = LINK.findall(INLINE.sub("", prose(page)))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


@cache
def anchors(page: Path) -> set[str]:
    """What a link into this page may name: its headings, spelled as GitHub spells them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.*?) *#*$", prose(page), flags=re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        others = sum(1 for other in found if re.fullmatch(re.escape(slug) + r"(-\d+)?", other))
        found.add(f"{slug}-{others}" if others else slug)
    return found


def commands(block: Block) -> list[Command]:
    """The command lines of a block, lines that end in a backslash joined.

    A mark is a comment with "needs: …" in it: after a command it is that command's, on a line of
    its own it is that of all commands below it, down to a blank line.
    """
    if block.language not in SHELLS:
        return []
    found = []
    for_the_rest = None
    for line in re.sub(r"\\\n\s*", "", block.code).splitlines():
        if not line.strip():
            for_the_rest = None
        mark = NEEDS.search(line)
        needs = mark.group(1) if mark else for_the_rest
        if line.strip().startswith("#"):
            for_the_rest = needs
            continue
        words = _words(line)
        if words:
            found.append(Command(block.where, words, needs))
    return found


def inline_commands(page: Path) -> list[Command]:
    """Commands within the prose. They are mentioned rather than shown, so they need no mark."""
    found = [_words(text) for text in INLINE.findall(prose(page))]
    return [Command(page.name, words, "prose") for words in found if words]


def _words(line: str) -> tuple[str, ...]:
    """The words of a command line of one of our programs, else none."""
    try:
        words = shlex.split(line.strip().removeprefix("$ "), comments=True)
    except ValueError:  # a quotation mark in what is no command
        return ()
    while words and ASSIGNMENT.fullmatch(words[0]):
        del words[0]
    if len(words) < 2 or words[0].endswith("/") or Path(words[0]).name not in PROGRAMS:
        return ()
    return (Path(words[0]).name, *words[1:])
