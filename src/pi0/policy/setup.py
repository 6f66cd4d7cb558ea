"""What a user may say about a policy, and what a policy uses for a checkpoint.

`prepare` (`resolve.py`) makes the second from the first and from the checkpoint's files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pi0.checkpoint.load import Checkpoint
from pi0.errors import ConfigError, Pi0Error
from pi0.findings import Finding, enforce, error
from pi0.policy.normalize import Normalizer
from pi0.policy.pipeline import Pipeline
from pi0.policy.robot import Robot

T = TypeVar("T")


@dataclass(frozen=True)
class PolicyOptions:
    """What a user may say about pre- and post-processing; None is left to the checkpoint's files.

    Attributes:
        robot: a name, a `Robot`, or the path of a TOML file.
        tokenizer, norm_stats: files; norm_stats "none": states and actions are in the model's
            units already.
        norm_mode: "mean_std", "quantiles" or "min_max".
        preprocessing: "openpi" or "lerobot": whose way of resizing images and cleaning prompts.
        resize, prompt: the same, each for itself.
        image_size: pixels that the model runs at.
        default_prompt: what to do if an observation does not say.
        state_in_prompt: whether the prompt of a π0.5 holds the state (openpi's
            discrete_state_input).
    """

    robot: str | Path | Robot | None = None
    tokenizer: Path | str | None = None
    norm_stats: Path | str | None = None
    norm_mode: str | None = None
    preprocessing: str | None = None
    resize: str | None = None
    prompt: str | None = None
    image_size: int | None = None
    default_prompt: str | None = None
    state_in_prompt: bool | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError if an option from Python is of another type than from the CLI, or if
        two of them contradict each other."""
        for name in ("tokenizer", "norm_stats", "norm_mode", "preprocessing", "resize", "prompt"):
            value = getattr(self, name)
            # An empty one, such as a variable of the shell that is not set, says nothing.
            if value is not None and not (isinstance(value, (str, Path)) and str(value)):
                raise ConfigError(f"{name}: expected a text, found {value!r}.")
        if self.norm_stats == "none" and str(self.norm_mode or "identity").lower() != "identity":
            raise ConfigError(
                "norm_mode (--norm-mode): expected none beside norm_stats none (--norm-stats "
                f"none), which normalises nothing, found {self.norm_mode}. Leave out one of them."
            )


@dataclass
class PolicySetup:
    """What a policy uses for a checkpoint, as far as that is known.

    Attributes:
        robot: None if it is unknown.
        pipeline: None if one of the findings is an error.
        statistics: normalisers of the state, of actions out, and of actions in; None if unknown.
        origin: the name of a folder above openpi's statistics that names a known robot.
        sources: where robot, statistics, tokenizer and preprocessing come from, in words.
        n_action_steps: how many actions of a chunk are executed by default; None: all.
        steps: denoising steps by default.
    """

    checkpoint: Checkpoint
    robot: Robot | None = None
    pipeline: Pipeline | None = None
    statistics: tuple[Normalizer, Normalizer, Normalizer] | None = None
    findings: list[Finding] = field(default_factory=list)
    origin: str | None = None
    sources: dict[str, str] = field(default_factory=dict)
    n_action_steps: int | None = None
    steps: int = 10

    def require(self) -> Pipeline:
        """The pipeline, after warning of what was assumed.

        Raises:
            Pi0Error: a finding is an error.
        """
        enforce(self.findings)
        assert self.pipeline is not None
        return self.pipeline

    def describe(self) -> dict[str, Any]:
        """All of it as plain data, as `pi0 inspect` and `Policy.metadata` show it."""
        config, pipeline = self.checkpoint.config, self.pipeline
        return {
            "checkpoint": str(self.checkpoint.path),
            "base": self.checkpoint.base and str(self.checkpoint.base),
            "layout": self.checkpoint.names.layout,
            "horizon": config.horizon,
            "max_tokens": pipeline.prompt.max_tokens if pipeline else config.max_tokens,
            "robot": self.robot and _describe_robot(self.robot, self.statistics),
            "resize": pipeline and pipeline.resize,
            "prompt": pipeline and pipeline.prompt.convention,
            "state_in_prompt": pipeline and pipeline.prompt.state,
            "default_prompt": pipeline and pipeline.default_prompt,
            "sources": self.sources,
            "findings": [asdict(finding) for finding in self.findings],
        }

    def attempt(self, code: str, work: Callable[[], T]) -> T | None:
        """What the work returns; None, and a finding, if it fails."""
        try:
            return work()
        except Pi0Error as failure:
            self.findings.append(error(code, str(failure)))
            return None


def _describe_robot(
    robot: Robot, statistics: tuple[Normalizer, Normalizer, Normalizer] | None
) -> dict[str, Any]:
    state_width, actions = (s.width for s in statistics[:2]) if statistics else (None, None)
    action_dim = robot.action_dim or actions
    return {
        "name": robot.name,
        "cameras": [
            {"key": camera.key, "names": list(camera.names), "required": camera.required}
            for camera in robot.cameras
        ],
        "state": {key: length or state_width for key, length in robot.state},
        "action_dim": action_dim,
        "action_names": list(robot.action_names),
        "action_units": list(robot.action_units),
        "relative": robot.relative(action_dim or 0).tolist(),
        "control_hz": robot.control_hz,
        "limits": robot.limits
        and {name: list(column) for name, column in vars(robot.limits).items()},
    }
