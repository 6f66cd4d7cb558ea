"""What LeRobot does to a task before the model reads it: a line break and the tokenizer's settings.

Source: LeRobot 0.6.1, `policies/pi0/processor_pi0.py`, `processor/tokenizer_processor.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pi0.findings import Finding, error, warning
from pi0.policy.lerobot.steps import Processors

NEWLINE, TOKENIZE = "pi0_new_line_processor", "tokenizer_processor"


@dataclass(frozen=True)
class Prompt:
    """See the attributes of the same names of `LerobotProgram`."""

    newline: bool
    max_tokens: int | None
    padding_side: Literal["left", "right"]
    truncation: bool


def read_prompt(
    processors: Processors,
    settings: Mapping[str, Any],
    tokenizer_given: bool,
    findings: list[Finding],
) -> Prompt:
    """The prompt of a checkpoint.

    Args:
        settings: the content of config.json.
        tokenizer_given: the caller names a tokenizer, whatever the step says.
        findings: what is found is appended.
    """
    tokenizer = processors.find(TOKENIZE)
    if tokenizer is None:
        if settings.get("type") != "pi0":
            findings.append(
                warning(
                    "tokenizer-assumed",
                    f"{processors.folder}: expected a step {TOKENIZE} in the preprocessor, found "
                    "none: prompts end in a line break, as in every π0 of LeRobot.",
                )
            )
        return Prompt(newline=True, max_tokens=None, padding_side="right", truncation=True)
    name = tokenizer.config["tokenizer_name"]
    if name is not None and "paligemma" not in name.lower() and not tokenizer_given:
        findings.append(
            error(
                "tokenizer-other",
                f"{tokenizer} tokenizer_name: expected PaliGemma's, found {name}. Name the file of "
                "the tokenizer that the checkpoint was trained with, with --tokenizer.",
            )
        )
    newline = processors.find(NEWLINE)
    return Prompt(
        newline=newline is not None and newline.index < tokenizer.index,
        max_tokens=tokenizer.config["max_length"],
        padding_side=tokenizer.config["padding_side"],
        truncation=tokenizer.config["truncation"] not in (False, "do_not_truncate"),
    )
