"""What surrounds the code says the same everywhere: versions, locks, CI, and no machine's paths."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement

import pi0

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
# Extras that the lock of an environment serves, and the Pythons that it may have.
LOCKS = {
    "venv": (["plot", "ray", "report", "test", "lint"], PYTHONS),
    "ttnn": (["ttnn", "report"], ["3.10", "3.12"]),
    "inspect-robots": (["sim"], PYTHONS),
}
# Folders of one person's or one machine's files.
MACHINE_PATH = re.compile(r"(?<![\w.~}])/(?:work|root|home/\w+|Users/\w+)/")


def metadata() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pins(lock: str) -> list[Requirement]:
    lines = (ROOT / "requirements" / f"{lock}.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if not line.startswith("#")]


def pinned(lock: str, python: str) -> dict[str, str]:
    """The versions that a lock gives to a Python on Linux."""
    machine = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}
    environment = {**default_environment(), **machine}
    environment |= {"python_version": python, "python_full_version": f"{python}.1"}
    found: dict[str, str] = {}
    for pin in pins(lock):
        if pin.marker is None or pin.marker.evaluate(environment):
            assert pin.name not in found, f"{lock}.txt: two pins of {pin.name} on {python}"
            found[pin.name] = str(pin.specifier).removeprefix("==")
    return found


@pytest.mark.parametrize(
    ("lock", "python"), [(lock, python) for lock, (_, some) in LOCKS.items() for python in some]
)
def test_locks_satisfy_pyproject(lock: str, python: str) -> None:
    """They were refreshed after the last change of a dependency (make lock)."""
    versions = pinned(lock, python)
    extras = metadata()["optional-dependencies"]
    wanted = list(metadata()["dependencies"])
    wanted += [line for extra in LOCKS[lock][0] for line in extras[extra]]
    for requirement in map(Requirement, wanted):
        if requirement.name == "pi0":
            continue
        marker = requirement.marker
        if marker and not marker.evaluate({**default_environment(), "python_version": python}):
            continue
        version = versions.get(requirement.name)
        assert version, f"{lock}.txt: no pin of {requirement.name} on {python}. Run make lock."
        assert requirement.specifier.contains(version), f"{lock}.txt: {requirement}. Run make lock."


@pytest.mark.parametrize("lock", [*LOCKS, "lerobot"])
def test_locks_are_exact_and_name_no_index(lock: str) -> None:
    for pin in pins(lock):
        assert re.fullmatch(r"==[\w.+]+", str(pin.specifier)), pin
        assert pin.url is None


def test_makefile_names_what_is_locked() -> None:
    text = (ROOT / "Makefile").read_text()
    assert f"TORCH_LOCKED := torch=={pinned('venv', '3.12')['torch']}\n" in text
    assert f"LEROBOT := lerobot[pi,dataset]=={pinned('lerobot', '3.12')['lerobot']}\n" in text
    framework = pinned("inspect-robots", "3.12")["inspect-robots"]
    assert f"INSPECT_ROBOTS := inspect-robots=={framework} " in text


def test_makefile_explains_its_targets() -> None:
    text = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)", text, re.MULTILINE)
    assert phony
    for target in phony.group(1).split():
        assert re.search(rf"^{target}:.* ## ", text, re.MULTILINE), f"make help lacks {target}"


def test_pythons_are_the_same_everywhere() -> None:
    prefix = "Programming Language :: Python :: 3."
    classifiers = [c for c in metadata()["classifiers"] if c.startswith(prefix)]
    assert [c.rpartition(" ")[2] for c in classifiers] == PYTHONS
    assert metadata()["requires-python"] == f">={PYTHONS[0]}"
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == PYTHONS


def test_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == pi0.__version__
    assert citation["license"] == metadata()["license"]
    assert citation["repository-code"] == metadata()["urls"]["Homepage"]
    assert citation["authors"] == metadata()["authors"]


def test_no_file_names_a_machines_folders() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: tracked files are not known")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        path = ROOT / name
        if not path.is_file():
            continue  # removed and not yet committed
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture
        found = MACHINE_PATH.search(text)
        assert not found, f"{name}: names a folder of one machine, {found.group()}"


@pytest.mark.parametrize("ignored", [False, True])
def test_interrupt_during_imports(ignored: bool) -> None:
    """Ctrl-C before the command line is there to catch it; under nohup it stays ignored."""
    script = (
        "import importlib.metadata, os, signal, sys\n"
        f"if {ignored}: signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "class Keyboard:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'typer': os.kill(os.getpid(), signal.SIGINT)\n"
        f"command = importlib.metadata.EntryPoint('pi0', {metadata()['scripts']['pi0']!r}, '')\n"
        "main = command.load()\n"
        "sys.meta_path.insert(0, Keyboard())\n"
        "sys.argv = ['pi0', '--version']\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0 if ignored else 130, "")
    assert done.stdout == (f"{pi0.__version__}\n" if ignored else "")
