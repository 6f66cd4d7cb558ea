"""LoRA: what is trained, what is written, and that both readers of the folder agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import pytest
import torch
from episodes import ALONE, FAST, ROBOT, Episodes

from pi0.checkpoint.layouts import LAYOUTS
from pi0.checkpoint.load import load_model, open_checkpoint
from pi0.checkpoint.synth import synthesise
from pi0.config import PRESETS
from pi0.data.read import Dataset
from pi0.errors import ConfigError
from pi0.policy import Policy
from pi0.train.loop import LoopOptions, train
from pi0.train.lora import LoraOptions
from pi0.train.prepare import Run, TrainOptions, prepare_run
from pi0.train.start import find_start

pytest.importorskip("peft")


def lora_run(base: Path, out: Path, lora: LoraOptions, episodes: Episodes) -> Run:
    out.mkdir(exist_ok=True)
    options = TrainOptions(robot=ROBOT, batch_size=4, augmentation=None, optimizer=FAST, lora=lora)
    return prepare_run(find_start(str(base)), cast(Dataset, episodes), out, options, ALONE)


@pytest.mark.parametrize("name", ["tiny", "pi05_tiny"])
def test_an_adapter_from_training_to_actions(name: str, tmp_path: Path) -> None:
    """The merged weights are those of training; 1e-5 where B·A is added in another order."""
    base = tmp_path / "base"
    synthesise(base, PRESETS[name], LAYOUTS["lerobot"], seed=0, dtype=torch.float32)
    episodes = Episodes()
    run = lora_run(base, tmp_path / "run", LoraOptions(2, 4), episodes)
    model = run.trainer.module.model
    assert all("lora_" in name for name in run.trainer.parameters)
    folder = train(run, tmp_path / "run", {}, LoopOptions()).checkpoint
    assert {p.name for p in folder.glob("adapter*")} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 4)
    checkpoint = open_checkpoint(folder)
    merged = load_model(checkpoint)
    # The average is what is written; make it the weights in memory, too.
    exported = run.trainer.exported()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(exported[key])
    samples = run.trainer.samples
    inputs = samples.batch(0, slice(1), ALONE.device).inputs
    noise = torch.randn(1, 50, 32)
    expected = model.sample_actions(inputs, noise)
    torch.testing.assert_close(merged.sample_actions(inputs, noise), expected, atol=1e-4, rtol=0)
    unchanged = load_model(open_checkpoint(base)).sample_actions(inputs, noise)
    assert not torch.allclose(unchanged, expected, atol=1e-3)
    observation = {
        "observation/image": episodes.pictures["observation.images.base"][3],
        "observation/wrist_image": episodes.pictures["observation.images.wrist"][3],
        "observation/state": episodes.column("observation.state")[3],
        "prompt": episodes.tasks[3],
    }
    with Policy.from_checkpoint(folder, robot=ROBOT, engine="cpu", base=base) as policy:
        assert policy.infer(observation)["actions"].shape == (50, 3)


def test_peft_reads_the_folder(tmp_path: Path) -> None:
    """Its keys are those that PEFT looks for in a model with LeRobot's names."""
    from peft import PeftConfig
    from safetensors.torch import load_file

    base = tmp_path / "base"
    synthesise(base, PRESETS["tiny"], LAYOUTS["openpi"], seed=0, dtype=torch.float32)
    run = lora_run(base, tmp_path / "run", LoraOptions(2), Episodes())
    run.export.write(tmp_path / "made", run.trainer.exported())
    config = PeftConfig.from_pretrained(str(tmp_path / "made"))
    assert config.base_model_name_or_path == str(base.resolve())
    keys = set(load_file(tmp_path / "made/adapter_model.safetensors"))
    expected = {
        f"base_model.model.{module}.lora_{factor}.weight"
        for module in config.target_modules
        for factor in "AB"
    }
    assert keys == expected
    assert "model.state_proj" in config.target_modules


def test_the_base_is_no_link(tmp_path: Path, tiny_path: Path) -> None:
    """Another checkpoint may be under it later, as under the `last` of a run."""
    (tmp_path / "last").symlink_to(tiny_path)
    run = lora_run(tmp_path / "last", tmp_path / "run", LoraOptions(2), Episodes())
    run.export.write(tmp_path / "made", run.trainer.exported())
    config = json.loads((tmp_path / "made/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_path.resolve())


def test_refused(tmp_path: Path, tiny_path: Path) -> None:
    with pytest.raises(ConfigError, match="--lora-targets: expected names of linear layers"):
        lora_run(tiny_path, tmp_path, LoraOptions(2, targets="no_such"), Episodes())
    with pytest.raises(ConfigError, match="--lora-targets: expected a regular expression"):
        lora_run(tiny_path, tmp_path, LoraOptions(2, targets="("), Episodes())
    with pytest.raises(ConfigError, match="--lora: expected a rank of at most .*found 100000"):
        lora_run(tiny_path, tmp_path, LoraOptions(100_000), Episodes())
