"""The loss: what it is the mean of, and that sharing and recomputing change nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from episodes import FAST, PI05_SIZES, SIZES, make_run
from torch import Tensor

from pi0.config import Pi0Config
from pi0.train.loss import (
    AuxiliaryHead,
    Batch,
    PointingHead,
    TrainingModel,
    squared_errors,
    time_of_uniform,
)
from pi0.train.start import Start

BOTH = pytest.mark.parametrize("config", [SIZES, PI05_SIZES], ids=["pi0", "pi05"])
CPU = torch.device("cpu")
SLOW = replace(FAST, steps=12)


def model_and_batch(
    tmp_path: Path, config: Pi0Config, draws: int = 3
) -> tuple[TrainingModel, Batch]:
    """A model whose branches are open and whose predictions are not 0, unlike at the start."""
    run = make_run(tmp_path, config=config, draws=draws)
    module = run.trainer.module
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return module, run.trainer.samples.batch(0, slice(None), CPU)


@BOTH
def test_draws_equal_separate_losses(tmp_path: Path, config: Pi0Config) -> None:
    """float32 sums in another order: 1e-5."""
    module, batch = model_and_batch(tmp_path, config)
    together = module(batch)["total"]
    separate = [
        module(replace(batch, noise=batch.noise[:, k : k + 1], time=batch.time[:, k : k + 1]))
        for k in range(3)
    ]
    torch.testing.assert_close(
        together, torch.stack([losses["total"] for losses in separate]).mean(), rtol=1e-5, atol=0
    )
    parameters = [p for p in module.parameters() if p.requires_grad]
    ours = torch.autograd.grad(together, parameters)
    theirs = torch.autograd.grad(sum(losses["total"] for losses in separate) / 3, parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@BOTH
def test_is_that_of_the_joint_pass(tmp_path: Path, config: Pi0Config) -> None:
    """The published training loss: one pass over the joined sequence, mean of squares. 1e-5:
    float32."""
    module, batch = model_and_batch(tmp_path, config, draws=1)
    noise, t = batch.noise[:, 0], batch.time[:, 0]
    x_t = t[:, None, None] * noise + (1 - t[:, None, None]) * batch.actions
    velocity = module.model(batch.inputs, x_t, t)
    expected = (velocity - (noise - batch.actions)).square()
    losses = module(batch)
    torch.testing.assert_close(losses["flow"], expected[..., :3].mean(), rtol=1e-5, atol=0)
    # All dimensions count, as in openpi, up to a factor.
    torch.testing.assert_close(
        losses["total"], expected.mean() * config.action_dim / 3, rtol=1e-5, atol=0
    )


@BOTH
def test_recomputing_gives_the_same_gradients(tmp_path: Path, config: Pi0Config) -> None:
    module, batch = model_and_batch(tmp_path, config)
    module.heads.append(AuxiliaryHead("aux.place", 2, 0, 1.0, config.vlm))
    batch = replace(batch, columns={"aux.place": torch.randn(8, 2)})
    parameters = [p for p in module.parameters() if p.requires_grad]

    def gradients(model: TrainingModel) -> list[Tensor]:
        return list(torch.autograd.grad(model(batch)["total"], parameters))

    kept = gradients(module)
    again = TrainingModel(module.model, 3, list(module.heads), recompute=True)
    for a, b in zip(kept, gradients(again), strict=True):
        assert torch.equal(a, b)


def test_times_are_those_of_the_paper() -> None:
    """Beta(1.5, 1): mean 0.6, variance 1.5 / (2.5² · 3.5). 4 standard errors of 100,000 draws."""
    t = time_of_uniform(torch.rand(100_000, generator=torch.Generator().manual_seed(0)))
    assert t.min() >= 0.001
    assert t.max() <= 1
    assert abs(t.mean() - (0.6 * 0.999 + 0.001)) < 4 * 0.26 / 100_000**0.5
    assert abs(t.var() - 1.5 / (2.5**2 * 3.5)) < 1e-3


def test_padding_is_trained_and_not_reported(tmp_path: Path) -> None:
    module, batch = model_and_batch(tmp_path, SIZES)
    before = module(batch)
    with torch.no_grad():
        module.model.action_out_proj.bias[3] += 1
    after = module(batch)
    assert torch.equal(before["flow"], after["flow"])
    assert not torch.equal(before["total"], after["total"])
    cache = module.model.prefill(batch.inputs)
    assert squared_errors(module.model, cache, batch).shape == (8, 3, 6, 4)


def test_heads_read_valid_text_alone(tmp_path: Path) -> None:
    head = AuxiliaryHead("place", 2, 0, 1.0, SIZES.vlm)
    torch.nn.init.normal_(head.linear.weight)
    hidden = torch.randn(2, 5, SIZES.vlm.width)
    valid = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    before = head(hidden, valid)
    hidden[0, 3:] += 100
    assert torch.equal(head(hidden, valid), before)
    hidden[0, 2] += 100 * torch.randn(SIZES.vlm.width)
    assert not torch.equal(head(hidden, valid)[0], before[0])


def test_pointing_is_judged_by_the_patch_that_holds_the_point() -> None:
    head = PointingHead("points", 2, 0, 1.0, SIZES)
    grid, width = SIZES.vision.grid, SIZES.vlm.width
    hidden = torch.randn(3, 2 * grid**2 + 4, width)  # two views, four text tokens
    valid = torch.ones(3, 4, dtype=torch.bool)
    logits = head(hidden, valid)
    assert logits.shape == (3, 2, grid**2)
    inside = torch.tensor([[0.01, 0.99], [0.99, 0.01], [0.6, 0.1]])  # (u, v) of the first point
    outside = torch.tensor([[-1.0, -1.0], [1.0, 0.5], [0.5, 1.2]])  # of the second, left out
    patch = (inside[:, 1] * grid).long() * grid + (inside[:, 0] * grid).long()
    expected = torch.nn.functional.cross_entropy(logits[:, 0], patch)
    inputs = SimpleNamespace(token_mask=valid)
    batch = SimpleNamespace(inputs=inputs, columns={"points": torch.cat([inside, outside], dim=1)})
    torch.testing.assert_close(head.loss(hidden, batch), expected)  # type: ignore[arg-type]
    batch.columns = {"points": torch.cat([outside, outside], dim=1)}
    assert head.loss(hidden, batch) == 0  # type: ignore[arg-type]


def test_heads_see_the_text(tmp_path: Path) -> None:
    """A head learns which task it is, which the text alone says."""
    run = make_run(tmp_path, heads=(("aux.place", 0),), batch_size=26, optimizer=SLOW)
    losses = [run.trainer.step() for _ in range(12)]
    assert "aux.place" in losses[0]
    assert losses[-1]["aux.place"] < losses[0]["aux.place"]
    assert not any("heads" in name for name in run.trainer.exported())


def test_random_start_predicts_nothing(tmp_path: Path) -> None:
    """The first loss is that of velocity 0: E(noise − actions)² = 2 for normalised actions."""
    model = Start("sizes", SIZES).model(0, CPU)
    assert not model.action_out_proj.weight.any()
    loss = make_run(tmp_path, batch_size=26, draws=16).trainer.step()["flow"]
    assert abs(loss - 2) < 0.2
