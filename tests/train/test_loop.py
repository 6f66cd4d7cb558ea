"""Runs: what they write, how they stop and go on."""

from __future__ import annotations

import json
import os
import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from episodes import ALONE, FAST, PI05_SIZES, ROBOT, SIZES, Episodes, make_run

from pi0.checkpoint.load import load_model, open_checkpoint
from pi0.config import Pi0Config
from pi0.data.read import Dataset
from pi0.errors import ConfigError, Pi0Error
from pi0.policy import Policy, PolicyOptions, prepare
from pi0.train.log import LOG, PLOT, read_log
from pi0.train.loop import (
    LAST,
    LoopOptions,
    _require_same,
    keep_folder,
    require_folder,
    save,
    train,
)
from pi0.train.prepare import VOCABULARY, TrainOptions, prepare_run, settings_of
from pi0.train.save import STATE_FILE, load_state, save_state
from pi0.train.start import Start, find_start

SAVES = LoopOptions(log_every=2, save_every=3)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_model(open_checkpoint(folder)).named_parameters())


def test_resuming_is_bit_for_bit(tmp_path: Path) -> None:
    """6 steps at once, and 3, then 3 in another process's memory."""
    changes: dict[str, Any] = {"heads": (("aux.place", 0),), "draws": 2}
    straight = train(make_run(tmp_path / "a", **changes), tmp_path / "a", {}, SAVES)
    first = make_run(tmp_path / "b", **changes)
    for _ in range(3):
        first.trainer.step()
    save(first, tmp_path / "b", {})
    second = make_run(tmp_path / "b", **changes)
    resumed = train(second, tmp_path / "b", {}, SAVES, resume=True)
    assert straight.step == resumed.step == 6
    ours, theirs = weights_of(straight.checkpoint), weights_of(resumed.checkpoint)
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    a, b = (load_state(tmp_path / run / STATE_FILE) for run in "ab")
    for name in a["parameters"]:
        assert torch.equal(a["parameters"][name], b["parameters"][name])
    for x, y in zip(
        a["optimizer"]["state"].values(), b["optimizer"]["state"].values(), strict=True
    ):
        assert all(torch.equal(x[name], y[name]) for name in x)


def test_a_run_may_be_extended(tmp_path: Path) -> None:
    """Also one that is done; from there on it has the learning rates of the longer one."""
    train(make_run(tmp_path, optimizer=FAST), tmp_path, {"steps": "6"}, SAVES)
    longer = replace(FAST, steps=9)
    rates: list[float] = []

    def on_step(metrics: dict[str, float]) -> None:
        rates.append(metrics["learning_rate"])

    for again in (pytest.warns(UserWarning, match="that of a run of 9 steps"), nullcontext()):
        run = make_run(tmp_path, optimizer=longer)
        with again:
            done = train(run, tmp_path, {"steps": "9"}, SAVES, True, on_step)
        assert (done.step, done.checkpoint.name) == (9, "000009")
    assert rates == [longer.rate(step) for step in (6, 7, 8)]
    assert [entry["step"] for entry in read_log(tmp_path / LOG)][-1] == 9


def test_a_run_resumes_only_as_itself(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.trainer.step()
    save(run, tmp_path, {"draws": "1"})
    with pytest.raises(ConfigError, match="--resume: draws: expected 1, .* found 2"):
        train(make_run(tmp_path), tmp_path, {"draws": "2"}, SAVES, resume=True)
    with pytest.raises(ConfigError, match="expected a run to resume, found no training_state"):
        train(make_run(tmp_path / "new"), tmp_path / "new", {}, SAVES, resume=True)
    with pytest.raises(ConfigError, match="expected a folder without a run"):
        require_folder(tmp_path, resume=False)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "meta/info.json", ""])
def test_no_run_in_a_checkpoint_or_dataset(tmp_path: Path, name: str) -> None:
    """It would write its tokenizer over theirs."""
    path = tmp_path / "other" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    for resume in (False, True):
        with pytest.raises(
            ConfigError, match="other: expected a folder for the run, found (one|a)"
        ):
            require_folder(tmp_path / "other", resume)


def test_killed_while_it_saved(tmp_path: Path) -> None:
    """What was half-written goes, and a checkpoint without the state to go on from, which is of
    other learning rates if the run is extended."""
    train(make_run(tmp_path, optimizer=FAST), tmp_path, {"steps": "6"}, SAVES)
    (tmp_path / STATE_FILE).rename(tmp_path / "later")
    with pytest.raises(ConfigError, match="found no training_state.pt. Begin another run in anot"):
        require_folder(tmp_path, resume=True)
    with pytest.raises(ConfigError, match="found one. It was killed while it saved: delete it"):
        require_folder(tmp_path, resume=False)

    run = make_run(tmp_path, optimizer=FAST)
    for _ in range(3):
        run.trainer.step()
    save_state(tmp_path / STATE_FILE, {**run.trainer.state(), "settings": {"steps": "6"}})
    short = weights_of(tmp_path / LAST)
    part = tmp_path / "checkpoints/.000009.12345.part"
    part.mkdir()
    (part / "model.safetensors").write_bytes(b"half")
    longer = make_run(tmp_path, optimizer=replace(FAST, steps=9))
    with pytest.warns(UserWarning, match="that of a run of 9 steps"):
        train(longer, tmp_path, {"steps": "9"}, SAVES, resume=True)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["000003", "000006", "000009"]
    long = weights_of(tmp_path / "checkpoints/000006")
    assert not all(torch.equal(short[name], value) for name, value in long.items())


def test_killed_before_it_had_saved(tmp_path: Path) -> None:
    """The run is begun anew."""
    part = tmp_path / "checkpoints/.000003.12345.part/assets"
    part.mkdir(parents=True)
    train(make_run(tmp_path), tmp_path, {}, SAVES)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["000003", "000006"]


def test_a_run_that_fails_at_once_leaves_nothing(tmp_path: Path) -> None:
    """It is removed while no other run can have it, and so is what was made above it."""
    out = tmp_path / "new" / "run"
    with pytest.raises(ZeroDivisionError), keep_folder(out, first=True):
        print((out / LOG).write_text("{}") / 0)
    assert not (tmp_path / "new").exists()


def test_what_is_written(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    logged: list[dict[str, float]] = []
    outcome = train(run, tmp_path, {}, SAVES, on_log=logged.append)
    assert (outcome.step, outcome.signal) == (6, None)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["000003", "000006"]
    assert (tmp_path / LAST).resolve() == outcome.checkpoint.resolve()
    entries = read_log(tmp_path / LOG)
    assert [entry["step"] for entry in entries] == [2, 4, 6]
    assert entries == logged
    assert {"flow", "total", "learning_rate", "gradient_norm", "samples_per_second"} <= set(
        entries[0]
    )
    assert (tmp_path / PLOT).read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.rglob("*.part"))


def test_room_is_asked_for_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is found before the first step, not at the first checkpoint."""
    run = make_run(tmp_path / "run")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000, total=10**9))
    with pytest.raises(Pi0Error, match=r"training_state.pt: expected room for .* MB, found: No sp"):
        train(run, tmp_path / "out", {}, SAVES)
    assert run.trainer.done == 0
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_fills_up_later() -> None:
    """torch raises a RuntimeError of its own."""
    with pytest.raises(Pi0Error, match="/dev/full: expected room for the state of a run, found"):
        save_state(Path("/dev/full"), {"done": 1, "parameters": torch.zeros(300_000)})


def test_a_line_of_the_log_that_was_not_finished_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / LOG
    path.write_text('{"step": 2, "flow": 0.5}\n{"step": 4, "fl')
    assert read_log(path) == [{"step": 2.0, "flow": 0.5}]
    path.write_text('{"step": 2, "fl\n{"step": 4, "flow": 0.5}\n')
    with pytest.raises(Pi0Error, match="line 1: expected a line of a log"):
        read_log(path)


def test_a_short_run_has_a_plot(tmp_path: Path) -> None:
    train(make_run(tmp_path), tmp_path, {}, LoopOptions())
    assert len(read_log(tmp_path / LOG)) == 1
    assert (tmp_path / PLOT).read_bytes().startswith(b"\x89PNG")


def test_options_are_compared_by_name() -> None:
    """Also those of the optimizer and of augmentation."""
    start, episodes = Start("sizes", SIZES), cast(Dataset, Episodes())
    options = TrainOptions(optimizer=FAST)
    before = settings_of(start, episodes, options)
    shorter = replace(options, optimizer=replace(FAST, steps=3))
    with pytest.raises(ConfigError, match="--resume: steps: expected 6, with .* found 3. Resume"):
        _require_same(before, settings_of(start, episodes, shorter))
    plain = replace(options, augmentation=None)
    with pytest.raises(ConfigError, match=r"--resume: crop: expected 0.95, .* found nothing."):
        _require_same(before, settings_of(start, episodes, plain))


def test_data_and_files_are_compared_by_content(tmp_path: Path) -> None:
    """A name may mean something else by the time that a run goes on."""
    run = make_run(tmp_path)
    for step in (1, 2):
        run.trainer.step()
        save(run, tmp_path, {})
        checkpoint = find_start(str(tmp_path / LAST))
        file = tmp_path / f"{step}.json"
        file.write_text(str(step))
        (tmp_path / "file").unlink(missing_ok=True)
        (tmp_path / "file").symlink_to(file)
        options = TrainOptions(norm_stats=tmp_path / "file", tokenizer=tmp_path / "file")
        now = settings_of(checkpoint, cast(Dataset, Episodes(step)), options)
        if step == 1:
            before = now
    for name in ("start", "norm_stats", "tokenizer", "data"):
        one, two = ({name: settings[name]} for settings in (before, now))
        with pytest.raises(ConfigError, match=f"--resume: {name}: expected .* with content "):
            _require_same(one, two)
    episodes = Episodes()
    before = settings_of(checkpoint, cast(Dataset, episodes), options)
    _require_same(before, settings_of(checkpoint, cast(Dataset, Episodes()), options))
    episodes.tasks[3] = "lift another"
    with pytest.raises(ConfigError, match="--resume: data: expected observation.state, action and"):
        _require_same(before, settings_of(checkpoint, cast(Dataset, episodes), options))


@pytest.mark.parametrize("content", [b"", b"garbage" * 9, None, {}, [1]])
def test_a_state_that_is_damaged_or_none(tmp_path: Path, content: object) -> None:
    path = tmp_path / STATE_FILE
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(
        Pi0Error, match="expected the state of a run, found [^\n]+ Copy it again, or"
    ):
        load_state(path)


def test_a_state_of_other_weights(tmp_path: Path) -> None:
    trainer = make_run(tmp_path).trainer
    state = trainer.state()
    name = next(iter(state["parameters"]))
    for found in ({**state["parameters"], name: torch.zeros(3)}, {name: state["parameters"][name]}):
        with pytest.raises(Pi0Error, match=r"--resume: model.*: expected .* Go on with the rel"):
            trainer.restore({**state, "parameters": found})


def test_a_vocabulary_is_of_the_run_that_begins(tmp_path: Path) -> None:
    """Not of one that could not begin, in the same folder on other data."""
    (tmp_path / VOCABULARY).write_bytes(b"{}")
    run = make_run(tmp_path)
    made = (tmp_path / VOCABULARY).read_bytes()
    save(run, tmp_path, {})
    make_run(tmp_path)
    assert (tmp_path / VOCABULARY).read_bytes() == made != b"{}"


def test_keeps_the_newest(tmp_path: Path) -> None:
    train(make_run(tmp_path), tmp_path, {}, LoopOptions(save_every=2, keep=2))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["000004", "000006"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_stop(tmp_path: Path, number: int) -> None:
    before = signal.getsignal(number)
    steps = 0

    def on_step(_: dict[str, float]) -> None:
        nonlocal steps
        steps += 1
        if steps == 2:
            os.kill(os.getpid(), number)

    outcome = train(make_run(tmp_path), tmp_path, {}, LoopOptions(), on_step=on_step)
    # The step during which the signal arrives, or the one after it.
    assert outcome.signal == number
    assert outcome.step in (2, 3)
    assert outcome.checkpoint.is_dir()
    assert load_state(tmp_path / STATE_FILE)["done"] == outcome.step
    assert signal.getsignal(number) == before


def test_not_finite_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path)

    def on_step(_: dict[str, float]) -> None:
        if run.trainer.done == 4:
            run.trainer.samples.states[:] = float("inf")

    with pytest.raises(Pi0Error, match="step 4: .* expected a finite number"):
        train(run, tmp_path, {}, SAVES, on_step=on_step)
    assert load_state(tmp_path / STATE_FILE)["done"] == 3
    assert weights_of(tmp_path / LAST)


@pytest.mark.parametrize("config", [SIZES, PI05_SIZES], ids=["pi0", "pi05"])
@pytest.mark.parametrize("layout", ["openpi", "lerobot"])
def test_engines_give_the_trained_models_actions(
    tmp_path: Path, config: Pi0Config, layout: str
) -> None:
    """Through the whole policy, from the files alone. 1e-4: float32 in another order."""
    episodes = Episodes()
    run = make_run(tmp_path, episodes, config=config, layout=layout, optimizer=replace(FAST, ema=0))
    folder = train(run, tmp_path, {}, LoopOptions()).checkpoint
    samples = run.trainer.samples
    observation = {
        "observation/image": episodes.pictures["observation.images.base"][3],
        "observation/wrist_image": episodes.pictures["observation.images.wrist"][3],
        "observation/state": episodes.column("observation.state")[3],
        "prompt": episodes.tasks[3],
    }
    inputs, state = samples.pipeline.encode(observation)
    noise = torch.randn(1, config.horizon, config.action_dim)
    expected = run.trainer.module.model.sample_actions(inputs, noise)
    actions = samples.pipeline.decode(expected[0].numpy(), state)
    for engine in ("reference", "cpu"):
        with Policy.from_checkpoint(folder, robot=ROBOT, engine=engine) as policy:
            found = policy.infer(observation, noise=noise)["actions"]
            np.testing.assert_allclose(found, actions, atol=1e-4)


@pytest.mark.parametrize("config", [SIZES, PI05_SIZES], ids=["pi0", "pi05"])
@pytest.mark.parametrize("layout", ["openpi", "lerobot"])
def test_the_policys_pipeline_is_that_of_training(
    tmp_path: Path, config: Pi0Config, layout: str
) -> None:
    run = make_run(tmp_path, config=config, layout=layout)
    run.export.write(tmp_path / "made", run.trainer.exported())
    setup = prepare(open_checkpoint(tmp_path / "made"), PolicyOptions(robot=ROBOT))
    assert [f.code for f in setup.findings if f.severity == "error"] == []
    theirs, ours = setup.require(), run.trainer.samples.pipeline
    assert theirs.config == ours.config
    assert (theirs.resize, theirs.prompt) == (ours.resize, ours.prompt)
    for name in ("state_stats", "action_stats", "target_stats"):
        a, b = getattr(theirs, name), getattr(ours, name)
        for part in ("offset", "scale", "inverse_scale"):
            # LeRobot keeps statistics in float32.
            np.testing.assert_allclose(getattr(a, part), getattr(b, part), rtol=1e-6)
        assert a.shift == b.shift


def test_files_of_an_openpi_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path, dtype="bfloat16")
    run.export.write(tmp_path / "made", run.trainer.exported())
    names = {str(p.relative_to(tmp_path / "made")) for p in (tmp_path / "made").rglob("*.*")}
    assert names == {
        "model.safetensors",
        "config.json",
        "assets/table/norm_stats.json",
        "tokenizer.json",
    }
    stats = json.loads((tmp_path / "made/assets/table/norm_stats.json").read_text())["norm_stats"]
    assert set(stats["actions"]) == {"mean", "std", "q01", "q99"}
    assert len(stats["state"]["mean"]) == 5
    stored = {info.dtype for info in open_checkpoint(tmp_path / "made").tensors.values()}
    assert stored == {"BF16"}


@pytest.mark.parametrize("layout", ["openpi", "lerobot"])
def test_a_checkpoints_own_steps_are_kept(tmp_path: Path, layout: str) -> None:
    """How many actions are carried out, and denoising steps: what training goes on from says."""
    first = make_run(tmp_path, layout=layout)
    first.export.write(tmp_path / "made", first.trainer.exported())
    file = tmp_path / "made" / "config.json"
    settings = json.loads(file.read_text()) | {"num_inference_steps": 4}

    def tuned(number: object, **changes: Any) -> tuple[int | None, int]:
        file.write_text(json.dumps(settings | {"n_action_steps": number}))
        start = find_start(str(file.parent))
        options = TrainOptions(robot=ROBOT, augmentation=None, optimizer=FAST, **changes)
        run = prepare_run(start, cast(Dataset, Episodes()), tmp_path / "tuned", options, ALONE)
        folder = tmp_path / f"tuned-{number}-{len(changes)}"
        run.export.write(folder, run.trainer.exported())
        setup = prepare(open_checkpoint(folder), PolicyOptions(robot=ROBOT))
        return setup.n_action_steps, setup.checkpoint.steps

    assert tuned(2) == (2, 4)
    assert tuned(2, execute=3) == (3, 4)
    with pytest.raises(ConfigError, match="config.json n_action_steps: expected 1 to 6 actions"):
        tuned(99)
    assert tuned(99, execute=3) == (3, 4)
