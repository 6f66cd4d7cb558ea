"""What LeRobot does to a task before the model reads it: a line break in π0, the state in π0.5, and
the tokenizer's settings.

Source: LeRobot 0.6.1, `policies/pi0/processor_pi0.py`, `policies/pi05/processor_pi05.py`,
`processor/tokenizer_processor.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pi0.findings import Finding, error, warning
from pi0.policy.lerobot.steps import Processors

NEWLINE, TOKENIZE = "pi0_new_line_processor", "tokenizer_processor"
ADD_STATE = "pi05_prepare_state_tokenizer_processor_step"


@dataclass(frozen=True)
class Prompt:
    """See the attributes of the same names of `LerobotProgram`."""

    state_in_prompt: bool
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
        pi05 = settings.get("type") == "pi05"
        if settings.get("type") != "pi0":
            prompts = "hold the state" if pi05 else "end in a line break"
            findings.append(
                warning(
                    "tokenizer-assumed",
                    f"{processors.folder}: expected a step {TOKENIZE} in the preprocessor, found "
                    f"none: prompts {prompts}, as in every {'π0.5' if pi05 else 'π0'} of LeRobot.",
                )
            )
        return Prompt(pi05, not pi05, max_tokens=None, padding_side="right", truncation=True)
    name = tokenizer.config["tokenizer_name"]
    if name is not None and "paligemma" not in name.lower() and not tokenizer_given:
        findings.append(
            error(
                "tokenizer-other",
                f"{tokenizer} tokenizer_name: expected PaliGemma's, found {name}. Name the file of "
                "the tokenizer that the checkpoint was trained with, with --tokenizer.",
            )
        )
    # After the tokenizer they have no effect.
    before = [step for step in processors.before if step.index < tokenizer.index]
    state_at = next((step.index for step in before if step.name == ADD_STATE), -1)
    return Prompt(
        state_in_prompt=state_at >= 0,
        # The state's step strips the task, so that a line break before it has no effect, either.
        newline=any(step.name == NEWLINE and step.index > state_at for step in before),
        max_tokens=tokenizer.config["max_length"],
        padding_side=tokenizer.config["padding_side"],
        truncation=tokenizer.config["truncation"] not in (False, "do_not_truncate"),
    )
