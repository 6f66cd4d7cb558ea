"""Guidance towards the previous chunk: formulas, known answers, LeRobot, engines, policies."""

from __future__ import annotations

import math
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import FakeEngine
from hypothesis import given
from hypothesis import strategies as st
from test_policy import ANSWER, observation, pipeline, policy
from torch import Tensor

from pi0.checkpoint.load import open_checkpoint
from pi0.engines.base import Engine, make_engine
from pi0.errors import ConfigError, EngineError, ObservationError
from pi0.inputs import random_inputs
from pi0.model.flow import integrate
from pi0.peers.engine import LerobotEngine
from pi0.policy import ROBOTS, Policy, RealTimeChunking
from pi0.policy.normalize import make_normalizer
from pi0.policy.realtime import Inpainting, guidance_weight, soft_mask

HORIZON, DIM = 8, 3
SCHEDULES = {"EXP": "exponential", "LINEAR": "linear", "ONES": "ones", "ZEROS": "zeros"}


# Formulas


@given(st.integers(0, 50), st.integers(1, 50))
def test_soft_mask_is_equation_5(delay: int, executed: int) -> None:
    horizon = 50
    expected = []
    for i in range(horizon):
        c = (horizon - executed - i) / max(horizon - executed - delay + 1, 1)
        if i < min(delay, horizon - executed):  # nothing is known of what comes after the overlap
            expected.append(1.0)
        elif i < horizon - executed:
            expected.append(c * (math.exp(c) - 1) / (math.e - 1))
        else:
            expected.append(0.0)
    found = soft_mask(horizon, delay, horizon - executed)
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=0)  # float32


def test_guidance_weight_is_equations_2_and_4() -> None:
    t = torch.tensor([1.0, 0.9, 0.5, 0.1])
    tau = 1 - t
    r2 = (1 - tau) ** 2 / (tau**2 + (1 - tau) ** 2)
    found = guidance_weight(t, 5.0)
    assert found[0] == 5.0  # infinite, cut
    torch.testing.assert_close(found[1:], ((1 - tau) / (tau * r2))[1:].clamp(max=5.0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "cosine"}, "schedule: expected one of exponential, linear, ones, zeros, fou"),
        ({"jacobian": "none"}, "jacobian: expected one of exact, identity, found 'none'"),
        ({"max_guidance": 0}, "max_guidance: expected a finite number above 0, found 0"),
        ({"max_guidance": math.inf}, "max_guidance: expected a finite number above 0, found inf"),
        ({"overlap": 0}, "overlap: expected a whole number of actions, at least 1, found 0"),
    ],
)
def test_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RealTimeChunking(**settings)


# Analytic denoisers: actions that are distributed as N(0, S) over a chunk have E[a | x_t] =
# τ S (τ² S + t² I)⁻¹ x_t, and the velocity is (x_t - E[a | x_t]) / t.


def denoiser(covariance: Tensor, t: float) -> Tensor:
    """∂E[a | x_t]/∂x_t over the ticks of a chunk, [H, H] float64."""
    tau, identity = 1 - t, torch.eye(len(covariance)).double()
    return tau * covariance @ torch.linalg.inv(tau**2 * covariance + t**2 * identity)


def smooth(width: float) -> Tensor:
    """Covariance of a chunk whose neighbouring actions are alike."""
    at = torch.arange(HORIZON).double()
    return torch.exp(-(((at[:, None] - at) / width) ** 2) / 2)


def velocity_of(covariance: Tensor) -> Any:
    def velocity(x: Tensor, t: Tensor) -> Tensor:
        at = float(t.flatten()[0])
        return (x - (denoiser(covariance, at) @ x.double()).to(x.dtype)) / at

    return velocity


def guided(velocity: Any, guidance: Inpainting, noise: Tensor, steps: int) -> Tensor:
    return integrate(lambda x, t: guidance(lambda y: velocity(y, t), x, t), noise, steps)


def chunk(seed: int) -> Tensor:
    return torch.randn(HORIZON, DIM, generator=torch.Generator().manual_seed(seed))


def test_one_step_is_the_closed_form() -> None:
    """v - w Jᵀ W (Y - Â), with the J of a smooth chunk; within float32."""
    covariance, x, previous, t = smooth(2.0), chunk(0)[None], chunk(1)[:6], 0.6
    guidance = Inpainting(RealTimeChunking(), previous, 2, HORIZON)
    velocity = velocity_of(covariance)
    found = guidance(lambda y: velocity(y, torch.tensor([t])), x, torch.tensor([t]))
    jacobian = denoiser(covariance, t)
    estimate = jacobian @ x[0].double()
    target = torch.zeros(HORIZON, DIM).double()
    target[:6] = previous
    error = soft_mask(HORIZON, 2, 6).double()[:, None] * (target - estimate)
    weight = (0.4**2 + t**2) / (0.4 * t)
    expected = (x[0].double() - estimate) / t - weight * jacobian.T @ error
    torch.testing.assert_close(found[0], expected.float(), atol=1e-5, rtol=0)
    identity = Inpainting(RealTimeChunking(jacobian="identity"), previous, 2, HORIZON)
    found = identity(lambda y: velocity(y, torch.tensor([t])), x, torch.tensor([t]))
    expected = (x[0].double() - estimate) / t - weight * error
    torch.testing.assert_close(found[0], expected.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("steps", [2, 10])
def test_independent_actions_are_met_exactly(steps: int) -> None:
    """For S = I and without clipping, w J = 1/t: the corrected velocity is (x - Y) / t, which leads
    to Y in a straight line; what is not guided ends where it would anyhow."""
    velocity, noise = velocity_of(torch.eye(HORIZON).double()), chunk(0)[None]
    settings = RealTimeChunking(max_guidance=1e6, schedule="ones")
    guidance = Inpainting(settings, chunk(1)[:5], 0, HORIZON)
    found = guided(velocity, guidance, noise, steps)
    torch.testing.assert_close(found[0, :5], chunk(1)[:5], atol=1e-4, rtol=0)  # w up to 1e6
    free = integrate(velocity, noise, steps)
    torch.testing.assert_close(found[0, 5:], free[0, 5:], atol=1e-5, rtol=0)


def test_the_exact_jacobian_carries_the_rest_along() -> None:
    """Of smooth chunks the ticks after the guided ones are known, too: E[rest | start]. The exact
    form comes nearer to it than the identity, which comes nearer than no guidance."""
    covariance, n = smooth(4.0), 4
    known = (torch.linalg.cholesky(covariance + 1e-6 * torch.eye(HORIZON)) @ chunk(1).double())[:n]
    inverse = torch.linalg.inv(covariance[:n, :n] + 1e-6 * torch.eye(n))
    expected = (covariance[n:, :n] @ inverse @ known).float()
    off = {}
    for name in ("exact", "identity"):
        settings = RealTimeChunking(max_guidance=20, schedule="ones", jacobian=name)
        guidance = Inpainting(settings, known.float(), n, HORIZON)
        results = [
            guided(velocity_of(covariance), guidance, chunk(s)[None], 50)[0, n:] for s in range(8)
        ]
        off[name] = float((torch.stack(results).mean(0) - expected)[0].abs().mean())
    free = [integrate(velocity_of(covariance), chunk(s)[None], 50)[0, n:] for s in range(8)]
    off["free"] = float((torch.stack(free).mean(0) - expected)[0].abs().mean())
    assert off["exact"] < off["identity"] < off["free"]


# LeRobot


def test_equals_lerobots_processor(tmp_path: Path) -> None:
    """Its schedules, delays and horizons, through ten steps. Tolerance: 1e-5, rounding of float32
    through a weight of up to 10."""
    try:
        python = LerobotEngine.python()
    except EngineError:
        pytest.skip("needs LeRobot in .venv-lerobot (make .venv-lerobot/installed)")
    rng = np.random.default_rng(0)
    cases = [(delay, end) for delay in (0, 2, 5, 7) for end in (3, 5, 8)]
    size = HORIZON * DIM
    arrays = {
        "matrix": rng.normal(0, size**-0.5, (size, size)).astype(np.float32),
        "bias": rng.normal(0, 1, size).astype(np.float32),
        "noise": rng.normal(0, 1, (1, HORIZON, DIM)).astype(np.float32),
        "previous": rng.normal(0, 1, (6, DIM)).astype(np.float32),
    }
    np.savez(tmp_path / "in.npz", **arrays, steps=10, cases=cases)
    worker = Path(__file__).with_name("lerobot_rtc_worker.py")
    subprocess.run([python, worker, tmp_path / "in.npz", tmp_path / "out.npz"], check=True)
    theirs = np.load(tmp_path / "out.npz")
    matrix, bias, noise, previous = map(torch.from_numpy, arrays.values())

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x.flatten(1) @ matrix.T + bias).view(x.shape)

    assert len(theirs.files) == len(SCHEDULES) * len(cases)
    for name in theirs.files:
        schedule, delay, end = name.split("-")
        settings = RealTimeChunking(10.0, SCHEDULES[schedule], int(end), "identity")
        guidance = Inpainting(settings, previous, int(delay), HORIZON)
        ours = guided(velocity, guidance, noise, 10)
        np.testing.assert_allclose(ours.numpy(), theirs[name], atol=1e-5, rtol=0, err_msg=name)


# Engines


def sample(engine: Engine, jacobian: str, remaining: int = 30, delay: int = 5) -> tuple[Any, ...]:
    """Two chunks of different noise, the second guided by the end of the first or not."""
    inputs, noise = random_inputs(engine.config, 1, 8, 0)
    first = engine.sample(inputs, noise, 5)[0, -remaining:]
    settings = RealTimeChunking(jacobian=jacobian)
    guidance = Inpainting(settings, first, delay, engine.config.horizon)
    steps: list[int] = []
    second = engine.sample(inputs, -noise, 5, lambda: steps.append(0), guidance)
    assert len(steps) == 5
    return first, engine.sample(inputs, -noise, 5), second


@pytest.mark.parametrize(
    ("spec", "jacobian"),
    [
        ("reference", "exact"),
        ("reference", "identity"),
        ("cpu", "identity"),
        ("cpu:int8", "identity"),
    ],
)
def test_engines_continue_a_chunk(each_path: Path, spec: str, jacobian: str) -> None:
    """The actions that are executed in any case are met; the border jumps less than a tenth."""
    with make_engine(spec, open_checkpoint(each_path)) as engine:
        first, free, second = sample(engine, jacobian)
    before = (free[0, :5] - first[:5]).abs().mean()
    after = (second[0, :5] - first[:5]).abs().mean()
    assert after < 0.1 * before
    assert torch.isfinite(second).all()


def test_engines_agree(each_path: Path) -> None:
    checkpoint = open_checkpoint(each_path)
    with make_engine("reference", checkpoint) as reference, make_engine("cpu", checkpoint) as cpu:
        expected, found = sample(reference, "identity")[2], sample(cpu, "identity")[2]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)  # float32, in another order


def test_the_gradient_of_the_reference(each_path: Path) -> None:
    """wᵀ (J u) by central differences of the velocity against (Jᵀ w)ᵀ u by autograd. Tolerance:
    float32 over differences of 1e-2."""
    with make_engine("reference", open_checkpoint(each_path)) as engine:
        inputs, x = random_inputs(engine.config, 1, 8, 0)
        cache, t = engine.prefill(inputs), torch.tensor([0.5])
        u, w = (torch.randn(x.shape, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
        y = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(engine.velocity(y, t, cache), y, w)
        ahead, behind = (engine.velocity(x + s * 1e-2 * u, t, cache) for s in (1, -1))
    expected = float((w * (ahead - behind) / 2e-2).sum())
    assert float((gradient * u).sum()) == pytest.approx(expected, rel=2e-2, abs=1e-3)


def test_inside_inference_mode(tiny_path: Path) -> None:
    with make_engine("reference", open_checkpoint(tiny_path)) as engine:
        expected = sample(engine, "exact")[2]
        with torch.inference_mode():
            assert torch.equal(sample(engine, "exact")[2], expected)


def test_engines_without_gradients_refuse(tiny_path: Path) -> None:
    refusal = "engine cpu: expected one whose velocity autograd can follow"
    with (
        make_engine("cpu", open_checkpoint(tiny_path)) as engine,
        pytest.raises(EngineError, match=refusal),
    ):
        sample(engine, "exact")


def test_a_velocity_without_gradient_is_no_identity() -> None:
    """What is declared differentiable and is not would leave the identity for the Jacobian."""
    guidance = Inpainting(RealTimeChunking(), chunk(0), 0, HORIZON)
    with pytest.raises(EngineError, match="expected one that autograd can follow"):
        guidance(lambda x: x.detach(), chunk(1)[None], torch.tensor([0.5]))


# Policies


IDENTITY = RealTimeChunking(max_guidance=1e6, schedule="ones", jacobian="identity")


@pytest.mark.parametrize("name", ROBOTS)
def test_previous_actions_in_the_units_of_the_new_state(name: str) -> None:
    """The target, decoded for the state that has moved, is the previous chunk."""
    made = policy(ROBOTS[name], ANSWER * 0.1, real_time=IDENTITY)
    previous = made.infer(observation(name))["actions"][20:]
    moved = observation(name)
    key = next(key for key, _ in ROBOTS[name].state)
    moved[key] = np.asarray(moved[key]) * 0.9 + 0.05
    seen: list[Inpainting] = []
    sample = made.engine.sample

    def watch(
        inputs: Any, noise: Any, steps: int, on_step: Any, guidance: Any, *how: str
    ) -> Tensor:
        seen.append(guidance)
        return sample(inputs, noise, steps, on_step, guidance, *how)

    made.engine.sample = watch
    made.infer(moved, previous=previous, delay=3)
    _, state = made.pipeline.encode(moved)
    back = made.pipeline.decode(seen[0].target.double().numpy(), state)[:30]
    np.testing.assert_allclose(back, previous, atol=1e-4)
    n = made.pipeline.action_dim
    assert (seen[0].weights[:30, :n] == 1).all()
    assert (seen[0].weights[:, n:] == 0).all()  # no action of this robot


def test_infer_refuses() -> None:
    robot = ROBOTS["libero"]
    previous = np.zeros((10, 7))
    with pytest.raises(ConfigError, match=r"made with real_time=RealTimeChunking\(\), found one"):
        policy(robot, ANSWER).infer(observation("libero"), previous=previous)
    made = policy(robot, ANSWER, real_time=IDENTITY)
    for wrong, message in (
        (np.zeros((51, 7)), r"previous: expected 1 to 50 actions \[n, 7\], found shape \[51, 7\]"),
        (np.zeros((0, 7)), "previous: expected 1 to 50 actions"),
        (np.zeros((10, 6)), r"previous: expected 1 to 50 actions \[n, 7\], found shape \[10, 6\]"),
        (np.zeros(7), r"previous: expected .* found shape \[7\]"),
        (np.full((10, 7), np.nan), "previous: expected finite values"),
        (np.zeros((10, 7), complex), "previous: expected real numbers, found complex128"),
        (np.ma.masked_array(previous, True), "previous: expected .* numbers, found a MaskedArray"),
        (previous.astype(object), "previous: expected an array of numbers, found"),
        (previous.astype("M8[s]"), "previous: expected an array of numbers, found"),
        ([[0.0] * 7, [0.0]], "previous: expected an array of numbers, found"),
        (np.full((10, 7), 1e300), r"previous: expected values less than 1e\+12 .* found 1e\+300"),
    ):
        with pytest.raises(ObservationError, match=message):
            made.infer(observation("libero"), previous=wrong)
    for delay in (51, -1, 2.5, "2", None, True, np.True_, [2]):
        with pytest.raises(ObservationError, match="delay: expected a whole number of ticks"):
            made.infer(observation("libero"), previous=previous, delay=delay)
    noise = np.zeros((50, 32), np.float32)
    plain = made.infer(observation("libero"), noise, previous=previous)["actions"]
    for form in (torch.zeros(10, 7, requires_grad=True), torch.zeros(10, 7, dtype=torch.bfloat16)):
        result = made.infer(observation("libero"), noise, previous=form)
        np.testing.assert_array_equal(result["actions"], plain)


@pytest.mark.parametrize(
    ("name", "value"),
    [("overlap", value) for value in (0, 2.5, True, "3", math.nan)]
    + [("max_guidance", value) for value in (0, True, "5", None, math.nan)],
)
def test_settings_are_numbers(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name}: expected a"):
        RealTimeChunking(**{name: value})


def test_an_engine_without_gradients_is_refused_when_the_policy_is_made() -> None:
    with pytest.raises(
        EngineError, match='Use jacobian="identity" .--real-time identity., or engine reference'
    ):
        policy(ROBOTS["libero"], ANSWER, real_time=RealTimeChunking())


def test_statistics_that_do_not_come_back() -> None:
    one = pipeline(ROBOTS["libero"])
    stats = {"mean": np.zeros(14), "std": np.ones(14)}
    other = make_normalizer("actions", "mean_std", "openpi", stats)
    made = type(one)(**{**vars(one), "target_stats": other})
    with pytest.raises(ConfigError, match="normalises actions as it unnormalises them, found that"):
        Policy(made, FakeEngine(ANSWER), real_time=IDENTITY)


def test_a_dimension_that_never_moved_is_not_guided() -> None:
    one = pipeline(ROBOTS["libero"])
    stats = {"mean": np.zeros(14), "std": np.array([1.0] * 6 + [0.0] + [1.0] * 7)}
    flat = make_normalizer("actions", "mean_std", "lerobot", stats)
    made = type(one)(**{**vars(one), "action_stats": flat, "target_stats": flat})
    found = Policy(made, FakeEngine(ANSWER), real_time=IDENTITY)
    result = found.infer(observation("libero"), previous=np.full((10, 7), 0.5), delay=2)
    assert np.isfinite(result["actions"]).all()
    assert np.abs(result["model_actions"][:10, 6] - ANSWER[0, :10, 6].numpy()).max() < 1e-4
