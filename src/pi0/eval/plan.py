"""What to evaluate: a policy, an environment, and episodes, as frozen tables.

All of them can be pickled, since worker processes are given them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pi0.errors import ConfigError
from pi0.number import is_count
from pi0.policy import Policy, PolicyRecipe

if TYPE_CHECKING:
    from pi0.eval.remote import RemotePolicy

DEFAULT_ENV = "pi0/Tabletop-v0"
SEED_START = 9_000_000  # demonstrations of the tabletop have lower seeds only
FORMATS = ("mp4", "gif")


@dataclass(frozen=True)
class CheckpointPolicy(PolicyRecipe):
    """How a policy is made from a checkpoint; `make` makes one. Actions beyond the environment's
    action space are treated as those beyond the robot's limits, by default brought back."""

    on_limit: str = "clamp"

    def __call__(self) -> Policy:
        """See `make`."""
        return self.make()


@dataclass(frozen=True)
class ServedPolicy:
    """A policy behind `pi0 serve`; calling it opens a connection, so that each worker is a robot.

    Attributes:
        address: ws://HOST:PORT, or wss://.
        on_limit: for actions beyond the environment's action space; limits of the robot are the
            server's business.
        real_time: "exact" or "identity", which the server must have been started with; None:
            chunks do not continue each other.
        api_key: what the server wants to be shown.
    """

    address: str
    on_limit: str = "clamp"
    real_time: str | None = None
    api_key: str | None = field(default=None, repr=False)

    def __call__(self) -> RemotePolicy:
        """Connects.

        Raises:
            Pi0Error: see `RemotePolicy`.
        """
        from pi0.eval.remote import RemotePolicy  # which needs packages that others do not

        return RemotePolicy(self)


@dataclass(frozen=True)
class EnvOptions:
    """A Gymnasium environment, and what is changed in it.

    Attributes:
        id: as `gymnasium.make` takes it; "PACKAGE:ID" imports the package that registers it.
        max_steps: of an episode; None: as registered.
        prompt: the sentence of every episode; None: the environment's `info["prompt"]`.
        prompt_swap: resets with `{"instruction": "swapped"}`: another sentence for the same scene.
        blank_cameras: all images are black.
        arguments: more of `gymnasium.make`, such as {"obs_type": "pixels_agent_pos"}.
    """

    id: str = DEFAULT_ENV
    max_steps: int | None = None
    prompt: str | None = None
    prompt_swap: bool = False
    blank_cameras: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_steps is not None:
            _require_count("max_steps", self.max_steps)
        if self.prompt is not None and self.prompt_swap:
            raise ConfigError(
                "prompt: expected either a sentence or a swapped one, found both. Leave out "
                "--prompt or --prompt-swap."
            )


@dataclass(frozen=True)
class FilmOptions:
    """Films of episodes.

    Attributes:
        folder: where they go, with contact-sheet.png beside them.
        format: "mp4" (PyAV) or "gif" (Pillow).
        episodes: how many of each task, the first ones; None: all.
    """

    folder: Path
    format: str = "mp4"
    episodes: int | None = None

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ConfigError(
                f"film format: expected one of {', '.join(FORMATS)}, found {self.format!r}."
            )
        if self.episodes is not None:
            _require_count("filmed episodes", self.episodes)


@dataclass(frozen=True)
class EvalPlan:
    """Which episodes, and how they are run.

    Episode i of every task has seed `seed_start` + i. The seed alone decides the scene, the noise
    that actions are sampled from, and the perturbation.

    Attributes:
        tasks: names that the environment's reset takes as `{"task": name}`; None: all that it
            declares in `tasks`, or episodes without a task.
        episodes: of each task.
        execute: actions of a chunk that are executed before the next is computed; None: the
            policy's `n_action_steps`.
        injected_latency: milliseconds from an observation to the chunk for it, by the
            environment's clock: rounded up to its ticks, in which the robot executes the previous
            chunk. How long the policy really takes counts for nothing.
        perturb: standard deviation of Gaussian noise on the actions, in the model's normalised
            units, in which the actions of the training data have a standard deviation of 1 (or,
            with quantiles, a range from -1 to 1).
        workers: processes, each with an environment and a policy of its own; 1: this one.
        threads: of PyTorch in each of them.
    """

    env: EnvOptions = field(default_factory=EnvOptions)
    tasks: tuple[str, ...] | None = None
    episodes: int = 50
    seed_start: int = SEED_START
    execute: int | None = None
    perturb: float = 0.0
    workers: int = 1
    threads: int = 1
    film: FilmOptions | None = None
    injected_latency: float = 0.0

    def __post_init__(self) -> None:
        for name in ("episodes", "workers", "threads"):
            _require_count(name, getattr(self, name))
        if self.execute is not None:
            _require_count("execute", self.execute)
        if self.seed_start < 0:
            raise ConfigError(f"seed_start: expected 0 or more, found {self.seed_start}.")
        for name in ("perturb", "injected_latency"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name}: expected 0 or more, found {getattr(self, name)}.")
        names = self.tasks
        if names is not None and (not names or not all(names) or len(set(names)) < len(names)):
            raise ConfigError(
                f"tasks: expected different names, at least one, found {', '.join(names)!r}."
            )


def _require_count(name: str, value: int) -> None:
    if not is_count(value):
        raise ConfigError(f"{name}: expected a whole number of 1 or more, found {value!r}.")
