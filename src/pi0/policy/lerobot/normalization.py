"""One normaliser step of a processor: which key is normalised how, and with which statistics.

LeRobot leaves a value as it is where its key has no statistics or is no feature of the step. Here
that is an error, unless the step's own norm_map or normalize_observation_keys ask for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pi0.checkpoint.lerobot import ACTION
from pi0.errors import Pi0Error
from pi0.findings import Finding, error, warning
from pi0.policy.lerobot.statistics import Floats, lerobot_normalizer, read_statistics
from pi0.policy.lerobot.steps import Step
from pi0.policy.normalize import Normalizer, identity

Statistics = Mapping[str, Mapping[str, Floats]]  # by key of an observation, or "action"
REMEDY = "Copy all files of the checkpoint, or name statistics with --norm-stats."


@dataclass(frozen=True)
class Given:
    """What a caller says in place of the checkpoint's files.

    Attributes:
        statistics: of state and actions; None: those of the files.
        mode: for state and actions; None: those of the files.
    """

    statistics: Statistics | None
    mode: str | None


@dataclass(frozen=True)
class Normalization:
    """A normalizer_processor or unnormalizer_processor with its statistics.

    Attributes:
        statistics: the caller's in place of the file's; None: there are none, which is among the
            findings already.
    """

    step: Step
    given: Given
    statistics: Statistics | None

    def mode(self, key: str, kind: str) -> str | None:
        """The mode for a key, of LeRobot's names.

        None: an observation that is not among the step's features, though its norm_map has a mode
        for features of this kind.
        """
        modes: Mapping[str, str] = self.step.config["norm_map"] or {}
        features: Mapping[str, Any] = self.step.config["features"] or {}
        if self._is_left_out(key):
            return "IDENTITY"
        if self.given.mode and kind in ("STATE", "ACTION"):
            return self.given.mode
        if key != ACTION and key in features:
            own = features[key]["type"]
            return "IDENTITY" if own == "ACTION" else modes.get(own, "IDENTITY")
        mode = modes.get(kind, "IDENTITY")
        reached = key == ACTION or key in (self.given.statistics or {}) or mode == "IDENTITY"
        return mode if reached else None

    def _is_left_out(self, key: str) -> bool:
        keys = self.step.config["normalize_observation_keys"]
        return key != ACTION and keys is not None and key not in keys

    def width(self, key: str) -> int | None:
        """The length of a key's statistics; None: it has none, or of one value, for any length."""
        lengths = [values.size for values in (self.statistics or {}).get(key, {}).values()]
        longest = max(lengths, default=1)
        return longest if longest > 1 else None

    def has(self, key: str, kind: str) -> bool:
        """Whether a normaliser of the key can be made."""
        return self.mode(key, kind) == "IDENTITY" or key in (self.statistics or {})

    def normalizer(
        self,
        what: str,
        key: str,
        kind: str,
        widths: tuple[int | None, int],
        findings: list[Finding],
    ) -> Normalizer:
        """The normaliser of a key.

        Args:
            what: for messages.
            key: of an observation, or "action".
            kind: STATE, VISUAL or ACTION.
            widths: as declared, and as padded; the first that is known is the width of statistics
                of one value, as in LeRobot, and of an identity without statistics.
            findings: what is found is appended. After an error the result is an identity.
        """
        declared, padded = widths
        width = declared or self.width(key) or padded
        mode = self.mode(key, kind)
        unused = mode == "IDENTITY" and self.given.mode != "IDENTITY"
        if unused and key in (self.given.statistics or {}):
            where, remedy = "IDENTITY in its norm_map", "Name a mode with --norm-mode to use them."
            if self._is_left_out(key):
                where, remedy = "normalize_observation_keys without it", "Are they this robot's?"
            problem = f"expected statistics of {key} to be used, found {where}"
            findings.append(warning("statistics-unused", f"{self.step}: {problem}. {remedy}"))
        if mode == "IDENTITY" or self.statistics is None:
            return identity(what, width)
        own = (self.step.config["features"] or {}).get(key, {}).get("type")
        if own == "VISUAL" != kind:  # LeRobot would take the statistics for those of channels
            problem = f"features: expected {key} to be of type {kind}, found {own}"
            findings.append(error("field-value", f"{self.step} {problem}. {REMEDY}"))
        elif mode is None:
            problem = f"features: expected {key}, which its norm_map normalises, found none"
            findings.append(error("statistics-missing", f"{self.step} {problem}. {REMEDY}"))
        elif key not in self.statistics:
            problem = f"expected statistics of {key} for mode {mode}, found none"
            findings.append(error("statistics-missing", f"{self.step}: {problem}. {REMEDY}"))
        else:
            eps = float(self.step.config["eps"])
            try:
                of_file = key not in (self.given.statistics or {})
                table = self.statistics[key]
                full = declared or padded
                return lerobot_normalizer(what, mode, eps, table, full if of_file else None)
            except Pi0Error as problem_of_form:
                sentence = f"{self.step}: {problem_of_form}"
                findings.append(error("statistics-form", sentence))
        return identity(what, width)


def read_normalization(step: Step, given: Given, findings: list[Finding]) -> Normalization:
    """A normaliser step with its statistics.

    Args:
        findings: what is found is appended.

    Raises:
        CheckpointError: the statistics file is damaged.
    """
    file = step.state_file
    if file is not None and file.is_file():
        return Normalization(step, given, {**read_statistics(file), **(given.statistics or {})})
    if given.statistics is not None or not _needs_statistics(step, given):
        return Normalization(step, given, given.statistics or {})
    missing = (
        f"expected the statistics file of {step.name}, found {file} missing"
        if file is not None
        else f"expected {step.name} to name a state_file, found none: this checkpoint carries no "
        "statistics"
    )
    findings.append(error("statistics-missing", f"{step.file}: {missing}. {REMEDY}"))
    return Normalization(step, given, None)


def _needs_statistics(step: Step, given: Given) -> bool:
    modes: Mapping[str, str] = step.config["norm_map"] or {}
    vectors = {given.mode} if given.mode else {modes.get("STATE"), modes.get("ACTION")}
    return bool({*vectors, modes.get("VISUAL")} - {"IDENTITY", None})
