"""LeRobot's PI0Policy or PI05Policy, without its processors: the inputs are the model's."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from pi0.checkpoint.load import Checkpoint
from pi0.config import GEMMA_2B, GEMMA_300M, SO400M, Pi0Config
from pi0.peers.weights import EMBEDDING_HEAD, fill

PACKAGE = "lerobot"
EMBEDDING = "model.paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
EXPERT_HEAD = "model.paligemma_with_expert.gemma_expert.lm_head.weight"  # never read in sampling


class Model:
    """LeRobot's model with a checkpoint's weights."""

    def __init__(self, checkpoint: Checkpoint, dtype: str, device: str) -> None:
        from transformers.initialization import no_init_weights

        config = self.config = checkpoint.config
        self.name = f"LeRobot {version(PACKAGE)}"
        kind = "pi05" if config.adaptive_norm else "pi0"
        modeling = import_module(f"lerobot.policies.{kind}.modeling_{kind}")
        configuration = import_module(f"lerobot.policies.{kind}.configuration_{kind}")
        if (config.vision, config.vlm, config.expert) != (SO400M, GEMMA_2B, GEMMA_300M):
            shrink(modeling, config)
        side = config.vision.image_size
        theirs = getattr(configuration, f"{kind.upper()}Config")(
            device=device,
            dtype=dtype,
            image_resolution=(side, side),
            chunk_size=config.horizon,
            max_state_dim=config.state_dim,
            max_action_dim=config.action_dim,
            n_action_steps=config.horizon,
        )
        with no_init_weights():  # every tensor that is read is filled below
            policy = getattr(modeling, f"{kind.upper()}Policy")(theirs).eval()
        places = policy.state_dict()
        places.pop(EXPERT_HEAD).zero_()
        # The embedding is stored once, as the VLM's head.
        fill(
            places,
            checkpoint,
            lambda name: ("model." + name, *([EMBEDDING] if name == EMBEDDING_HEAD else [])),
        )
        self.model = policy.model

    def prefill(self, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
        """Runs their prefix, and keeps the arguments that their loop gives to a denoising step."""
        prefix: dict[str, Any] = {}
        stages: dict[str, Tensor] = {}
        embed, denoise = self.model.embed_prefix, self.model.denoise_step

        def embed_prefix(*args: Any, **kwargs: Any) -> Any:
            result = embed(*args, **kwargs)
            stages["prefix"] = result[0]
            return result

        def denoise_step(**kwargs: Any) -> Tensor:
            prefix.update(kwargs)
            return torch.zeros_like(kwargs["x_t"])

        self.model.embed_prefix, self.model.denoise_step = embed_prefix, denoise_step
        try:
            batch = len(arrays["tokens"])
            shape = batch, self.config.horizon, self.config.action_dim
            noise = torch.zeros(shape, device=arrays["tokens"].device)
            self.sample(arrays, noise, 1)
        finally:
            self.model.embed_prefix, self.model.denoise_step = embed, denoise
        self.prefix = prefix
        return stages

    def velocity(self, x_t: Tensor, t: Tensor) -> Tensor:
        given = {**self.prefix, "x_t": x_t, "timestep": t}
        v: Tensor = self.model.denoise_step(**given)
        return v

    def sample(self, arrays: dict[str, Tensor], noise: Tensor, steps: int) -> Tensor:
        actions: Tensor = self.model.sample_actions(
            list(arrays["images"].unbind(1)),
            list(arrays["image_mask"].unbind(1)),
            arrays["tokens"],
            arrays["token_mask"],
            *([arrays["state"]] if self.config.state_tokens else []),
            noise=noise,
            num_steps=steps,
        )
        return actions


def shrink(modeling: Any, config: Pi0Config) -> None:
    """Gives LeRobot's module the sizes of a configuration, instead of those it hard-codes."""

    def resized(build: Callable[..., Any], resize: Callable[[Any], None]) -> Callable[..., Any]:
        def built(config: Any) -> Any:
            resize(config)
            return build(config)

        return built

    def vlm(theirs: Any) -> None:
        theirs.hidden_size = theirs.projection_dim = config.vlm.width
        theirs.text_config.vocab_size = config.vocab_size
        vision = theirs.vision_config
        vision.projection_dim = config.vlm.width
        vision.hidden_size = config.vision.width
        vision.intermediate_size = config.vision.mlp_dim
        vision.num_hidden_layers = config.vision.depth
        vision.num_attention_heads = config.vision.num_heads

    def expert(theirs: Any) -> None:
        theirs.vocab_size = config.vocab_size

    trunks = {"gemma_2b": config.vlm, "gemma_300m": config.expert}
    modeling.get_gemma_config = trunks.__getitem__  # ours has the fields of theirs
    name = "PaliGemmaForConditionalGenerationWithPiGemma"
    setattr(modeling, name, resized(getattr(modeling, name), vlm))
    modeling.PiGemmaForCausalLM = resized(modeling.PiGemmaForCausalLM, expert)
