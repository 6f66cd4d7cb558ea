"""Engines of other distributions: found, listed, run; and what is wrong with some of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plugin import ENGINE, run_with, write_distribution

from pi0.config import PRESETS
from pi0.inputs import random_inputs, to_npz
from pi0.testing import check_engine


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a distribution with engine `mine`, and one that cannot be imported."""
    folder = tmp_path_factory.mktemp("site")
    entries = {"mine": "my_engine:MyEngine", "broken": "broken_engine:Engine"}
    modules = {"my_engine": ENGINE, "broken_engine": "import no_such_library"}
    write_distribution(folder, modules, {"pi0.engines": entries})
    return folder


@pytest.mark.parametrize("verb", ["act", "trace", "sample", "verify", "bench"])
def test_help_lists_it_without_importing_it(installed: Path, verb: str) -> None:
    code = (
        "import sys\n"
        f"sys.argv = ['pi0', '{verb}', '--help']\n"
        "from pi0.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "assert not {'my_engine', 'torch'} & set(sys.modules)\n"
    )
    done = run_with(installed, code=code)
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.replace("│", " ").split())
    assert "transformers, lerobot, broken, mine." in text


def test_sample(installed: Path, tiny_path: Path, tmp_path: Path) -> None:
    inputs, noise = random_inputs(PRESETS["tiny"], cameras=2, tokens=8, seed=0)
    arrays = {"images": inputs.images, "img_masks": inputs.image_mask, "tokens": inputs.tokens}
    arrays |= {"token_masks": inputs.token_mask, "state": inputs.state, "noise": noise}
    np.savez(tmp_path / "in.npz", **arrays)
    words = ("sample", tiny_path, "--inputs", tmp_path / "in.npz", "--steps", 2, "--engine")
    for engine in ("mine", "reference:bfloat16"):
        done = run_with(installed, *words, engine, "--out", tmp_path / f"{engine}.npz")
        assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "mine.npz") as mine, np.load(tmp_path / "reference:bfloat16.npz") as a:
        np.testing.assert_array_equal(mine["actions"], a["actions"])


def test_verify_by_its_own_limits(installed: Path, tiny_path: Path) -> None:
    words = ("verify", tiny_path, "--steps", 1, "--oracle", "none", "--json", "--engines")
    done = run_with(installed, *words, "reference", "mine")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["candidate"] == "mine:half-ish"
    limits = {row["stage"]: row["max_rel_l2"] for row in data["rows"]}
    assert limits["velocity"] == 0.04
    assert limits["sequence"] == 0, "a mask is exact whatever the precision"


def test_bench(installed: Path, tiny_path: Path) -> None:
    words = ("bench", tiny_path, "--engines", "mine", "--against", "broken", "--repeat", 1)
    done = run_with(installed, *words, "--rounds", 1, "--seeds", 1, "--steps", 1, "--json")
    assert done.returncode == 2, "a spec that cannot be read is found before the work"
    assert "plug-in pi0-mine 1.2 (pi0.engines: broken)" in done.stderr
    words = ("bench", tiny_path, "--engines", "mine", "--repeat", 1)
    done = run_with(installed, *words, "--rounds", 1, "--seeds", 1, "--steps", 1, "--json")
    assert done.returncode == 0, done.stderr
    (engine,) = json.loads(done.stdout)["engines"]
    assert engine["engine"] == "mine:half-ish"
    assert engine["implementation"] == "my_engine"


def test_one_that_cannot_be_imported(installed: Path, tiny_path: Path) -> None:
    """Asked for, it is an error; where all engines are looked at, a warning; others run."""
    done = run_with(installed, "trace", tiny_path, "--engine", "broken")
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "pi0: engine broken: plug-in pi0-mine 1.2 (pi0.engines: broken): expected "
        "broken_engine:Engine to be importable, found ModuleNotFoundError: No module named "
        "'no_such_library'."
    )
    code = "from pi0.engines.registry import find_peers; print(find_peers())"
    done = run_with(installed, code=code)
    assert done.stdout == "['transformers', 'lerobot']\n"
    assert done.stderr.count("plug-in pi0-mine 1.2 (pi0.engines: broken)") == 1


def test_unknown_names_list_it(installed: Path, tiny_path: Path) -> None:
    done = run_with(installed, "trace", tiny_path, "--engine", "warp")
    assert done.returncode == 2
    assert "lerobot, broken, mine, found 'warp'." in done.stderr


FAILS = """
class Other(MyEngine):
    name = "other"

    def __init__(self, checkpoint, options):
        raise OSError("no such card")
"""


DECLARES = """
class Other(MyEngine):
    name = "other"
    capabilities = {}
"""
NO_ENGINE = """
class Other(MyEngine):
    name = "other"

    @classmethod
    def from_checkpoint(cls, checkpoint, options):
        return 3
"""
UNSET = """
class Other(MyEngine):
    name = "other"

    def __init__(self, checkpoint, options):
        pass
"""
FAILS_LATER = """
class Other(MyEngine):
    name = "other"

    def {}(self, *args):
        raise KeyError("lost")
"""


@pytest.mark.parametrize(
    ("entry", "source", "sentence"),
    [
        ("m:Other", ENGINE + DECLARES.format("None"), "pi0.engines.base.Capabilities, found None"),
        (
            "m:Other",
            ENGINE + DECLARES.format("Capabilities(precisions=())"),
            "capabilities.precisions: expected a tuple of at least one name, found ().",
        ),
        (
            "m:Other",
            ENGINE + DECLARES.format("Capabilities(precisions='int8')"),
            "capabilities.precisions: expected a tuple of at least one name, found 'int8'.",
        ),
        ("m:Other", ENGINE + NO_ENGINE, "expected from_checkpoint to return one, found 3."),
        ("m:Other", ENGINE + UNSET, "to make an engine, found AttributeError: "),
        ("m:Other", ENGINE + FAILS_LATER.format("_sample"), "to compute, found KeyError: 'lost'."),
        ("m:Other", ENGINE + FAILS_LATER.format("_close"), "to close, found KeyError: 'lost'."),
        ("m:Engine", "Engine = 3", "expected a subclass of pi0.engines.base.Engine from plug-in"),
        ("m:MyEngine", ENGINE, "expected name = 'other' on MyEngine, found 'mine'."),
        ("m:Engine", "raise RuntimeError('no card')", "found RuntimeError: no card."),
        ("m:Other", ENGINE + FAILS, "to make an engine, found OSError: no such card."),
    ],
)
def test_what_is_no_engine(
    tmp_path: Path, tiny_path: Path, entry: str, source: str, sentence: str
) -> None:
    write_distribution(tmp_path, {"m": source}, {"pi0.engines": {"other": entry}})
    inputs, noise = random_inputs(PRESETS["tiny"], cameras=1, tokens=8, seed=0)
    np.savez(tmp_path / "in.npz", **to_npz(inputs, noise))
    words = ("--inputs", tmp_path / "in.npz", "--out", tmp_path / "out.npz")
    done = run_with(tmp_path, "sample", tiny_path, *words, "--engine", "other")
    assert done.returncode == 2
    assert done.stderr.startswith("pi0: engine other: ")
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.npz").exists()


def test_the_engine_that_the_documentation_shows() -> None:
    text = (Path(__file__).parents[2] / "docs" / "engines.md").read_text()
    (source,) = re.findall(r"```python\n(# my_package/engine.py.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {"__name__": "my_package"}
    exec(source, names)
    check_engine(names["MyEngine"])


def test_names_that_are_taken(tmp_path: Path, tiny_path: Path) -> None:
    """A built-in name, and one that another plug-in has: said, and the first one is used."""
    write_distribution(
        tmp_path, {"m": ENGINE}, {"pi0.engines": {"cpu": "m:MyEngine", "mine": "m:MyEngine"}}, "a"
    )
    write_distribution(tmp_path, {}, {"pi0.engines": {"mine": "n:Engine"}}, "b")
    done = run_with(tmp_path, "trace", tiny_path, "--engine", "reference")
    assert done.returncode == 0, done.stderr
    assert "pi0: warning: plug-in a 1.2 (pi0.engines: cpu): expected a name of its own, found " in (
        done.stderr
    )
    assert done.stderr.count("which pi0 has itself. The plug-in is ignored.") == 1
    assert done.stderr.count("The plug-in is ignored.") == 2
