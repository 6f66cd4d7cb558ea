"""Verify must blame the right stage for every planted bug, and nothing where there is none."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor
from torch.nn import functional

from pi0.checkpoint.load import Checkpoint, open_checkpoint
from pi0.config import PRESETS
from pi0.engines.base import EngineOptions, make_engine
from pi0.engines.fast.cpu.engine import CpuEngine
from pi0.engines.reference import ReferenceEngine
from pi0.engines.registry import BUILT_IN, find_engine
from pi0.errors import CheckpointError, EngineError
from pi0.inputs import random_inputs
from pi0.model.gemma import RMSNorm
from pi0.verify.cases import CHANGES, Case, default_cases, one_change_each
from pi0.verify.clean import CLEAN
from pi0.verify.compare import Comparison, compare
from pi0.verify.record import TOGETHER, EngineRun
from pi0.verify.rows import sample_rows
from pi0.verify.run import VerifyResult, record_reference, verify
from pi0.verify.thresholds import GAIN_SHARE, MULTIPLE, limits_of, looser, threshold

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from verify_limits import docs_tables  # noqa: E402

Plant = Callable[[ReferenceEngine], None]

BATCHES = [f"{row}.{name}" for row in ("sample", "loop") for name in TOGETHER]


def unscaled_text(engine: ReferenceEngine) -> None:
    engine.model.token_embedding.weight /= engine.config.vlm.width**0.5


def forgotten_one_plus_w(engine: ReferenceEngine) -> None:
    for module in engine.model.vlm.modules():
        if isinstance(module, RMSNorm):
            module.weight -= 1


def rope_restarted(engine: ReferenceEngine) -> None:
    original = engine.model.mask_and_positions

    def join(valid: Tensor, tap: Any) -> tuple[Tensor, Tensor]:
        mask, positions = original(valid, tap)
        n = valid.shape[1]
        positions[:, n:] -= positions[:, n : n + 1].clone()
        return mask, positions

    engine.model.mask_and_positions = join


def mask_cut_in_both_dimensions(engine: ReferenceEngine) -> None:
    """The expert sees suffix→suffix only."""
    original = engine.model.mask_and_positions

    def join(valid: Tensor, tap: Any) -> tuple[Tensor, Tensor]:
        mask, positions = original(valid, tap)
        mask = mask.clone()
        mask[:, :, : valid.shape[1]] = False
        return mask, positions

    engine.model.mask_and_positions = join


def mask_rows_not_cut(engine: ReferenceEngine) -> None:
    """The expert's queries get the mask's first rows, those of the prefix, with all columns."""
    original = engine.model.mask_and_positions

    def join(valid: Tensor, tap: Any) -> tuple[Tensor, Tensor]:
        mask, positions = original(valid, tap)
        n = valid.shape[1]
        mask = mask.clone()
        mask[:, n:] = mask[:, : mask.shape[1] - n].clone()
        return mask, positions

    engine.model.mask_and_positions = join


def erf_gelu(engine: ReferenceEngine) -> None:
    """The exact form, everywhere, while this engine runs."""
    original = functional.gelu
    for name in ("prefill", "velocity"):
        method = getattr(engine, name)

        def run(*args: Any, method: Any = method) -> Any:
            functional.gelu = lambda x, approximate: original(x)
            try:
                return method(*args)
            finally:
                functional.gelu = original

        setattr(engine, name, run)


def scaled_image_features(engine: ReferenceEngine) -> None:
    engine.model.projector.weight *= engine.config.vlm.width**-0.5


def padding_counted(engine: ReferenceEngine) -> None:
    """Sees masked cameras and padded text: only the masked case can show it."""
    original = engine.model.embed_prefix

    def embed(inputs: Any, tap: Any) -> tuple[Tensor, Tensor]:
        prefix, valid = original(inputs, tap)
        return prefix, torch.ones_like(valid)

    engine.model.embed_prefix = embed


@pytest.fixture(scope="module")
def checkpoint(tiny_path: Path) -> Checkpoint:
    return open_checkpoint(tiny_path)


def run(
    checkpoint: Checkpoint,
    plant: Plant | None = None,
    reference_plant: Plant | None = None,
    **options: Any,
) -> VerifyResult:
    def make(plant: Plant | None, dtype: str) -> ReferenceEngine:
        engine = ReferenceEngine(checkpoint, EngineOptions(dtype))
        if plant:
            with torch.no_grad():
                plant(engine)
        return engine

    cases = default_cases(checkpoint.config, cameras=3, tokens=16)
    precision = options.pop("precision", "float32")
    options = {"mode": "isolated", "steps": 2, **options}
    return verify(
        lambda: make(reference_plant, "float32"),
        lambda: make(plant, precision),
        cases,
        **options,
    )


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_no_bug(checkpoint: Checkpoint, precision: str) -> None:
    result = run(checkpoint, mode="both", precision=precision, layers=True)
    assert result.first_failure is None
    stages, blocks, steps = 11, 2 + 2 * 3 + 2 * 3, 2 + 1  # and at t = 0
    masked = {
        part: [row.name for row in result.rows if (row.case, row.part) == ("masked", part)]
        for part in ("structure", "isolated", "chained")
    }
    alone = len(masked["structure"] if precision == "float32" else masked["isolated"])
    assert alone == stages + blocks + steps + (precision == "float32")  # and sample
    chained = stages + blocks + steps + 2 + 3  # masked content, actions, loop, velocity.kept
    assert len(masked["chained"]) == chained + (precision == "bfloat16")
    each = (row for row in result.rows if row.name not in BATCHES)  # other sums
    exact = {row.comparison.rel_l2 == 0 for row in each}
    assert exact == ({True} if precision == "float32" else {True, False})


def test_computation_apart_from_rounding(checkpoint: Checkpoint) -> None:
    """A bug far below the rounding of bfloat16 shows in the same code without it."""

    def make(precision: str, wrong: bool) -> ReferenceEngine:
        engine = ReferenceEngine(checkpoint, EngineOptions(precision))
        if wrong:
            engine.model.vlm.blocks[1].down_proj.weight.data *= 1.0005
        return engine

    cases = default_cases(checkpoint.config, cameras=3, tokens=16)
    result = verify(
        lambda: make("float32", False),
        lambda: make("bfloat16", True),
        cases,
        steps=1,
        unrounded=lambda: make("float32", True),
    )
    assert result.structure == "reference:float32"
    failed = {(row.part, row.name) for row in result.rows if not row.passed}
    assert ("structure", "vlm_transformer.block.1") in failed
    assert {part for part, _ in failed} == {"structure"}


@pytest.mark.parametrize(
    ("plant", "case", "stage"),
    [
        (unscaled_text, "all valid", "token_embedding"),
        (scaled_image_features, "all valid", "projector"),
        (erf_gelu, "all valid", "vision_tower.block.0"),
        (forgotten_one_plus_w, "all valid", "vlm_transformer.block.0.keys"),
        (rope_restarted, "all valid", "expert_transformer.block.0.keys"),
        (mask_cut_in_both_dimensions, "all valid", "expert_transformer.block.0"),
        (mask_rows_not_cut, "all valid", "expert_transformer.block.0"),
        (padding_counted, "masked", "vlm_transformer.block.0.keys"),
    ],
)
@pytest.mark.parametrize("mode", ["chained", "isolated"])
def test_planted_bug(
    checkpoint: Checkpoint, plant: Plant, case: str, stage: str, mode: str
) -> None:
    failure = run(checkpoint, plant, mode=mode).first_failure
    assert failure is not None
    assert (failure.case, failure.name) == (case, stage)


def test_bug_in_the_engines_own_loop(checkpoint: Checkpoint) -> None:
    """Stages and velocities are right; what `sample` makes of them is not."""

    def plant(engine: ReferenceEngine) -> None:
        sample = engine._sample
        engine._sample = lambda inputs, noise, steps, on_step: sample(
            inputs, noise, steps + 1, on_step
        )

    result = run(checkpoint, plant, mode="chained")
    failed = {row.name for row in result.rows if not row.passed}
    calls = ("first", *CHANGES, "together", "alike")
    assert failed == {"sample", "loop", *(f"sample.{name}" for name in calls)}


def test_noise_that_leaves_a_policy_between_two_ways_to_act() -> None:
    """Rounding alone would decide: other noise is drawn; of given inputs it is only said."""
    policy = open_checkpoint("tabletop")
    drawn = default_cases(policy.config, cameras=3, tokens=policy.config.max_tokens, seed=2)
    theirs = [replace(case, name=f"given, {case.name}", given=True) for case in drawn]
    found = record_reference(lambda: make_engine("reference", policy), [*drawn, *theirs])
    pairs = zip([*drawn, *theirs], found.cases, strict=True)
    assert [torch.equal(before.noise, after.noise) for before, after in pairs] == [
        True, False, True, True
    ]  # fmt: skip
    (note,) = found.notes
    assert note.startswith("given, masked: here the policy is about to turn"), note


def test_a_model_whose_training_has_hardly_begun(checkpoint: Checkpoint) -> None:
    """What it moves is lost in the rounding of actions, where others are computed with it."""

    def plant(engine: ReferenceEngine) -> None:
        for parameter in engine.model.action_out_proj.parameters():
            parameter *= 1e-3

    assert run(checkpoint, plant, plant).first_failure is None


def test_bug_in_both_engines(checkpoint: Checkpoint) -> None:
    """Both drop the prefix mask: no comparison between them can see it."""
    result = run(checkpoint, padding_counted, padding_counted)
    failed = [row.name for row in result.rows if not row.passed]
    assert failed == ["masked_content.reference", "masked_content.candidate"]
    others = [row for row in result.rows if row.name not in {*failed, *BATCHES}]
    assert all(row.comparison.rel_l2 == 0 for row in others)


@pytest.mark.parametrize(
    ("masked", "left"), [("token_mask", "vision_tower"), ("image_mask", "token_embedding")]
)
def test_nobody_sees_any_text_or_image(checkpoint: Checkpoint, masked: str, left: str) -> None:
    """What is masked altogether is not compared; the rest is."""
    case = default_cases(checkpoint.config, cameras=2, tokens=4)[0]
    getattr(case.inputs, masked)[:] = False

    def make() -> ReferenceEngine:
        return ReferenceEngine(checkpoint, EngineOptions("float32"))

    result = verify(make, make, [case], steps=1)
    assert result.first_failure is None
    names = {row.name for row in result.rows}
    assert names & {"vision_tower", "token_embedding"} == {left}


def test_isolated_blames_one_stage_only(checkpoint: Checkpoint) -> None:
    """Chained, everything after the bug differs; isolated, only where it was born."""
    result = run(checkpoint, unscaled_text, mode="both")
    failed = {
        part: {
            row.name
            for row in result.rows
            if row.part == part and not row.passed and not row.name.startswith("sample")
        }
        for part in ("structure", "chained")
    }
    assert failed["structure"] == {"token_embedding"}
    assert failed["chained"] > {"token_embedding", "prefix", "vlm_transformer", "velocity"}


def test_layers_blame_the_block(checkpoint: Checkpoint) -> None:
    def plant(engine: ReferenceEngine) -> None:
        engine.model.expert.blocks[1].o_proj.weight *= 1.01

    failed = [row.name for row in run(checkpoint, plant, layers=True).rows if not row.passed]
    assert failed[0] == "expert_transformer.block.1"


def test_a_failure_says_which_limit_and_both_numbers(checkpoint: Checkpoint) -> None:
    def plant(engine: ReferenceEngine) -> None:
        engine.model.projector.weight *= 1.5
        engine.model.projector.bias *= 1.5

    failure = run(checkpoint, plant).first_failure
    assert failure is not None
    assert failure.exceeded[-2:] == [
        "relative L2 5.00e-01 (limit: at most 1.00e-06)",
        "gain off by +5.00e-01 (limit: at most 1.00e-06)",
    ]
    rough = replace(failure, comparison=Comparison(0.5, 0.5, 0.1, 1.0, None))
    assert rough.exceeded == [
        "PCC 0.5 (limit: at least 0.999999)",
        "relative L2 1.00e-01 (limit: at most 1.00e-06)",
    ]
    lost = replace(failure, comparison=Comparison(0, 0, 0, 0, "candidate has 1 NaN"))
    assert lost.exceeded == ["candidate has 1 NaN"]


def test_a_reference_that_is_not_finite(checkpoint: Checkpoint) -> None:
    """The checkpoint is to blame, not the candidate, which is not even made."""

    def plant(engine: ReferenceEngine) -> None:
        engine.model.projector.weight[0, 0] = float("nan")

    with pytest.raises(
        CheckpointError, match=r"NaN or infinite values, first at projector \(all valid\)"
    ):
        run(checkpoint, lambda engine: pytest.fail("made"), plant)


def test_every_precision_of_every_engine_has_limits() -> None:
    for name in BUILT_IN:
        engine = find_engine(name)
        for precision in engine.capabilities.precisions:
            assert threshold("prefix", limits_of(engine, precision)).max_rel_l2 < 0.2


def test_the_looser_limit_counts() -> None:
    float32, int8 = (limits_of(CpuEngine, name) for name in ("float32", "int8"))
    both = looser(float32, int8)
    for name in ("velocity.3", "vlm_transformer.block.1.keys", "actions"):
        assert threshold(name, both) == threshold(name, int8)
        assert threshold(name, both).max_rel_l2 > threshold(name, float32).max_rel_l2
    assert threshold("sequence", both).max_rel_l2 == 0


def test_limits_are_a_small_multiple_of_what_was_measured() -> None:
    measured = CLEAN["int8", "isolated", "vlm_transformer.keys"]
    limit = threshold("vlm_transformer.block.7.keys", limits_of(CpuEngine, "int8"), "isolated")
    rel_l2, gain = measured
    assert limit.max_rel_l2 == MULTIPLE * rel_l2
    assert limit.max_gain_error == MULTIPLE * max(gain, GAIN_SHARE * rel_l2)
    deep = threshold("vlm_transformer", limits_of(CpuEngine, "int8", depth=18))
    shallow = threshold("vlm_transformer", limits_of(CpuEngine, "int8"))
    assert deep.max_rel_l2 >= shallow.max_rel_l2, "errors add up"
    keys = "vlm_transformer.block.0.keys"
    wide, narrow = (
        threshold(keys, limits_of(CpuEngine, "float32", width=width), "structure").max_rel_l2
        for width in (2048, 256)
    )
    assert wide == 2 * narrow, "so do the roundings of a sum, as its square root"


def test_the_documented_figures_and_limits_are_those_of_the_code() -> None:
    page = (ROOT / "docs" / "verify.md").read_text(encoding="utf-8")
    assert "\n".join(docs_tables()) in page, "python benchmarks/verify_limits.py --docs"


@pytest.mark.parametrize(("candidate", "passes"), [(5e-4, True), (0.0, False)])
def test_a_response_smaller_than_rounding(candidate: float, passes: bool) -> None:
    """Any gain is chance then; but who gives the same bits as before has not noticed."""
    change, rounding = torch.eye(8)[0].repeat(8), torch.eye(8)[1].repeat(8)
    calls = ({"first": torch.zeros(64), "token": 1e-4 * change}, {"first": torch.zeros(64)})
    calls[1]["token"] = candidate * (0.5 * change + rounding)
    runs = [EngineRun(ReferenceEngine, "", "float32", 2, 64, moved=moved) for moved in calls]
    case = Case("c", *random_inputs(PRESETS["tiny"], 1, 4, 0))
    rows = sample_rows([case], *runs, limits_of(CpuEngine, "int8"))
    (row,) = (row for row in rows if row.name == "response.token")
    assert row.passed == passes


def test_every_call_differs_in_one_input(checkpoint: Checkpoint) -> None:
    calls = one_change_each(checkpoint.config, default_cases(checkpoint.config, 2, 8)[1])
    for before, after in itertools.pairwise(calls[:-1]):
        changed = [
            name
            for name, value in vars(after.inputs).items()
            if not value.equal(vars(before.inputs)[name])
        ]
        changed += ["noise"] if not before.noise.equal(after.noise) else []
        assert len(changed) == 1, after.name
    assert [call.name for call in calls] == ["first", *CHANGES, "again"]


def test_a_precision_without_limits() -> None:
    with pytest.raises(
        EngineError, match="Declare them on ReferenceEngine: thresholds = {'int3': {'\\*': Thresh"
    ):
        limits_of(ReferenceEngine, "int3")


finite = st.floats(-1e3, 1e3)


@given(arrays("float64", 20, elements=finite, unique=True))
def test_a_tensor_agrees_with_itself(x) -> None:
    got = compare(torch.tensor(x), torch.tensor(x))
    assert got.pcc == pytest.approx(1, abs=1e-12)
    assert (got.rel_l2, got.max_abs, got.fault) == (0, 0, None)


def test_comparison_by_hand() -> None:
    got = compare(torch.tensor([0.0, 3.0, 4.0]), torch.tensor([0.0, 6.0, 8.0]))
    assert got.pcc == pytest.approx(1), "blind to scale"
    assert got.cosine == pytest.approx(1)
    assert got.rel_l2 == pytest.approx(1), "which is why it never stands alone"
    assert got.max_abs == 4


@pytest.mark.parametrize(
    ("a", "b", "fault"),
    [
        ([1.0, 1.0], [1.0, 2.0], "reference is constant (1)"),
        ([1.0, 2.0], [3.0, 3.0], "candidate is constant (3)"),
        ([1.0, 2.0], [1.0, float("nan")], "candidate has 1 NaN"),
        ([1.0, float("inf")], [1.0, 2.0], "reference has 1 NaN or infinite"),
        ([1.0, 2.0], [1.0, 2.0, 3.0], "shape [3] instead of [2]"),
        ([], [], "no values"),
    ],
)
def test_faults(a: list[float], b: list[float], fault: str) -> None:
    got = compare(torch.tensor(a), torch.tensor(b))
    assert got.fault is not None
    assert fault in got.fault
    assert got.pcc != got.pcc, "no number to be mistaken for a result"
