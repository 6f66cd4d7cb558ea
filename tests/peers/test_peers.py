"""Implementations that we did not write, on the same weights, inputs and noise.

Tolerance: all compute in float32 but order sums differently, and transformers has the angles of the
time embedding in float32; the largest difference seen is 3e-5 at values of about 4. 1e-4 is far
below any planted bug.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pi0.checkpoint.layouts import LAYOUTS
from pi0.checkpoint.load import Checkpoint, open_checkpoint
from pi0.checkpoint.synth import synthesise
from pi0.config import PRESETS
from pi0.engines.base import Engine, EngineOptions, make_engine
from pi0.engines.reference import ReferenceEngine
from pi0.engines.registry import find_engine
from pi0.errors import EngineError
from pi0.inputs import random_inputs
from pi0.model import STAGES
from pi0.peers.engine import PeerEngine
from pi0.trace import trace
from pi0.verify.cases import default_cases
from pi0.verify.run import verify

TOLERANCE = 1e-4


def has(name: str) -> bool:
    try:
        find_engine(name).check_available(PRESETS["tiny"], EngineOptions("float32"))
    except EngineError:
        return False
    return True


needs_transformers = pytest.mark.skipif(
    not has("transformers"), reason="needs transformers >= 5.5 (pip install '.[test]')"
)
needs_lerobot = pytest.mark.skipif(
    not has("lerobot"), reason="needs LeRobot in .venv-lerobot (make .venv-lerobot/installed)"
)
BOTH = [
    pytest.param("transformers", marks=needs_transformers),
    pytest.param("lerobot", marks=needs_lerobot),
]


@pytest.fixture(scope="module")
def checkpoint(tiny_path: Path) -> Checkpoint:
    return open_checkpoint(tiny_path)


@pytest.fixture(scope="module")
def ours(checkpoint: Checkpoint) -> Engine:
    return make_engine("reference", checkpoint)


@pytest.fixture(scope="module", params=BOTH)
def theirs(checkpoint: Checkpoint, request: pytest.FixtureRequest) -> PeerEngine:
    made = make_engine(request.param, checkpoint)
    assert isinstance(made, PeerEngine)
    return made


@pytest.mark.parametrize(("masked", "text"), [(False, 16), (False, 9), (True, 9)])
def test_agree(ours: Engine, theirs: PeerEngine, masked: bool, text: int) -> None:
    inputs, noise = random_inputs(ours.config, cameras=3, tokens=16, seed=1)
    inputs.image_mask[0, 1] = not masked
    inputs.token_mask[0, text:] = False
    cache, their_cache = ours.prefill(inputs), theirs.prefill(inputs)
    for t in (1.0, 0.5, 0.1):
        given = noise, torch.tensor([t])
        wanted = ours.velocity(*given, cache)
        got = theirs.velocity(*given, their_cache)
        torch.testing.assert_close(got, wanted, atol=TOLERANCE, rtol=0)
    wanted = ours.sample(inputs, noise)
    assert wanted.abs().max() > 0.5
    torch.testing.assert_close(theirs.sample(inputs, noise), wanted, atol=TOLERANCE, rtol=0)
    assert theirs.own_seconds > 0
    assert theirs.peak_memory()[0] > 1e8


@needs_lerobot
@pytest.mark.parametrize(("masked", "text"), [(False, 200), (True, 60)])
def test_pi05(tmp_path: Path, masked: bool, text: int) -> None:
    """A prompt of 200 tokens; LeRobot alone has a π0.5. A state is not read by either."""
    config = replace(PRESETS["pi05_tiny"], horizon=10)
    synthesise(tmp_path, config, LAYOUTS["openpi"], 0, torch.float32)
    checkpoint = open_checkpoint(tmp_path)
    ours, theirs = (make_engine(name, checkpoint) for name in ("reference", "lerobot"))
    inputs, noise = random_inputs(config, cameras=3, tokens=200, seed=1)
    inputs.image_mask[0, 1] = not masked
    inputs.token_mask[0, text:] = False
    cache, their_cache = ours.prefill(inputs), theirs.prefill(inputs)
    for t in (1.0, 0.5, 0.1):
        given = noise, torch.tensor([t])
        wanted, got = ours.velocity(*given, cache), theirs.velocity(*given, their_cache)
        torch.testing.assert_close(got, wanted, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(
        theirs.sample(inputs, noise), ours.sample(inputs, noise), atol=TOLERANCE, rtol=0
    )


@needs_transformers
def test_transformers_has_no_pi05(tmp_path: Path) -> None:
    synthesise(tmp_path, PRESETS["pi05_tiny"], LAYOUTS["openpi"], 0, torch.float32)
    with pytest.raises(EngineError, match="expected a π0, found a π0.5"):
        make_engine("transformers", open_checkpoint(tmp_path))


@needs_lerobot
def test_prefix_of_lerobot(ours: Engine, checkpoint: Checkpoint) -> None:
    inputs, _ = random_inputs(ours.config, cameras=2, tokens=5, seed=0)
    seen: dict[str, list[torch.Tensor]] = {}

    def tap(name: str, value: torch.Tensor) -> torch.Tensor:
        seen.setdefault(name, []).append(value)
        return value

    for engine in (ours, make_engine("lerobot", checkpoint)):
        engine.prefill(inputs, tap)
    torch.testing.assert_close(*seen["prefix"], atol=TOLERANCE, rtol=0)


@needs_transformers
def test_any_layout(ours: Engine, tmp_path: Path) -> None:
    """They get the weights from our reader, whatever the file's names."""
    synthesise(tmp_path, PRESETS["tiny"], LAYOUTS["lerobot"], 0, torch.float32)
    inputs, noise = random_inputs(ours.config, cameras=1, tokens=5, seed=0)
    theirs = make_engine("transformers", open_checkpoint(tmp_path))
    wanted = ours.sample(inputs, noise)
    torch.testing.assert_close(theirs.sample(inputs, noise), wanted, atol=TOLERANCE, rtol=0)


def drop_mask(engine: ReferenceEngine) -> None:
    """Masked cameras and padded text are seen."""
    embed = engine.model.embed_prefix

    def unmasked(inputs, tap):
        prefix, valid = embed(inputs, tap)
        return prefix, torch.ones_like(valid)

    engine.model.embed_prefix = unmasked


@needs_transformers
def test_what_both_engines_leave_out(checkpoint: Checkpoint) -> None:
    """Both drop the prefix mask and agree to the bit; the third engine does not."""

    def make() -> ReferenceEngine:
        engine = ReferenceEngine(checkpoint, EngineOptions("float32"))
        drop_mask(engine)
        return engine

    result = verify(
        make,
        make,
        default_cases(checkpoint.config, cameras=3, tokens=16),
        steps=1,
        oracle=lambda: make_engine("transformers", checkpoint),
    )
    failed = [(row.case, row.name) for row in result.rows if not row.passed]
    assert failed == [
        ("masked", "masked_content.reference"),
        ("masked", "masked_content.candidate"),
        ("masked", "oracle.velocity.0"),
        ("masked", "oracle.end"),
        ("masked", "oracle.actions"),
    ]


@needs_transformers
def test_as_candidate(checkpoint: Checkpoint) -> None:
    """Stages that it does not show are named, not passed over."""
    result = verify(
        lambda: make_engine("reference", checkpoint),
        lambda: make_engine("transformers", checkpoint),
        default_cases(checkpoint.config, cameras=2, tokens=8),
        steps=1,
    )
    assert result.first_failure is None
    assert result.missing["vision_tower"] == "engine transformers does not show its stages"
    assert "velocity" not in result.missing
    (limit,) = {row.limit.max_rel_l2 for row in result.rows if row.name == "velocity"}
    assert limit == 2e-4, "that of another implementation in float32"


def test_trace_of_an_engine_that_shows_little(theirs: PeerEngine) -> None:
    """What it shows, and by name what it does not; without a mask, no slices of one."""
    inputs, noise = random_inputs(theirs.config, cameras=2, tokens=5, seed=0)
    traced = trace(theirs, inputs, noise)
    shown = [row.stage for row in traced.stages]
    assert shown[-1] == "velocity"
    assert sorted([*shown, *traced.not_shown]) == sorted(STAGES)
    assert "vision_tower" in traced.not_shown
    assert (traced.prefix, traced.total, traced.slices) == (2 * 4 + 5, 2 * 4 + 5 + 51, [])


@needs_transformers
def test_dead_worker(checkpoint: Checkpoint) -> None:
    engine = make_engine("transformers", checkpoint)
    assert isinstance(engine, PeerEngine)
    engine._worker.kill()
    inputs, noise = random_inputs(engine.config, cameras=1, tokens=3, seed=0)
    with pytest.raises(EngineError, match="expected an answer of its process, found that it ended"):
        engine.sample(inputs, noise)


@needs_transformers
def test_refusals(checkpoint: Checkpoint) -> None:
    with pytest.raises(EngineError, match="expected the checkpoint's 28 for engine transformers"):
        make_engine("transformers", checkpoint, image_size=56)
    with pytest.raises(EngineError, match="expected cpu or cuda, found 'tpu'"):
        make_engine("transformers@tpu", checkpoint)


@needs_transformers
@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_worker_without_the_device(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their interpreter may have another PyTorch than ours."""
    monkeypatch.setattr("pi0.peers.engine.parse_device", lambda name: None)
    with pytest.raises(EngineError, match="engine transformers: device cuda:99: expected a PyTor"):
        make_engine("transformers@cuda:99", checkpoint)


def test_not_installed(tiny_path: Path, tmp_path: Path) -> None:
    """In an interpreter without them, found by hiding them."""
    script = (
        "import importlib.util as u, sys; find = u.find_spec; "
        "u.find_spec = lambda n, *a: None if n in ('transformers', 'lerobot') else find(n, *a); "
        "from pi0.cli.main import main; main()"
    )
    for engine in ("transformers", "lerobot"):
        done = subprocess.run(
            [sys.executable, "-c", script, "trace", str(tiny_path), "--engine", engine],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={k: v for k, v in os.environ.items() if k != "PI0_LEROBOT_PYTHON"},
        )
        assert done.returncode == 2
        assert f"engine {engine}: expected it installed, found none. Install it" in done.stderr


@needs_transformers
def test_close_ends_the_process(checkpoint: Checkpoint) -> None:
    with make_engine("transformers", checkpoint) as engine:
        assert isinstance(engine, PeerEngine)
        assert engine.info["implementation"].startswith("transformers ")
        assert engine._worker.poll() is None
    assert engine._worker.poll() is not None
    engine.close()
    inputs, noise = random_inputs(engine.config, cameras=1, tokens=3, seed=0)
    with pytest.raises(EngineError, match="engine transformers: expected an open engine"):
        engine.sample(inputs, noise)
    with pytest.raises(EngineError, match="engine transformers: expected an open engine"):
        engine.prefill(inputs)


@pytest.mark.parametrize("name", BOTH)
def test_the_policy_that_ships(name: str) -> None:
    """Its state and actions are narrower than those of the published models."""
    opened = open_checkpoint("tabletop")
    inputs, noise = random_inputs(opened.config, 2, 9, 0)
    with make_engine("reference", opened) as ours, make_engine(name, opened) as theirs:
        wanted = ours.sample(inputs, noise)
        assert (theirs.sample(inputs, noise) - wanted).abs().max() < TOLERANCE
