"""How people name an engine: ENGINE[:PRECISION][@DEVICE], everywhere."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pi0.engines.registry import find_engine
from pi0.errors import ConfigError, EngineError

PRECISION_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
GRAMMAR = re.compile(r"([^:@\s]+)(?::([^:@\s]+))?(?:@([^@\s]+))?")


@dataclass(frozen=True)
class EngineSpec:
    """An engine by name, its precision, and its device (None: the engine's default)."""

    name: str
    precision: str
    device: str | None = None

    @property
    def label(self) -> str:
        """The text that `parse` reads, with the precision always in it."""
        return f"{self.name}:{self.precision}" + (f"@{self.device}" if self.device else "")

    @classmethod
    def parse(
        cls, text: str, precision: str | None = None, device: str | None = None
    ) -> EngineSpec:
        """Reads ENGINE[:PRECISION][@DEVICE], such as cpu:int8 or reference:bfloat16@cuda:1.

        Args:
            precision, device: what an option beside the text says; it completes the text.

        Raises:
            EngineError: not of this form, no such engine, or not one of its precisions.
            ConfigError: the text and an option contradict each other; float16.
        """
        name, chosen, device = split_spec(text, precision, device)
        offered = find_engine(name).capabilities.precisions
        if chosen is not None and chosen not in offered:
            raise EngineError(
                f"engine {name}, dtype: expected one of {', '.join(offered)}, found {chosen!r}."
            )
        return cls(name, chosen or offered[0], device)


def split_spec(
    text: str, precision: str | None = None, device: str | None = None
) -> tuple[str, str | None, str | None]:
    """Name, precision and device as `EngineSpec.parse` reads them, of an engine that need not be
    one; None: not stated."""
    matched = GRAMMAR.fullmatch(text) if isinstance(text, str) else None
    if matched is None:
        raise EngineError(
            "engine: expected ENGINE[:PRECISION][@DEVICE], as in cpu:int8 or "
            f"reference:bfloat16@cuda:1, found {text!r}."
        )
    name, text_precision, text_device = matched.groups()
    chosen = _agree(
        text, "dtype", canonical_precision(text_precision), canonical_precision(precision)
    )
    return name, chosen, _agree(text, "device", text_device, device)


def canonical_precision(name: str | None) -> str | None:
    """A precision by its full name.

    Raises:
        ConfigError: float16.
    """
    name = PRECISION_ALIASES.get(name or "", name)
    if name == "float16":
        from pi0.dtypes import parse_dtype  # needs torch

        parse_dtype(name)  # says why not
    return name


def _agree(text: str, option: str, inside: str | None, beside: str | None) -> str | None:
    """What a spec or an option beside it says; ConfigError if they differ."""
    if inside is not None and beside is not None and inside != beside:
        raise ConfigError(
            f"{option}: expected {inside}, as in engine {text}, found {beside}. Leave one of them "
            "out."
        )
    return beside if inside is None else inside
