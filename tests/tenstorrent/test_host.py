"""The network with a card's numerics, on the host."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pi0.checkpoint.layouts import LAYOUTS
from pi0.checkpoint.load import Checkpoint, load_model, open_checkpoint
from pi0.checkpoint.synth import synthesise
from pi0.cli.main import main
from pi0.config import PRESETS
from pi0.engines.base import Engine, EngineOptions, make_engine
from pi0.engines.tenstorrent import engine as engine_module
from pi0.engines.tenstorrent import network, timestep
from pi0.engines.tenstorrent.backend import Upload
from pi0.engines.tenstorrent.engine import TtnnHostEngine
from pi0.engines.tenstorrent.golden import HostTensor
from pi0.engines.tenstorrent.host import HostBackend
from pi0.engines.tenstorrent.weights import RmsNorm
from pi0.errors import ConfigError, EngineError
from pi0.inputs import ModelInputs, random_inputs
from pi0.model import Pi0
from pi0.verify.cases import default_cases
from pi0.verify.run import VerifyResult, verify

pytestmark = pytest.mark.ttnn


@pytest.fixture(scope="module")
def checkpoint(either_path: Path) -> Checkpoint:
    return open_checkpoint(either_path)


@pytest.fixture(scope="module")
def pi05(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("pi05")
    synthesise(folder, PRESETS["pi05_tiny"], LAYOUTS["openpi"], seed=0, dtype=torch.float32)
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def backend(tiny_path: Path) -> HostBackend:
    made = TtnnHostEngine(open_checkpoint(tiny_path), EngineOptions("accurate")).backend
    assert isinstance(made, HostBackend)
    return made


def run(
    checkpoint: Checkpoint, precision: str, plant=lambda engine: None, **options
) -> VerifyResult:
    def candidate():
        engine = make_engine(f"ttnn-host:{precision}", checkpoint)
        plant(engine)
        return engine

    return verify(
        lambda: make_engine("reference", checkpoint),
        candidate,
        default_cases(checkpoint.config, cameras=3, tokens=40),
        **{"steps": 2, **options},
    )


@pytest.mark.parametrize("mode", ["chained", "isolated"])
@pytest.mark.parametrize("precision", ["accurate", "fast"])
def test_agrees_with_the_reference(checkpoint: Checkpoint, mode: str, precision: str) -> None:
    result = run(checkpoint, precision, mode=mode, layers=True)
    assert result.first_failure is None
    names = [row.name for row in result.rows if row.case == "masked"]
    condition = checkpoint.config.adaptive_norm
    wanted = 11 + condition + 6 + 2 * 4 + 2 + 2 + 1 + 3 + (mode == "chained")  # end, loop, kept
    assert len(names) == wanted, "every stage and block is compared"


def test_unrounded(checkpoint: Checkpoint) -> None:
    """The network itself, padding, packing and folding included, is the model's."""
    result = run(checkpoint, "exact", layers=True)
    assert result.first_failure is None
    assert max(row.comparison.rel_l2 for row in result.rows) <= 2e-5


@pytest.mark.parametrize("precision", ["accurate", "fast"])
def test_one_full_width_layer(one_layer_path: Path, precision: str) -> None:
    """At 70 pixels, 25 patches: sums are as long as in the real model, and padding is there."""
    opened = open_checkpoint(one_layer_path)
    inputs, noise = random_inputs(opened.config.with_image_size(70), 2, 20, 0)
    reference = make_engine("reference", opened, image_size=70)
    candidate = make_engine(f"ttnn-host:{precision}", opened, image_size=70)
    seen: list[dict[str, torch.Tensor]] = []
    for engine in (reference, candidate):
        record: dict[str, torch.Tensor] = {}

        def tap(name: str, value: torch.Tensor, record=record) -> torch.Tensor:
            record[name] = value.double()
            return value

        cache = engine.prefill(inputs, tap)
        engine.velocity(noise, torch.ones(1), cache, tap)
        seen.append(record)
    # bfloat16 keeps 8 bits, a block of 16 values 7 bits of its largest; errors of a tower's
    # matrices add up in squares.
    tolerance = {"accurate": 0.01, "fast": 0.03}[precision]
    for name, wanted in seen[0].items():
        error = (seen[1][name] - wanted).norm() / wanted.norm()
        assert error <= tolerance, name


def test_every_report_says_what_the_numbers_are(
    tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    page = tmp_path / "report.html"
    words = ["verify", str(tiny_path), "--engines", "reference", "ttnn-host", "--steps", "1"]
    for more in (["--report", str(page)], ["--json"]):
        monkeypatch.setattr("sys.argv", ["pi0", *words, "--oracle", "none", *more])
        with pytest.raises(SystemExit) as done:
            main()
        assert not done.value.code
        assert "no card was used" in capsys.readouterr().out
    assert "no card was used" in page.read_text()


def no_vision_mask(engine: TtnnHostEngine) -> None:
    on = engine._on

    def unmasked(inputs, batch=1):
        return replace(on(inputs, batch), vision_mask=None)

    engine._on = unmasked


def padded_prefix_seen(engine: TtnnHostEngine) -> None:
    """The masks of the prefix are computed and not passed."""
    for ops in (engine.network.ops, engine.network.loop):
        attend_masked = ops.attention

        def unmasked(q, k, v, mask, scale, attend_masked=attend_masked):
            if scale == network.SCALED:  # of the trunks
                mask = HostTensor(torch.zeros_like(mask.value), mask.dtype)
            return attend_masked(q, k, v, mask, scale)

        ops.attention = unmasked


@pytest.mark.parametrize(
    ("plant", "stage"),
    [
        (no_vision_mask, "vision_tower"),
        (padded_prefix_seen, "vlm_transformer"),
    ],
)
def test_planted_bug(checkpoint: Checkpoint, plant, stage: str) -> None:
    failure = run(checkpoint, "accurate", plant, mode="isolated").first_failure
    assert failure is not None
    assert failure.name.partition(".")[0] == stage


@pytest.mark.parametrize(
    "mistake",
    [
        lambda norm: replace(norm, gate=replace(norm.gate, value=torch.ones_like(norm.gate.value))),
        lambda norm: replace(norm, shift=None),
        lambda norm: replace(norm, weight=norm.gate, gate=norm.weight),
        lambda norm: replace(norm, weight=norm.shift, shift=norm.weight),
    ],
    ids=["ungated", "unshifted", "gate-scales", "scale-shifts"],
)
def test_planted_bug_in_adaptive_norms(
    pi05: Checkpoint, monkeypatch: pytest.MonkeyPatch, mistake: Callable[[RmsNorm], RmsNorm]
) -> None:
    right = timestep._put_norm
    monkeypatch.setattr(timestep, "_put_norm", lambda *args: mistake(right(*args)))
    failure = run(pi05, "accurate", mode="isolated", layers=True).first_failure
    assert failure is not None
    assert failure.name.startswith("expert_transformer.block.0")


def test_timestep_of_another_step(pi05: Checkpoint) -> None:
    """The expert's norms stay at the first step's time."""

    def plant(engine: TtnnHostEngine) -> None:
        put = engine._put_timesteps
        engine._put_timesteps = lambda t, *tap: put(torch.ones_like(t), *tap)

    failure = run(pi05, "accurate", plant, mode="isolated").first_failure
    assert failure is not None
    assert failure.name == "velocity.1"


def test_a_batch_is_its_rows(checkpoint: Checkpoint) -> None:
    """Five observations in two passes of three, the last one filled up: each with its own prefix,
    masks and positions."""
    engine = make_engine("ttnn-host:exact", checkpoint)
    rows = [random_inputs(engine.config, 2, 10, seed) for seed in range(5)]
    for i, (row, _) in enumerate(rows):
        row.token_mask[:, 10 - i :] = False
        row.image_mask[:, 1] = i != 2
    batch = ModelInputs.joined([row for row, _ in rows])
    calls: list[int] = []
    noise = torch.cat([noise for _, noise in rows])
    together = engine.sample(batch, noise, 2, lambda: calls.append(1))
    assert len(calls) == 2, "steps, not those of each pass"
    apart = torch.cat([engine.sample(row, noise, steps=2) for row, noise in rows])
    assert together.shape == apart.shape
    assert (together - apart).abs().max() <= 2e-5 * apart.abs().max()
    with pytest.raises(EngineError, match="expected one observation, found 5"):
        engine.prefill(batch)


@pytest.mark.parametrize(("steps", "tolerance"), [(1, 1e-6), (3, 0.01)])
def test_sampling_is_the_loop_of_velocities(
    checkpoint: Checkpoint, steps: int, tolerance: float
) -> None:
    """One step is the base class's; in later ones the last bit of a float32 state, which is
    multiplied here and divided there, decides some roundings to bfloat16."""
    engine = make_engine("ttnn-host", checkpoint)
    inputs, noise = random_inputs(engine.config, 2, 10, 0)
    calls: list[int] = []
    ours = engine.sample(inputs, noise, steps, lambda: calls.append(1))
    base = Engine.sample(engine, inputs, noise, steps)
    assert (ours - base).norm() <= tolerance * base.norm()
    assert len(calls) == steps
    with pytest.raises(ConfigError, match="steps: expected 1 to 10000, found 0"):
        make_engine("ttnn-host", checkpoint).sample(inputs, noise, 0)


@pytest.mark.parametrize("t", [0.013, 0.5, 1.0])
def test_velocity_at_any_time(checkpoint: Checkpoint, t: float) -> None:
    """Of a schedule or not; in float32 but for the trunks, so the limit is theirs."""
    inputs, noise = random_inputs(checkpoint.config, 2, 10, 0)
    engines = make_engine("reference", checkpoint), make_engine("ttnn-host", checkpoint)
    wanted, found = (e.velocity(noise, torch.tensor([t]), e.prefill(inputs)) for e in engines)
    assert (found - wanted).norm() <= 0.03 * wanted.norm()


def test_other_numbers_of_steps(checkpoint: Checkpoint) -> None:
    """What is uploaded for one schedule is not taken for another."""
    engine = make_engine("ttnn-host", checkpoint)
    inputs, noise = random_inputs(engine.config, 1, 6, 0)
    first, other, again = (engine.sample(inputs, noise, steps) for steps in (2, 3, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


finite = st.floats(-(2.0**100), 2.0**100, width=32)


@given(arrays("float32", (32, 32), elements=finite))
def test_bfloat16_rounds_as_torch(values) -> None:
    """TTNN's own conversion of every value is torch's: so torch may do it on the host."""
    import ttnn

    x = torch.tensor(values)
    packed = ttnn.from_torch(x, dtype=ttnn.bfloat16, layout=ttnn.TILE_LAYOUT)
    normal = (x == 0) | (x.abs() >= torch.finfo(torch.float32).tiny)  # the rest is flushed to 0
    assert torch.equal(ttnn.to_torch(packed)[normal], x.to(torch.bfloat16)[normal])


def test_blocks_share_an_exponent(backend: HostBackend) -> None:
    x = torch.full((1, 1, 32, 32), 1e-3)
    x[0, 0, 0, 0] = 1.0
    got = backend.get(backend.put(Upload(x, "bfloat8_b")))[0, 0]
    assert got[0, :16].tolist() == [1.0, *[0.0] * 15], "below 1/128 of its block's largest"
    assert torch.allclose(got[0, 16:], x[0, 0, 0, 16:], rtol=0.01)
    assert torch.allclose(got[1], x[0, 0, 1], rtol=0.01)


@pytest.mark.parametrize("precision", ["accurate", "fast"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_one_damaged_weight_gives_no_actions(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, precision: str, value: float
) -> None:
    """Loading refuses what is not finite; here it is damaged afterwards."""
    inputs, noise = random_inputs(checkpoint.config, 2, 6, 0)
    names = [name for name, _ in load_model(checkpoint).named_parameters()]
    finite = []
    for name in names:
        if ".blocks.1." in name or name == "vlm.norm.weight":
            continue

        def damaged(*args: object, name: str = name) -> Pi0:
            model = load_model(*args)
            parameter = model.get_parameter(name).data
            at = inputs.tokens[0, 0] if name.startswith("token_embedding") else 0
            parameter[at].view(-1)[parameter[at].numel() // 3] = value
            return model

        monkeypatch.setattr(engine_module, "load_model", damaged)
        engine = make_engine(f"ttnn-host:{precision}", checkpoint)
        try:
            engine.sample(inputs, noise, 1)
        except EngineError:
            continue
        finite.append(name)
    assert not finite


@pytest.mark.parametrize("precision", ["accurate", "fast"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("part", [0, 1, 2], ids=["scale", "shift", "gate"])
def test_a_modulation_that_is_not_finite_gives_no_actions(
    pi05: Checkpoint, monkeypatch: pytest.MonkeyPatch, part: int, value: float, precision: str
) -> None:
    """The dense layers of adaptive norms are finite and what they make of a time overflows."""
    width = pi05.config.expert.width
    right = timestep._put_norm
    inputs, noise = random_inputs(pi05.config, 1, 6, 0)
    engine = make_engine(f"ttnn-host:{precision}", pi05)
    for damaged in range(5):  # both norms of both layers, and the final one, whose gate is not used
        if (damaged, part) == (4, 2):
            continue
        count = itertools.count()

        def put_norm(rows: torch.Tensor, *args: object, damaged=damaged, count=count) -> RmsNorm:
            rows = rows.clone()
            if next(count) == damaged:
                rows[0, part * width + 3] = value
            return right(rows, *args)

        monkeypatch.setattr(timestep, "_put_norm", put_norm)
        engine._timesteps = []
        with pytest.raises(EngineError, match="actions: expected finite values"):
            engine.sample(inputs, noise, 1)
