"""Adapters on the command line and in policies: `--base`, whose files count, the weight cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from lerobot_folder import LerobotFolder, random_statistics
from peft_folder import ORACLE, configure, copy_case
from safetensors.torch import save_file
from test_cli import pi0, refused

from pi0.checkpoint.load import open_checkpoint
from pi0.engines.base import make_engine
from pi0.engines.spec import EngineSpec
from pi0.policy import PolicyOptions, prepare

PROCESSORS = ("policy_preprocessor.json", "policy_postprocessor.json", "*.safetensors")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return copy_case(tmp_path)


@pytest.fixture
def away(adapter: Path) -> Path:
    """Far from its base, so that the base has to be named."""
    return Path(shutil.move(adapter, adapter.parent / "elsewhere" / "deep" / "adapter"))


def test_base_is_named(away: Path, tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out.npz"
    assert "--base DIR" in refused("inspect", away)
    shown = pi0("inspect", away, "--base", base)
    assert f"LoRA of rank 4 merged into 9 tensors of {base}, 0 replaced" in shown.stdout
    words = ["sample", away, "--base", base, "--inputs", ORACLE / "in.npz", "--out", out]
    done = pi0(*words)
    assert done.returncode == 0, done.stderr
    with np.load(out) as got, np.load(ORACLE / "out.npz") as expected:
        np.testing.assert_allclose(got["actions"], expected["actions"], atol=1e-4)
    for verb in (["trace", "--cameras", "1"], ["verify", "--oracle", "none", "--steps", "1"]):
        done = pi0(*verb, "--tokens", "8", away, "--base", base)
        assert done.returncode == 0, done.stderr


def test_base_without_an_adapter(tiny_path: Path) -> None:
    assert "base (--base): expected only with a PEFT adapter" in refused(
        "inspect", tiny_path, "--base", tiny_path
    )


def test_bench_hands_the_base_to_its_workers(away: Path, tmp_path: Path) -> None:
    words = ["--repeat", "1", "--rounds", "1", "--seeds", "1", "--steps", "1", "--json"]
    done = pi0("bench", away, "--base", tmp_path / "base", *words)
    assert done.returncode == 0, done.stderr
    assert not json.loads(done.stdout)["engines"][0].get("failure")


def test_weight_cache_knows_the_adapter(adapter: Path) -> None:
    """It lies beside the adapter, and is made anew where a file of the adapter has changed."""

    def start() -> None:
        spec = EngineSpec("cpu", "float32")
        with make_engine(spec, open_checkpoint(adapter), weight_cache=True):
            pass

    start()
    assert len(list(adapter.glob("adapter_model.*.pi0"))) == 1
    assert not list((adapter.parent / "base").glob("*.pi0"))
    start()
    configure(adapter, lora_alpha=16)
    with pytest.warns(UserWarning, match="those of another checkpoint"):
        start()


def test_files_of_the_base_where_the_adapter_has_none(adapter: Path) -> None:
    base = adapter.parent / "base"
    lerobot = adapter.parent / "lerobot"
    lerobot.mkdir()
    files = LerobotFolder(lerobot)
    for step in ("normalizer_processor", "unnormalizer_processor"):
        files.step(step)["state_file"] = "policy_statistics.safetensors"
    files.statistics = None
    files.write()
    save_file(random_statistics(), lerobot / "policy_statistics.safetensors")
    options = PolicyOptions(tokenizer="none")

    def codes() -> set[str]:
        return {finding.code for finding in prepare(open_checkpoint(adapter), options).findings}

    for folder, of_base in ((base, True), (adapter, False)):
        for pattern in PROCESSORS:
            for file in lerobot.glob(pattern):
                shutil.copy(file, folder)
        for place in (base, adapter):
            settings = json.loads((place / "config.json").read_text())
            theirs = json.loads((lerobot / "config.json").read_text())
            features = {key: theirs[key] for key in ("input_features", "output_features")}
            (place / "config.json").write_text(json.dumps(settings | features))
        assert ("processors-of-base" in codes()) == of_base


def test_statistics_and_tokenizer_of_the_base(tmp_path: Path, tiny_path: Path) -> None:
    adapter = copy_case(tmp_path)
    shutil.rmtree(tmp_path / "base")
    shutil.copytree(tiny_path, tmp_path / "base")
    (adapter / "config.json").unlink()
    setup = prepare(open_checkpoint(adapter), PolicyOptions(preprocessing="openpi"))
    found = {finding.code for finding in setup.findings}
    assert found == {"robot-assumed", "statistics-of-base"}
    assert setup.describe()["base"] == str(tmp_path / "base")
    assert str(tmp_path / "base") in setup.sources["tokenizer"]
