"""The arrows of docs/architecture.md, the public names, and the changelog."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pi0

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "pi0"

# Who may import whom; a room may import itself.
ARROWS = {
    "errors": set(),
    "closing": set(),
    "plugins": {"errors"},
    "findings": {"errors"},
    "figures": set(),
    "number": set(),
    "workers": {"errors"},
    "config": {"errors"},
    "dtypes": {"errors"},
    "inputs": {"errors", "config"},
    "model": {"errors", "config", "inputs"},
    "checkpoint": {"errors", "number", "findings", "config", "dtypes", "model"},
    "engines": {
        "errors",
        "closing",
        "plugins",
        "config",
        "dtypes",
        "inputs",
        "model",
        "checkpoint",
    },
    "peers": {"errors", "config", "dtypes", "inputs", "model", "checkpoint", "engines"},
    "trace": {"inputs", "model", "engines"},
    "verify": {"errors", "figures", "config", "inputs", "model", "engines"},
    "bench": {
        "errors",
        "findings",
        "figures",
        "config",
        "inputs",
        "model",
        "checkpoint",
        "engines",
        "verify",
    },
    "testing": {
        "errors",
        "config",
        "inputs",
        "model",
        "checkpoint",
        "engines",
        "policy",
        "verify",
    },
    "policy": {
        "errors",
        "number",
        "closing",
        "plugins",
        "findings",
        "config",
        "inputs",
        "model",
        "checkpoint",
        "engines",
    },
    "serve": {"errors", "number", "closing", "policy", "data"},
    "data": {"errors", "findings", "checkpoint", "policy"},
    "sim": {"errors", "data", "workers"},
    "train": {
        "errors",
        "number",
        "findings",
        "figures",
        "config",
        "dtypes",
        "inputs",
        "model",
        "checkpoint",
        "policy",
        "data",
    },
    "eval": {"errors", "number", "figures", "checkpoint", "policy", "serve", "sim", "workers"},
    "__main__": {"cli"},
    "cli": {
        "serve",
        "errors",
        "plugins",
        "findings",
        "figures",
        "config",
        "dtypes",
        "inputs",
        "model",
        "checkpoint",
        "engines",
        "policy",
        "data",
        "sim",
        "train",
        "trace",
        "verify",
        "bench",
        "eval",
    },
}


def imports(path: Path) -> set[str]:
    """The rooms of this package that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("pi0.")}


def test_arrows_go_one_way() -> None:
    for path in SRC.rglob("*.py"):
        room = path.relative_to(SRC).parts[0].removesuffix(".py")
        if room != "__init__":
            found = imports(path) - {room}
            assert found <= ARROWS[room], f"{path.name} imports {found - ARROWS[room]}"


def test_engines_are_imported_on_demand() -> None:
    script = "import sys, pi0.policy; assert 'pi0.engines.reference' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_public_names() -> None:
    for name in pi0.__all__:
        assert getattr(pi0, name) is not None
    assert set(pi0._HOMES) == set(pi0.__all__) - {"__version__"}


def test_import_is_light() -> None:
    script = "import sys, pi0; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_files_stay_readable() -> None:
    for path in SRC.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path
    model = sum(len(p.read_text().splitlines()) for p in (SRC / "model").glob("*.py"))
    assert model <= 665


def test_changelog_has_this_version() -> None:
    assert f"## {pi0.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_loading_imports_no_compiler() -> None:
    """torch's compiler takes longer to import than a small model to load."""
    script = (
        "import sys, torch\n"
        "import pi0.policy, pi0.engines.fast.cpu.engine\n"
        "from pi0.checkpoint.load import empty_model\n"
        "empty_model(pi0.PRESETS['tiny'], torch.float32)\n"
        "heavy = {'torch._dynamo', 'torch._inductor', 'sympy', 'matplotlib', 'transformers'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
