"""contrib/lerobot_policy_pi0rt against LeRobot itself, in LeRobot's environment.

`make test-lerobot-plugin` installs both and runs this file. Actions may differ by 1e-4 of their
scale: two implementations in float32 (tests/policy/test_lerobot_end_to_end.py).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pi0.checkpoint.layouts import LAYOUTS
from pi0.checkpoint.load import open_checkpoint
from pi0.checkpoint.synth import synthesise
from pi0.config import PRESETS
from pi0.errors import ConfigError, ObservationError, Pi0Error
from pi0.peers.lerobot import shrink

REASON = "needs LeRobot and contrib/lerobot_policy_pi0rt (make test-lerobot-plugin)"
pytest.importorskip("lerobot_policy_pi0rt", reason=REASON)

from dots_env import STEPS, TASK, WIDTH, observe, reward
from lerobot.configs import PreTrainedConfig, RTCAttentionSchedule
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.rollout.inference.rtc import supports_rtc_inference
from lerobot.utils.random_utils import set_seed
from lerobot_policy_pi0rt.configuration_pi0rt import Pi0rtConfig
from lerobot_policy_pi0rt.modeling_pi0rt import Pi0rtPolicy
from lerobot_policy_pi0rt.processor_pi0rt import make_pi0rt_pre_post_processors
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

KINDS = {"pi0": "tiny", "pi05": "pi05_tiny"}
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
OWN_SIZES = ("vision", "vlm", "expert", "vocab_size", "state_dim", "action_dim")
TOKENIZER = "models--google--paligemma-3b-pt-224"  # where its hub keeps what processors name
Batch = dict[str, Any]


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of LeRobot."""
    path = tmp_path_factory.mktemp(request.param)
    preset = PRESETS[KINDS[request.param]]
    synthesise(path, preset, LAYOUTS["lerobot"], 0, torch.float32)
    return path


def tokenizer_of(folder: Path) -> PreTrainedTokenizerFast:
    words = Tokenizer.from_file(str(folder / "tokenizer.json"))
    words.post_processor = TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")


@pytest.fixture(scope="module")
def theirs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """LeRobot's own policy of it, at sizes that LeRobot's config.json cannot tell."""
    copy = shutil.copytree(folder, tmp_path_factory.mktemp("theirs") / "copy")
    settings = json.loads((copy / "config.json").read_text())
    kept = {key: value for key, value in settings.items() if key not in OWN_SIZES}
    (copy / "config.json").write_text(json.dumps(kept))
    kind = settings["type"]
    modeling = import_module(f"lerobot.policies.{kind}.modeling_{kind}")
    shrink(modeling, open_checkpoint(folder).config)
    return getattr(modeling, f"{kind.upper()}Policy").from_pretrained(str(copy))


@pytest.fixture(scope="module")
def ours(folder: Path) -> Pi0rtPolicy:
    return Pi0rtPolicy.from_pretrained(folder)


@pytest.fixture(scope="module")
def processors(folder: Path) -> tuple[Any, Any]:
    """LeRobot's, of the folder's files."""
    return make_pre_post_processors(
        None,
        pretrained_path=str(folder),
        preprocessor_overrides={"tokenizer_processor": {"tokenizer": tokenizer_of(folder)}},
    )


def raw(rows: int, cameras: tuple[str, ...] = CAMERAS, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    images = {
        f"observation.images.{name}": torch.from_numpy(rng.random((rows, 3, 48, 64), np.float32))
        for name in cameras
    }
    state = torch.from_numpy(rng.uniform(-0.9, 0.9, (rows, 32)).astype(np.float32))
    return {**images, "observation.state": state, "task": ["pick up the cube", "go"][:rows]}


def noise(rows: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, 50, 32, generator=torch.Generator().manual_seed(seed))


def test_registered_by_name() -> None:
    from lerobot.utils.import_utils import register_third_party_plugins

    register_third_party_plugins()
    assert PreTrainedConfig.get_choice_class("pi0rt") is Pi0rtConfig
    assert get_policy_class("pi0rt") is Pi0rtPolicy


@pytest.mark.parametrize("cameras", [CAMERAS, CAMERAS[1:]], ids=["all", "one missing"])
@pytest.mark.parametrize("steps", [None, 4])
def test_chunks_are_lerobots(
    ours: Pi0rtPolicy, theirs: Any, processors: Any, cameras: Any, steps: int | None
) -> None:
    """A batch of two, so that rows are not mixed up either."""
    batch = processors[0](raw(2, cameras))
    given = {"noise": noise(2), "num_steps": steps}
    expected = theirs.predict_action_chunk(batch, **given)
    close(ours.predict_action_chunk(batch, **given), expected)
    other = ours.predict_action_chunk(batch, noise=noise(2, 2), num_steps=steps)
    assert (other - expected).abs().max() > 0.1


def test_a_seed_draws_lerobots_noise(ours: Pi0rtPolicy, theirs: Any, processors: Any) -> None:
    batch = processors[0](raw(1))
    chunks = []
    for policy in (ours, theirs):
        torch.manual_seed(3)
        chunks.append(policy.predict_action_chunk(batch))
    close(*chunks)


@pytest.mark.parametrize("schedule", list(RTCAttentionSchedule))
@pytest.mark.parametrize("execution_horizon", [None, 20, 0])
def test_real_time_chunking_is_lerobots(
    ours: Pi0rtPolicy, theirs: Any, processors: Any, schedule: Any, execution_horizon: int | None
) -> None:
    batch = processors[0](raw(1))
    previous = ours.predict_action_chunk(batch, noise=noise(1, 7))[0, 12:, :7]
    given = {"inference_delay": 3, "prev_chunk_left_over": previous, "noise": noise(1)}
    if execution_horizon is not None:
        given["execution_horizon"] = execution_horizon
    config = RTCConfig(prefix_attention_schedule=schedule)
    chunks = []
    for policy in (ours, theirs):
        policy.config.rtc_config = config
        try:
            if policy is theirs:
                policy.init_rtc_processor()
            chunks.append(policy.predict_action_chunk(batch, **given))
        finally:
            policy.config.rtc_config = None
            if policy is theirs:
                policy.init_rtc_processor()
    close(*chunks)
    plain = ours.predict_action_chunk(batch, noise=noise(1))
    if execution_horizon == 0:
        close(chunks[0], plain)
    else:
        assert (chunks[0] - plain).abs().max() > 1e-3


def test_rows_that_are_computed_one_by_one_are_guided_too(
    ours: Pi0rtPolicy, processors: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = processors[0](raw(2))
    previous = ours.predict_action_chunk(batch, noise=noise(2, 7))[0, 12:, :7]
    given = {"inference_delay": 3, "prev_chunk_left_over": previous, "noise": noise(2)}
    monkeypatch.setattr(ours.config, "rtc_config", RTCConfig())
    together = ours.predict_action_chunk(batch, **given)
    one = replace(ours.engine.capabilities, batch=False)
    monkeypatch.setattr(ours.engine, "capabilities", one)
    close(ours.predict_action_chunk(batch, **given), together)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"inference_delay": -1}, "inference_delay: expected a number of ticks, .* found -1"),
        ({"inference_delay": float("nan")}, "inference_delay: .* found nan"),
        ({"inference_delay": 2.5}, "inference_delay: .* found 2.5"),
        ({"execution_horizon": -1}, "execution_horizon: .* 0 or more, found -1"),
        (
            {"prev_chunk_left_over": torch.full((5, 7), torch.nan)},
            "prev_chunk_left_over: expected finite values, found 35 NaN",
        ),
        ({"prev_chunk_left_over": torch.full((5, 7), 1e30)}, "prev_chunk_left_over: .* 1e\\+30"),
    ],
)
def test_a_rest_that_cannot_be_continued(
    ours: Pi0rtPolicy,
    processors: Any,
    changed: Batch,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ours.config, "rtc_config", RTCConfig())
    given = {"inference_delay": 3, "prev_chunk_left_over": torch.zeros(5, 7), **changed}
    with pytest.raises(ObservationError, match=message):
        ours.predict_action_chunk(processors[0](raw(2)), **given)


def test_rtc_is_offered_and_needs_chunks(ours: Pi0rtPolicy, processors: Any) -> None:
    assert supports_rtc_inference(ours)
    ours.config.rtc_config = RTCConfig()
    try:
        with pytest.raises(ConfigError, match="expected predict_action_chunk"):
            ours.select_action(processors[0](raw(1)))
    finally:
        ours.config.rtc_config = None


def test_select_action_hands_out_a_chunk(folder: Path, processors: Any) -> None:
    config = Pi0rtConfig(n_action_steps=2, device="cpu")
    policy = Pi0rtPolicy.from_pretrained(folder, config=config)
    batch = processors[0](raw(2))
    chunk = policy.predict_action_chunk(batch, noise=noise(2))
    policy.reset()
    first, second = (policy.select_action(batch, noise=noise(2)) for _ in range(2))
    torch.testing.assert_close(torch.stack([first, second], 1), chunk[:, :2])
    third = policy.select_action(batch, noise=noise(2, 9))  # a new chunk
    assert (third - chunk[:, 2]).abs().max() > 0.1


def test_saved_and_reloaded(ours: Pi0rtPolicy, processors: Any, tmp_path: Path) -> None:
    """As LeRobot saves: the policy and both processors into one folder."""
    ours.save_pretrained(tmp_path)
    for processor in processors:
        processor.save_pretrained(tmp_path)
    config = PreTrainedConfig.from_pretrained(tmp_path)
    assert isinstance(config, Pi0rtConfig)
    assert config == ours.config
    again = Pi0rtPolicy.from_pretrained(tmp_path)
    batch = processors[0](raw(1))
    given = {"noise": noise(1)}
    torch.testing.assert_close(
        again.predict_action_chunk(batch, **given), ours.predict_action_chunk(batch, **given)
    )
    with pytest.raises(Pi0Error, match="Save into a new folder"):
        ours.save_pretrained(tmp_path)


@pytest.mark.parametrize("inside", ["", "saved"])
def test_a_checkpoint_is_not_saved_into_itself(folder: Path, tmp_path: Path, inside: str) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    before = (copy / "config.json").read_bytes()
    with pytest.raises(Pi0Error, match="expected a folder outside of the checkpoint"):
        Pi0rtPolicy.from_pretrained(copy).save_pretrained(copy / inside)
    assert (copy / "config.json").read_bytes() == before
    assert not (copy / inside / "checkpoint").exists()


def test_config_comes_from_the_checkpoint(ours: Pi0rtPolicy, folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    assert ours.config.model == settings["type"]
    for name in ("chunk_size", "n_action_steps", "num_inference_steps", "tokenizer_max_length"):
        assert getattr(ours.config, name) == settings[name]
    assert list(ours.config.image_features) == [f"observation.images.{c}" for c in CAMERAS]


def test_processors_for_a_dataset_are_lerobots(ours: Pi0rtPolicy) -> None:
    """LeRobot makes them where a checkpoint has no processor files; the hub has the tokenizer."""
    with pytest.raises(ConfigError, match="Make the policy first"):
        make_pi0rt_pre_post_processors(Pi0rtConfig(device="cpu"))
    module = import_module(f"lerobot.policies.{ours.config.model}.processor_{ours.config.model}")
    tokenizer, module.TokenizerProcessorStep = module.TokenizerProcessorStep, lambda **_: None
    try:
        with pytest.MonkeyPatch.context() as patch:
            made: list[Any] = []
            patch.setattr(
                module,
                "make_policy_processor_pipelines",
                lambda **steps: made.append(steps) or tuple(steps.values()),
            )
            make_pi0rt_pre_post_processors(ours.config, dataset_stats={})
    finally:
        module.TokenizerProcessorStep = tokenizer
    names = [type(step).__name__ for step in made[0]["input_steps"]]
    assert "NormalizerProcessorStep" in names
    assert any("Pi0" in name for name in names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda image: (image * 255).to(torch.uint8), "expected floating-point pixels"),
        (lambda image: image * 255, "found 0.* to 25"),
        (lambda image: image[0], r"expected shape \[B, 3, H, W\]"),
        (lambda image: image * torch.nan, "found nan"),
    ],
    ids=["uint8", "range", "no batch", "nan"],
)
def test_images_that_are_none(
    ours: Pi0rtPolicy, processors: Any, change: Any, message: str
) -> None:
    batch = processors[0](raw(1))
    key = f"observation.images.{CAMERAS[0]}"
    batch[key] = change(batch[key])
    with pytest.raises(ObservationError, match=message):
        ours.predict_action_chunk(batch)


def test_a_state_that_is_none(ours: Pi0rtPolicy, processors: Any) -> None:
    batch = processors[0](raw(1))
    state = batch.pop("observation.state")
    with pytest.raises(ObservationError, match="state: expected at most 32 values, found none"):
        ours.predict_action_chunk(batch)
    batch["observation.state"] = torch.cat([state, state], -1)
    with pytest.raises(ObservationError, match=r"at most 32 values, found shape \[1, 64\]"):
        ours.predict_action_chunk(batch)


def test_other_cameras_and_no_checkpoint(ours: Pi0rtPolicy, processors: Any) -> None:
    with pytest.raises(ObservationError, match="observation.images.base_0_rgb.*--rename_map"):
        ours.predict_action_chunk(processors[0](raw(1, ("top",))))
    with pytest.raises(ConfigError, match="--policy.pretrained_path=CKPT"):
        Pi0rtPolicy(Pi0rtConfig(device="cpu"))
    with pytest.raises(NotImplementedError, match="Train with"):
        ours.forward({})


def run_lerobot(command: str, folder: Path, home: Path, *options: str) -> None:
    """LeRobot's own command, without a hub."""
    snapshot = home / "hub" / TOKENIZER / "snapshots" / "0"
    if not snapshot.exists():
        tokenizer_of(folder).save_pretrained(snapshot)
        (snapshot / "config.json").write_text('{"model_type": "paligemma"}')  # as on the hub
        (home / "hub" / TOKENIZER / "refs").mkdir()
        (home / "hub" / TOKENIZER / "refs" / "main").write_text("0")
    code = f"from lerobot.scripts.{command} import main; main()"
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    settings = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", code, "--policy.device=cpu", *options],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def run_lerobot_eval(folder: Path, home: Path, *options: str) -> float:
    """What its environment paid, in LeRobot's own command."""
    out = home / "-".join(("out", *(str(len(option)) for option in options)))
    arguments = [
        *("--env.type=dots", "--env.discover_packages_path=dots_env"),
        *("--eval.n_episodes=1", "--eval.batch_size=1", "--seed=1000"),
        *(f"--output_dir={out}", *options),
    ]
    run_lerobot("lerobot_eval", folder, home, *arguments)
    (episode,) = json.loads((out / "eval_info.json").read_text())["per_task"]
    (paid,) = episode["metrics"]["sum_rewards"]
    return float(paid)


@pytest.mark.parametrize("inference", ["sync", "rtc"])
def test_lerobot_rollout(folder: Path, tmp_path: Path, inference: str) -> None:
    """By name on an unmodified checkpoint, a robot of LeRobot is sent the actions of chunks.

    Which ones, nobody knows beforehand: the command draws noise without a seed.
    """
    log = tmp_path / "actions"
    run_lerobot(
        "lerobot_rollout",
        folder,
        tmp_path,
        *("--policy.type=pi0rt", f"--policy.pretrained_path={folder}", f"--task={TASK}"),
        *("--robot.type=dots", "--robot.discover_packages_path=dots_robot", f"--robot.log={log}"),
        *(f"--inference.type={inference}", "--fps=10", "--duration=4", "--play_sounds=false"),
        "--return_to_initial_position=false",
    )
    sent = np.array([json.loads(line) for line in log.read_text().splitlines()])
    assert len(sent) > 3
    assert sent.shape[1] == WIDTH
    assert np.isfinite(sent).all()
    assert (np.ptp(sent, axis=0) > 0).all()  # a chunk, and no action again and again


def test_lerobot_eval(theirs: Any, processors: Any, folder: Path, tmp_path: Path) -> None:
    """By name on an unmodified checkpoint, and on a saved one by path: LeRobot's own actions."""
    from lerobot.envs import preprocess_observation

    batch = preprocess_observation({k: _batched(v) for k, v in observe().items()})
    set_seed(1000)
    drawn = torch.normal(0.0, 1.0, (1, 50, 32))
    chunk = theirs.predict_action_chunk(processors[0]({**batch, "task": [TASK]}), noise=drawn)
    expected = reward(processors[1](chunk)[0, :STEPS, :WIDTH].numpy())
    by_name = ("--policy.type=pi0rt", f"--policy.pretrained_path={folder}")
    assert run_lerobot_eval(folder, tmp_path, *by_name) == pytest.approx(expected, rel=1e-4)
    saved = tmp_path / "saved"
    Pi0rtPolicy.from_pretrained(folder).save_pretrained(saved)
    for name in folder.glob("policy_*"):
        shutil.copy(name, saved)
    by_path = (f"--policy.path={saved}", "--policy.engine=reference")
    assert run_lerobot_eval(folder, tmp_path, *by_path) == pytest.approx(expected, rel=1e-4)


def _batched(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _batched(inner) for key, inner in value.items()}
    return value[None]
