"""Two policies without their weights: configuration, conventions, statistics, tokenizer.

Compared is what a policy does, not where its files lie or who wrote them: openpi's norm_stats.json
and LeRobot's processors with the same numbers are the same. Statistics are compared within the
rounding of float32, in which LeRobot keeps them, and of the small constants of both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pi0.policy.normalize import OPENPI_EPS, Normalizer
from pi0.policy.pipeline import Pipeline
from pi0.policy.setup import PolicySetup
from pi0.policy.tokenizer import Tokenizer

# Of `PolicySetup.describe`: where things lie, what was said of them, what is compared elsewhere.
PLACES = ("checkpoint", "base", "layout", "sources", "findings", "prompt", "horizon")
ROUNDING = 1e-6  # of numbers that were stored as float32
# What openpi adds to a spread and LeRobot does not is no difference, up to this part of the spread.
PART = 1e-3
# What settings of the same cause begin with, and the option that makes them the same.
CAUSES = (
    (("robot.",), "--robot"),
    (("resize", "prompt.convention", "prompt.newline"), "--preprocessing"),
    (("prompt.state", "state_in_prompt"), "--state-in-prompt"),
    (("statistics.",), "--norm-stats, --norm-mode"),
    (("tokenizer.",), "--tokenizer"),
    (("model.horizon", "n_action_steps"), "--horizon"),
    (("model.max_tokens", "max_tokens", "prompt.max_tokens"), "--max-tokens"),
)
# Prompts that tokenizers of different vocabularies split differently.
PROBES = ("pick up the red cube", "Fold the towel, then close drawer 12.\n", "naïve größe 箱")


@dataclass(frozen=True)
class Difference:
    """A setting that is not the same in A and B, such as "model.horizon".

    Attributes:
        also: other settings that differ for the same cause.
        remedy: the option that makes both the same; empty: none does.
    """

    what: str
    a: Any
    b: Any
    also: tuple[Difference, ...] = ()
    remedy: str = ""


@dataclass(frozen=True)
class PolicyDiff:
    """What two policies have in common.

    Attributes:
        not_compared: why conventions and tokenizers, and statistics unless both are known, were not
            compared; None: they were.
    """

    differences: list[Difference]
    not_compared: str | None


@dataclass(frozen=True)
class _Numbers:
    """A statistic [D], and by how much others may be off that count as the same [D]."""

    values: NDArray[np.float32]
    tolerance: NDArray[np.float64]


def diff_policies(a: PolicySetup, b: PolicySetup) -> PolicyDiff:
    """Compares two set-ups, as far as both are known."""
    left, right = _settings(a), _settings(b)
    not_compared = None
    if a.statistics and b.statistics:
        for settings, statistics in ((left, a.statistics), (right, b.statistics)):
            for name, stats in zip(("state", "actions", "targets"), statistics, strict=True):
                settings |= _statistics(f"statistics.{name}", stats)
    if a.pipeline and b.pipeline:
        left |= _described(a)
        right |= _described(b)
        left |= _pipeline(a.pipeline)
        right |= _pipeline(b.pipeline)
    else:
        errors = {
            name: [f.sentence for f in setup.findings if f.severity == "error"]
            for name, setup in (("A", a), ("B", b))
        }
        if bool(errors["A"]) != bool(errors["B"]):
            for settings, name in ((left, "A"), (right, "B")):
                settings["policy"] = "cannot be made" if errors[name] else "can be made"
        not_compared = " ".join(f"{name}: {found[0]}" for name, found in errors.items() if found)
    names = dict.fromkeys([*left, *right])
    found = [d for name in names for d in _diff(name, left.get(name), right.get(name))]
    return PolicyDiff(_by_cause(found), not_compared)


def _settings(setup: PolicySetup) -> dict[str, Any]:
    """What is known without a pipeline, flat."""
    config = setup.checkpoint.config
    return {
        **_flat("model", asdict(config)),
        "steps": setup.steps,
        "n_action_steps": setup.n_action_steps or config.horizon,
    }


def _described(setup: PolicySetup) -> dict[str, Any]:
    table = {k: v for k, v in setup.describe().items() if k not in PLACES}
    assert setup.robot is not None
    cameras = [f"{c.key}{'' if c.required else ' (optional)'}" for c in setup.robot.cameras]
    return _flat("", table) | {"robot.cameras": cameras}


def _pipeline(pipeline: Pipeline) -> dict[str, Any]:
    return {
        **_flat("prompt", asdict(pipeline.prompt)),
        **_flat("rename", pipeline.rename),
        **{
            name: value
            for key, stats in pipeline.image_stats.items()
            for name, value in _statistics(f"statistics.{key}", stats).items()
        },
        **_tokenizer(pipeline.tokenizer),
    }


def _statistics(name: str, stats: Normalizer) -> dict[str, Any]:
    middle = stats.offset + stats.shift * stats.scale  # what becomes 0
    arrays = {"offset": middle, "scale": stats.scale, "inverse_scale": stats.inverse_scale}
    added = np.minimum(1.1 * OPENPI_EPS, PART * stats.scale)
    # The ends of a range, which were rounded, are as large as this.
    tolerance = np.maximum(2 * ROUNDING * (np.abs(middle) + np.abs(stats.scale)), added)
    return {
        f"{name}.{kind}": _Numbers(values.astype(np.float32), tolerance)
        for kind, values in arrays.items()
    }


def _tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    ids = {f"tokenizer.ids of {text!r}": tokenizer.encode(text) for text in PROBES}
    return {"tokenizer.size": tokenizer.size, "tokenizer.bos": tokenizer.bos, **ids}


def _by_cause(differences: list[Difference]) -> list[Difference]:
    """One difference for each cause: the first, with the others."""
    groups: dict[str, list[Difference]] = {}
    for difference in differences:
        remedy = next((r for starts, r in CAUSES if difference.what.startswith(starts)), "")
        groups.setdefault(remedy or difference.what, []).append(difference)
    return [
        replace(first, also=tuple(rest), remedy=cause if cause.startswith("--") else "")
        for cause, (first, *rest) in groups.items()
    ]


def _diff(name: str, a: Any, b: Any) -> list[Difference]:
    if isinstance(a, _Numbers) and isinstance(b, _Numbers):
        if a.values.shape != b.values.shape:
            return [Difference(f"{name}: length", len(a.values), len(b.values))]
        off = np.abs(a.values - b.values)
        if (off <= a.tolerance).all():
            return []
        at = int((off - a.tolerance).argmax())
        return [Difference(f"{name}[{at}], the largest", float(a.values[at]), float(b.values[at]))]
    if isinstance(a, _Numbers) or isinstance(b, _Numbers):
        left, right = (None if v is None else len(v.values) for v in (a, b))
        return [Difference(f"{name}: length", left, right)]
    return [] if a == b else [Difference(name, a, b)]


def _flat(name: str, value: Any) -> dict[str, Any]:
    """Nested tables as one, by names with dots."""
    if not isinstance(value, Mapping):
        return {name: value}
    inner = [_flat(f"{name}.{key}".removeprefix("."), v) for key, v in value.items()]
    return {key: v for table in inner for key, v in table.items()}
