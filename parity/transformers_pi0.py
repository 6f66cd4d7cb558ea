"""transformers' PI0ForConditionalGeneration on our weights, inputs and noise.

Its processor is left out: the inputs are the model's. OUT.npz: actions [B, 50, 32]; prefix
[1, B, X, E], the embedded images and text, without masked cameras; velocity [steps, B, 50, 32].
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from exchange import EMBEDDING_HEAD, EXPERT_HEAD, Task, fill, parse_task, skip
from torch import Tensor

from pi0.config import GemmaConfig, Pi0Config

UNUSED = "model.dit.embed_tokens.weight"  # the expert reads no text
RENAMED = (
    (EMBEDDING_HEAD, "model.vlm.language_model.embed_tokens.weight"),
    ("paligemma_with_expert.paligemma.model.", "model.vlm."),
    ("paligemma_with_expert.gemma_expert.model.", "model.dit."),
    ("action_in_proj.", "embed_action_time.action_in_proj."),
    ("action_time_mlp_", "embed_action_time.action_time_mlp_"),
    ("state_proj.", "embed_action_time.state_proj."),
)


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


def build(task: Task) -> Any:
    """Their model with the checkpoint's weights."""
    from transformers import PI0Config, PI0ForConditionalGeneration
    from transformers.initialization import no_init_weights

    config = task.config
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
    )
    theirs._attn_implementation = "eager"
    with no_init_weights():  # every tensor is filled below, but for the one that is not used
        model = PI0ForConditionalGeneration(theirs).eval()
    places = {name: value for name, value in model.state_dict().items() if name != UNUSED}
    inner = any(".vision_tower.vision_model." in name for name in places)  # before 5.23
    fill(places, task.checkpoint, lambda name: their_names(name, inner))
    for parameter in model.parameters():  # not the buffers: frequencies stay float32
        parameter.data = parameter.data.to(getattr(torch, task.dtype))
    return model


def their_names(name: str, inner: bool) -> tuple[str, ...]:
    """Their names of a tensor of the checkpoint: one, or none for the head that π0 never reads."""
    if name == EXPERT_HEAD:
        return ()
    for prefix, theirs in RENAMED:
        if name.startswith(prefix):
            name = theirs + name.removeprefix(prefix)
            break
    return (name if inner else name.replace(".vision_tower.vision_model.", ".vision_tower."),)


def image_token(config: Pi0Config) -> int:
    """An id that no text token has: PaliGemma's is 257152, the first beyond the vocabulary."""
    return config.vocab_size


def arguments(config: Pi0Config, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their arguments: a placeholder token for every patch of a camera that is there."""
    cameras = arrays["img_masks"].sum(1)
    if len(set(cameras.tolist())) != 1:
        sys.exit("img_masks: expected as many cameras in every row, found different numbers.")
    patches = torch.full(
        (len(cameras), int(cameras[0]) * config.vision.num_patches), image_token(config)
    )
    return {
        "state": arrays["state"],
        "input_ids": torch.cat([patches, arrays["tokens"]], 1),
        "attention_mask": torch.cat([torch.ones_like(patches), arrays["token_masks"].long()], 1),
        "pixel_values": arrays["images"],
        "pixel_attention_mask": arrays["img_masks"],
        "noise": arrays["noise"],
    }


def main() -> None:
    task = parse_task(__doc__)
    try:
        from transformers import PI0ForConditionalGeneration, __version__  # noqa: F401
    except ImportError:
        skip("transformers with π0 is not installed: pip install 'transformers>=5.5'.")
    model = build(task)
    model.model.embed_prefix = task.record("prefix", model.model.embed_prefix, lambda x: x)
    model.forward = task.record("velocity", model.forward, lambda result: result.logits)
    inputs = {
        name: value.to(model.dtype) if value.is_floating_point() else value
        for name, value in arguments(task.config, task.read()).items()
    }
    actions = task.timed(model.sample_actions)(**inputs, num_steps=10)
    task.finish(f"transformers {__version__}", actions)


if __name__ == "__main__":
    main()
