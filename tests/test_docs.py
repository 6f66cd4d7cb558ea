"""The documentation: links lead somewhere, and commands and Python do what the page says.

Every command line (`pi0`, `make`, `python`, `pip`) in a block of README, docs/ and benchmarks/ is
checked: its verb and its options exist. Those of `pi0` and `python` are then run, page by page and
in their order, in a folder with sample pictures and a tiny checkpoint under each name in
CHECKPOINTS; so is Python between fences, which finds the names of `python_names()`.

What cannot be run there says what it needs, in a comment that readers see, too:

    pi0 act pi0_base --engine cuda    # needs: an NVIDIA GPU

Such a comment on a line of its own holds for all commands below it, down to a blank line, and in
the first line of Python for the whole block. "..." is allowed in marked commands only.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import json
import re
import shutil
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import typer.main
from markdown import Block, Command, anchors, blocks, commands, inline_commands, links, prose
from peft_folder import write_adapter
from PIL import Image

from pi0.cli.main import app, main
from pi0.config import PRESETS
from pi0.inputs import random_inputs

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md")]
PAGES += [*ROOT.glob("contrib/*/*.md"), *ROOT.glob("src/pi0/shipped/*/*.md")]
SHELL = [command for page in PAGES for block in blocks(page) for command in commands(block)]
RECIPE = ROOT / "examples" / "tabletop" / "train.sh"  # takes hours: its options are checked alone
SHELL += commands(Block(RECIPE, 1, "bash", RECIPE.read_text().replace('"$here/../../', '"')))

# Checkpoints that pages name, and the widths of state and actions in their statistics.
CHECKPOINTS = {"pi0_base": (32, 32), "pi0_libero": (8, 7), "my_libero": (8, 7), "CKPT": (32, 32)}
# What would take minutes as the page has it, made short.
SHORT = {
    "eval": {"--episodes": "1", "--max-steps": "3"},
    "bench": {"--repeat": "1", "--rounds": "1", "--seeds": "1"},
    "verify": {"--oracle": "none"},
}
# Files of openpi's repository that our pages and code refer to.
OPENPIS = {"docs/norm_stats.md", "examples/convert_jax_model_to_pytorch.py"}
PATH = re.compile(r"(src|tests|docs|benchmarks|examples|parity|requirements)/[\w./-]+")


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


every_page = pytest.mark.parametrize("page", PAGES, ids=page_id)


# Links and paths


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        target, _, anchor = link.partition("#")
        path = page.parent / target if target else page
        assert path.exists(), f"{page.name}: dead link {link}"
        assert path.resolve().is_relative_to(ROOT), f"{page.name}: {link} leaves the repository"
        if anchor:
            assert anchor in anchors(path), f"{page.name}: {link}: no such heading"


@every_page
def test_paths_in_prose_exist(page: Path) -> None:
    if page.name == "CHANGELOG.md":
        return  # the past may name what is gone
    for text in re.findall(r"`([^`\n]+)`", prose(page)):
        if PATH.fullmatch(text) and text not in OPENPIS:
            assert (ROOT / text).exists(), f"{page.name}: {text} does not exist"


def test_pages_that_code_names_exist() -> None:
    files = [ROOT / "Makefile", ROOT / "pyproject.toml"]
    for folder in ("src", "tests", "benchmarks", "parity", "examples"):
        files += [p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".c", ".j2")]
    for file in files:
        text = file.read_text(encoding="utf-8")
        for name, anchor in re.findall(r"(?<![\w/])(docs/[\w/-]+\.md)(?:#([\w-]+))?", text):
            if name in OPENPIS:
                continue
            assert (ROOT / name).exists(), f"{file.name} names {name}, which does not exist"
            assert not anchor or anchor in anchors(ROOT / name), f"{file.name}: {name}#{anchor}"


def test_parts_of_a_call_add_up() -> None:
    """Programs on Tenstorrent, a column for each precision."""
    page = (ROOT / "docs" / "ttnn.md").read_text(encoding="utf-8")
    table = page.partition("| part, π0 |")[2].partition("\n\n")[0]
    rows = re.findall(r"\| \**(\d+)\** \| \**(\d+)\** \|$", table, re.MULTILINE)
    *parts, call = [[int(number) for number in row] for row in rows]
    assert len(parts) == 6
    assert [sum(column) for column in zip(*parts, strict=True)] == call


# Commands: what they name exists


@cache
def root_command() -> click.Group:
    command = typer.main.get_command(app)
    assert hasattr(command, "commands")
    return command


def check_pi0(command: Command) -> None:
    node: Any = root_command()
    known = {"-h", "--help", "--install-completion", "--show-completion"}
    words = list(command.words[1:])
    while words and hasattr(node, "commands") and not words[0].startswith("-"):
        verb = words.pop(0)
        assert verb in node.commands, f"{command}: no verb {verb}"
        node = node.commands[verb]
    for parameter in node.params:
        known |= {*parameter.opts, *parameter.secondary_opts}
    for word in words:
        option = word.strip("[]").partition("=")[0]
        if re.match(r"--?[a-z]", option):
            assert option in known, f"{command}: {node.name} has no {option}"


def check_make(command: Command) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in command.words[1:]:
        name, assigned, _ = word.partition("=")
        kind = r" *[?:]?=" if assigned else ":"
        found = re.search(rf"^{re.escape(name)}{kind}", makefile, re.MULTILINE)
        assert found, f"{command}: the Makefile has no {name}"


def check_python(command: Command) -> None:
    script = command.words[1]
    if script.startswith("-"):
        return
    assert (ROOT / script).exists(), f"{command}: {script} does not exist"
    source = (ROOT / script).read_text()
    for name in re.findall(r"^from (\w+) import", source, re.MULTILINE):
        beside = (ROOT / script).with_name(f"{name}.py")  # options that scripts share
        source += beside.read_text() if beside.exists() else ""
    for word in command.words[2:]:
        if word.startswith("--"):
            assert f'"{word.partition("=")[0]}"' in source, f"{command}: no {word}"


def check_pip(command: Command) -> None:
    """pi0 is on no index, so it is installed from a clone or from its repository."""
    metadata = (ROOT / "pyproject.toml").read_text()
    for word in command.words[2:]:
        name, _, extras = word.partition("[")
        assert not re.match(r"pi0\b(?!.*@)", word), f"{command}: pi0 is on no package index"
        if name == ".":
            for extra in filter(None, extras.rstrip("]").split(",")):
                assert re.search(rf"^{extra} = \[", metadata, re.MULTILINE), f"{command}: {extra}"


CHECKS = {"pi0": check_pi0, "make": check_make, "python": check_python, "pip": check_pip}


@pytest.mark.parametrize("command", SHELL, ids=str)
def test_commands_name_what_exists(command: Command) -> None:
    CHECKS[command.words[0]](command)
    written_out = not {"...", "…"} & set(command.words)
    assert written_out or command.needs, f"{command}: write it out or mark it (# needs: …)"


@every_page
def test_commands_in_prose_name_what_exists(page: Path) -> None:
    for command in inline_commands(page):
        if not command.words[1].isupper():  # "pi0 VERB --help" names no verb
            CHECKS[command.words[0]](command)


def test_examples_of_help_name_what_exists() -> None:
    nodes: list[tuple[str, Any]] = [("pi0", root_command())]
    seen = 0
    while nodes:
        name, node = nodes.pop()
        nodes += getattr(node, "commands", {}).items()
        for command in commands(Block(Path(f"{name} --help"), 0, "", node.help or "")):
            check_pi0(command)
            seen += 1
    assert seen > 10


# Commands and Python: they run


@pytest.fixture
def workspace(tmp_path: Path, tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which a page's commands run: what the pages take for granted is in it."""
    for name, (state, actions) in CHECKPOINTS.items():
        shutil.copytree(tiny_path, tmp_path / name)
        (statistics,) = (tmp_path / name).glob("assets/*/norm_stats.json")
        statistics.write_text(json.dumps({"norm_stats": unit_statistics(state, actions)}))
    write_adapter(tmp_path / "my_adapter", base="pi0_base")
    shutil.copytree(ROOT / "examples" / "cameras", tmp_path / "examples" / "cameras")
    for picture in (ROOT / "examples" / "cameras").glob("*.png"):
        shutil.copy(picture, tmp_path)
    inputs, noise = random_inputs(PRESETS["tiny"], cameras=2, tokens=8, seed=0)
    np.savez(
        tmp_path / "in.npz",
        images=inputs.images,
        img_masks=inputs.image_mask,
        tokens=inputs.tokens,
        token_masks=inputs.token_mask,
        state=inputs.state,
        noise=noise,
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))  # for processes that commands start
    return tmp_path


def unit_statistics(state: int, actions: int) -> dict[str, dict[str, list[float]]]:
    """Statistics in openpi's form that change nothing."""
    values = {"mean": 0.0, "std": 1.0, "q01": -1.0, "q99": 1.0}
    widths = {"state": state, "actions": actions}
    return {key: {name: [v] * w for name, v in values.items()} for key, w in widths.items()}


def python_names() -> dict[str, Any]:
    """What Python on our pages may use without having made it."""
    image, wrist_image = (
        np.asarray(Image.open(ROOT / "examples" / "cameras" / f"{name}.png").convert("RGB"))
        for name in ("base", "wrist")
    )
    state = np.zeros(8, np.float32)
    observation = {
        "observation/image": image,
        "observation/wrist_image": wrist_image,
        "observation/state": state,
        "prompt": "pick up the red cube",
    }
    names = {"image": image, "wrist_image": wrist_image, "state": state}
    return {**names, "observation": observation, "__name__": "page"}


def run_pi0(command: Command) -> None:
    words = list(command.words)
    for option, value in SHORT.get(words[1], {}).items():
        if option not in words:
            words += [option, value]
    stdout, stderr = io.StringIO(), io.StringIO()
    code: object = 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        patch.setattr(sys, "argv", words)
        try:
            main()
        except SystemExit as stopped:
            code = stopped.code
    assert not code, f"{command}\n{stdout.getvalue()}\n{stderr.getvalue()}"


def run_python(command: Command) -> None:
    words = [sys.executable, str(ROOT / command.words[1]), *command.words[2:]]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stderr}"


@every_page
def test_what_a_page_shows_runs(page: Path, workspace: Path) -> None:
    names = python_names()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for block in blocks(page):
            for command in commands(block):
                if command.needs or command.words[0] not in ("pi0", "python"):
                    continue
                run_pi0(command) if command.words[0] == "pi0" else run_python(command)
            if block.language == "python" and not block.needs:
                exec(compile(block.code, block.where, "exec"), names)


@every_page
def test_python_imports_what_exists(page: Path) -> None:
    """Also where a mark says that the code needs what is not here."""
    for block in blocks(page):
        if block.language != "python":
            continue
        for node in ast.walk(ast.parse(block.code, block.where)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pi0":
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{block.where}: no {alias.name}"
