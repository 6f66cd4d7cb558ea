"""transformers' PI0ForConditionalGeneration, without its processor: the inputs are the model's.

Theirs has no place in the sequence for a masked camera, so its prefix is not comparable with ours
where one is masked; its velocities are.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from pi0.checkpoint.load import Checkpoint
from pi0.config import GemmaConfig, Pi0Config
from pi0.dtypes import parse_dtype
from pi0.errors import ObservationError
from pi0.peers.weights import EMBEDDING_HEAD, fill

PACKAGE = "transformers"
UNUSED = "model.dit.embed_tokens.weight"  # the expert reads no text
CACHES = ("cache", "past_key_values")  # what their forward calls it, newer versions first
RENAMED = (
    (EMBEDDING_HEAD, "model.vlm.language_model.embed_tokens.weight"),
    ("paligemma_with_expert.paligemma.model.", "model.vlm."),
    ("paligemma_with_expert.gemma_expert.model.", "model.dit."),
    ("action_in_proj.", "embed_action_time.action_in_proj."),
    ("action_time_mlp_", "embed_action_time.action_time_mlp_"),
    ("state_proj.", "embed_action_time.state_proj."),
)


class Model:
    """transformers' model with a checkpoint's weights."""

    def __init__(self, checkpoint: Checkpoint, dtype: str, device: str) -> None:
        from transformers import PI0Config, PI0ForConditionalGeneration
        from transformers.initialization import no_init_weights

        config = self.config = checkpoint.config
        self.name = f"transformers {version(PACKAGE)}"
        theirs = PI0Config(
            vlm_config={
                "model_type": "paligemma",
                "projection_dim": config.vlm.width,
                "hidden_size": config.vlm.width,
                "image_token_id": image_token(config),
                "text_config": trunk(config, config.vlm),
                "vision_config": tower(config),
            },
            dit_config=trunk(config, config.expert),
            chunk_size=config.horizon,
            max_state_dim=config.state_dim,
            max_action_dim=config.action_dim,
        )
        theirs._attn_implementation = "eager"
        with no_init_weights():  # every tensor is filled below, but for the one that is not used
            self.model = PI0ForConditionalGeneration(theirs).eval()
        places = {name: v for name, v in self.model.state_dict().items() if name != UNUSED}
        inner = any(".vision_tower.vision_model." in name for name in places)  # before 5.23
        fill(places, checkpoint, lambda name: (their_name(name, inner),))
        for parameter in self.model.parameters():  # not the buffers: frequencies stay float32
            parameter.data = parameter.data.to(parse_dtype(dtype))
        self.model.to(device)

    def prefill(self, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
        """Runs their prefix, and keeps the arguments that their loop gives to a denoising step."""
        prefix: dict[str, Any] = {}
        forward = self.model.forward

        class Result:
            logits = torch.zeros(())

        def first_step(**kwargs: Any) -> type[Result]:
            prefix.update(kwargs)
            return Result

        self.model.forward = first_step
        try:
            state = arrays["state"]
            noise = state.new_zeros(len(state), self.config.horizon, self.config.action_dim)
            self.sample(arrays, noise, 1)
        finally:
            self.model.forward = forward
        self.prefix = prefix
        return {}

    def velocity(self, x_t: Tensor, t: Tensor) -> Tensor:
        given = {"noise": self._cast(x_t), "timestep": t}
        (past,) = (self.prefix[name] for name in CACHES if name in self.prefix)
        length = past.get_seq_length()
        v: Tensor = self.model(**{**self.prefix, **given}).logits
        past.crop(length - past.get_seq_length())  # as their loop does
        return v[:, -self.config.horizon :]

    def sample(self, arrays: dict[str, Tensor], noise: Tensor, steps: int) -> Tensor:
        cameras = arrays["image_mask"].sum(1)
        if len(set(cameras.tolist())) != 1:
            raise ObservationError(
                "image_mask: expected as many cameras in every row for transformers, found "
                "different numbers."
            )
        # A placeholder token for every patch of a camera that is there.
        patches = torch.full(
            (len(cameras), int(cameras[0]) * self.config.vision.num_patches),
            image_token(self.config),
            device=cameras.device,
        )
        text = arrays["token_mask"].long()
        actions: Tensor = self.model.sample_actions(
            state=self._cast(arrays["state"]),
            input_ids=torch.cat([patches, arrays["tokens"]], 1),
            attention_mask=torch.cat([torch.ones_like(patches), text], 1),
            pixel_values=self._cast(arrays["images"]),
            pixel_attention_mask=arrays["image_mask"],
            noise=self._cast(noise),
            num_steps=steps,
        )
        return actions

    def _cast(self, value: Tensor) -> Tensor:
        return value.to(self.model.dtype)


def trunk(config: Pi0Config, gemma: GemmaConfig) -> dict[str, Any]:
    return {
        "model_type": "gemma",
        "hidden_size": gemma.width,
        "num_hidden_layers": gemma.depth,
        "intermediate_size": gemma.mlp_dim,
        "num_attention_heads": gemma.num_heads,
        "num_key_value_heads": gemma.num_kv_heads,
        "head_dim": gemma.head_dim,
        "vocab_size": config.vocab_size,
        "hidden_activation": "gelu_pytorch_tanh",
    }


def tower(config: Pi0Config) -> dict[str, Any]:
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": config.vision.width,
        "intermediate_size": config.vision.mlp_dim,
        "num_hidden_layers": config.vision.depth,
        "num_attention_heads": config.vision.num_heads,
        "patch_size": config.vision.patch_size,
        "image_size": config.vision.image_size,
        "projection_dim": config.vlm.width,
        "vision_use_head": False,
    }


def their_name(name: str, inner: bool) -> str:
    """Their name of a tensor, by its name in openpi's layout."""
    for prefix, theirs in RENAMED:
        if name.startswith(prefix):
            name = theirs + name.removeprefix(prefix)
            break
    return name if inner else name.replace(".vision_tower.vision_model.", ".vision_tower.")


def image_token(config: Pi0Config) -> int:
    """An id that no text token has: PaliGemma's is 257152, the first beyond the vocabulary."""
    return config.vocab_size
