"""Steps: they learn, and leave alone what they must."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from episodes import FAST, PI05_SIZES, SIZES, Episodes, make_run

from pi0.config import Pi0Config
from pi0.errors import ConfigError, Pi0Error
from pi0.train.optimizer import OptimizerOptions
from pi0.train.trainer import TrainerOptions

BOTH = pytest.mark.parametrize("config", [SIZES, PI05_SIZES], ids=["pi0", "pi05"])


@BOTH
def test_the_loss_falls(tmp_path: Path, config: Pi0Config) -> None:
    """To a third within 60 steps; it fell to a fifth (π0) and a fourth (π0.5) when this was
    written."""
    run = make_run(
        tmp_path,
        config=config,
        batch_size=26,
        draws=4,
        optimizer=OptimizerOptions(steps=60, learning_rate=5e-3, warmup=5),
    )
    losses = [run.trainer.step()["flow"] for _ in range(60)]
    assert sum(losses[-5:]) < sum(losses[:5]) / 3


def test_frozen_parameters_stay(tmp_path: Path) -> None:
    run = make_run(tmp_path, freeze=("vision_tower.*", "token_embedding.weight"))
    model = run.trainer.module.model
    before = {name: p.clone() for name, p in model.named_parameters()}
    for _ in range(3):
        run.trainer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    frozen = {n for n in before if n.startswith("vision_tower.") or n == "token_embedding.weight"}
    # Of the VLM's last block, the actions see keys and values alone.
    last = {n for n in before if n.startswith("vlm.blocks.1.")}
    read = {f"vlm.blocks.1.{part}.weight" for part in ("norm1", "k_proj", "v_proj")}
    unread = last - read | {"vlm.norm.weight"}
    assert changed == set(before) - frozen - unread


def test_unknown_patterns_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--freeze vision\.\*: expected a pattern"):
        make_run(tmp_path, freeze=("vision.*",))
    with pytest.raises(ConfigError, match="something left to train"):
        make_run(tmp_path, freeze=("*",))


def test_average_follows_its_formula(tmp_path: Path) -> None:
    """Exactly up to float32 rounding: 1e-6."""
    run = make_run(tmp_path, optimizer=replace(FAST, ema=0.5))
    trainer = run.trainer
    name = "model.action_in_proj.weight"
    expected = trainer.parameters[name].detach().clone()
    for step in range(5):
        trainer.step()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * trainer.parameters[name].detach()
    exported = trainer.exported()["action_in_proj.weight"]
    torch.testing.assert_close(exported, expected, atol=1e-6, rtol=0)
    assert not torch.equal(exported, trainer.parameters[name])


def test_without_average_the_weights_are_exported(tmp_path: Path) -> None:
    trainer = make_run(tmp_path, optimizer=replace(FAST, ema=0)).trainer
    trainer.step()
    for name, value in trainer.exported().items():
        assert torch.equal(value, dict(trainer.module.model.named_parameters())[name])


def test_micro_batches_add_up(tmp_path: Path) -> None:
    """Sums in another order: 1e-5 of the losses, after steps that would amplify more."""
    whole = make_run(tmp_path / "a").trainer
    parts = make_run(tmp_path / "b", trainer=TrainerOptions(micro_batch=3)).trainer
    for _ in range(3):
        a, b = whole.step(), parts.step()
        assert a["flow"] == pytest.approx(b["flow"], rel=1e-5)


def test_bfloat16_is_close(tmp_path: Path) -> None:
    """Products of 8 bits: 3 % of the loss; weights and what stays float32 are not cast."""
    exact = make_run(tmp_path / "a").trainer
    rounded = make_run(tmp_path / "b", trainer=TrainerOptions(bfloat16=True)).trainer
    kinds = set()
    rounded.module.model.state_proj.register_forward_hook(lambda _, __, out: kinds.add(out.dtype))
    rounded.module.model.projector.register_forward_hook(lambda _, __, out: kinds.add(out.dtype))
    for _ in range(3):
        a, b = exact.step(), rounded.step()
        assert a["flow"] == pytest.approx(b["flow"], rel=0.03)
    assert a["flow"] != b["flow"]  # in the first step the velocity is 0 in both
    assert kinds == {torch.float32, torch.bfloat16}
    assert {p.dtype for p in rounded.parameters.values()} == {torch.float32}


def test_not_finite_stops_before_the_weights_change(tmp_path: Path) -> None:
    episodes = Episodes()
    trainer = make_run(tmp_path, episodes).trainer
    trainer.step()
    before = {name: p.clone() for name, p in trainer.parameters.items()}
    trainer.samples.states[:] = float("nan")
    with pytest.raises(Pi0Error, match="step 1: total: expected a finite number, found nan"):
        trainer.step()
    assert trainer.done == 1
    for name, parameter in trainer.parameters.items():
        assert torch.equal(parameter, before[name])


def test_learning_rate() -> None:
    options = OptimizerOptions(steps=100, learning_rate=1.0, warmup=10, final=0.1)
    rates = [options.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10] == 1
    assert max(rates) == 1
    assert rates[99] == pytest.approx(0.1, abs=1e-3)
    assert rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)
    with pytest.raises(ConfigError, match="ema: expected 0 to"):
        OptimizerOptions(ema=1)
