"""What engines are compared on: inputs that show everything, and calls that differ in one thing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pi0.config import Pi0Config
from pi0.inputs import ModelInputs, random_inputs


@dataclass(frozen=True)
class Case:
    """Named inputs, and noise [B, horizon, action_dim].

    `given`: by somebody, who wants to know about these; else other noise will do as well.
    """

    name: str
    inputs: ModelInputs
    noise: Tensor
    given: bool = False


Change = Callable[[Pi0Config, Case], Case]


def default_cases(config: Pi0Config, cameras: int, tokens: int, seed: int = 0) -> list[Case]:
    """Everything valid; and, of another observation, a camera masked that is not the last one, if
    there are others, the latter half of the text, and a word within the first half: an engine that
    counts what is valid, rather than look where it is, takes others for it."""
    inputs, noise = random_inputs(config, cameras, tokens, seed)
    other, other_noise = random_inputs(config, cameras, tokens, seed + 1)
    image_mask, token_mask = other.image_mask.clone(), other.token_mask.clone()
    image_mask[:, max(cameras - 2, 0)] = cameras == 1
    half = math.ceil(tokens / 2)
    token_mask[:, half:] = False
    token_mask[:, 1 : half - 1][:, :1] = False
    masked = replace(other, image_mask=image_mask, token_mask=token_mask)
    return [Case("all valid", inputs, noise), Case("masked", masked, other_noise)]


def one_change_each(config: Pi0Config, case: Case) -> list[Case]:
    """Calls of which each differs in one input from the one before it, named after that input.

    The first is the case itself, and so is the last. An engine that keeps something from one call
    to the next, and does not notice that this input changed, answers the question before.
    """
    calls = [replace(case, name="first")]
    for name, change in CHANGES.items():
        last = calls[-1]
        if name.endswith("state") and not config.state_tokens:
            continue  # π0.5 reads it from the prompt
        changed = change(config, last)
        seen = changed.inputs.image_mask.any(1) | changed.inputs.token_mask.any(1)
        if seen.all():
            calls.append(replace(changed, name=name))
    return [*calls, replace(case, name="again")]


def _first(mask: Tensor) -> Tensor:
    """Of each row, the place of the first that is valid."""
    return mask.int().argmax(1)


def _last(mask: Tensor) -> Tensor:
    return mask.cumsum(1).argmax(1)


def _image(find: Callable[[Tensor], Tensor]) -> Change:
    def change(_: Pi0Config, case: Case) -> Case:
        """Of one valid camera; no pixel stays."""
        images = case.inputs.images.clone()
        for row, view in enumerate(find(case.inputs.image_mask).tolist()):
            images[row, view] = (images[row, view] + 2) % 2 - 1
        return replace(case, inputs=replace(case.inputs, images=images))

    return change


def _token(find: Callable[[Tensor], Tensor]) -> Change:
    def change(config: Pi0Config, case: Case) -> Case:
        """One valid token."""
        tokens, rows = case.inputs.tokens.clone(), torch.arange(len(case.noise))
        place = find(case.inputs.token_mask)
        tokens[rows, place] = (tokens[rows, place] + config.vocab_size // 2) % config.vocab_size
        return replace(case, inputs=replace(case.inputs, tokens=tokens))

    return change


def _state(_: Pi0Config, case: Case) -> Case:
    return replace(case, inputs=replace(case.inputs, state=1 - case.inputs.state))


def _zero_state(_: Pi0Config, case: Case) -> Case:
    """A state as any other."""
    return replace(case, inputs=replace(case.inputs, state=torch.zeros_like(case.inputs.state)))


def _noise(_: Pi0Config, case: Case) -> Case:
    return replace(case, noise=case.noise.flip(1))


def _token_mask(_: Pi0Config, case: Case) -> Case:
    """The last valid token is padding."""
    mask = case.inputs.token_mask.clone()
    mask[torch.arange(len(mask)), _last(mask)] = False
    return replace(case, inputs=replace(case.inputs, token_mask=mask))


def _other_token_mask(_: Pi0Config, case: Case) -> Case:
    """As many tokens are valid, of which one is another."""
    return replace(case, inputs=replace(case.inputs, token_mask=case.inputs.token_mask.roll(1, 1)))


def _image_mask(_: Pi0Config, case: Case) -> Case:
    """The last camera is gone, or is there again."""
    mask = case.inputs.image_mask.clone()
    mask[:, -1] = ~mask[:, -1]
    return replace(case, inputs=replace(case.inputs, image_mask=mask))


CHANGES: dict[str, Change] = {
    "image": _image(_last),
    "first_image": _image(_first),
    "token": _token(_last),
    "first_token": _token(_first),
    "state": _state,
    "zero_state": _zero_state,
    "noise": _noise,
    "token_mask": _token_mask,
    "other_token_mask": _other_token_mask,
    "image_mask": _image_mask,
}
