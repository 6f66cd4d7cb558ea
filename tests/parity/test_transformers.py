"""Against transformers' own π0 on the same weights: an implementation that we did not write.

Tolerance: both compute in float32 but order sums differently; the largest difference seen is 3e-6
at values of about 4. 1e-4 leaves room for other machines, and is far below any planted bug.
"""

from __future__ import annotations

import pytest
import torch

from pi0.config import PRESETS
from pi0.inputs import ModelInputs, random_inputs
from pi0.model import Pi0
from pi0.model.pi0 import no_tap

transformers = pytest.importorskip(
    "transformers", minversion="5.5", reason="needs transformers >= 5.5 (pip install 'pi0[test]')"
)

TOLERANCE = 1e-4
CONFIG = PRESETS["tiny"]
IMAGE_TOKEN = CONFIG.vocab_size  # an id that no text token has


def their_config():
    vision, vlm, expert = CONFIG.vision, CONFIG.vlm, CONFIG.expert

    def gemma(trunk):
        return {
            "model_type": "gemma",
            "hidden_size": trunk.width,
            "num_hidden_layers": trunk.depth,
            "intermediate_size": trunk.mlp_dim,
            "num_attention_heads": trunk.num_heads,
            "num_key_value_heads": trunk.num_kv_heads,
            "head_dim": trunk.head_dim,
            "vocab_size": CONFIG.vocab_size,
            "hidden_activation": "gelu_pytorch_tanh",
        }

    config = transformers.PI0Config(
        vlm_config={
            "model_type": "paligemma",
            "projection_dim": vlm.width,
            "hidden_size": vlm.width,
            "image_token_id": IMAGE_TOKEN,
            "text_config": gemma(vlm),
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": vision.width,
                "intermediate_size": vision.mlp_dim,
                "num_hidden_layers": vision.depth,
                "num_attention_heads": vision.num_heads,
                "patch_size": vision.patch_size,
                "image_size": vision.image_size,
                "projection_dim": vlm.width,
                "vision_use_head": False,
            },
        },
        dit_config=gemma(expert),
    )
    config._attn_implementation = "eager"
    return config


@pytest.fixture(scope="module")
def theirs(tiny: Pi0):
    """Their model with our weights, through the table of their module names below."""
    model = transformers.PI0ForConditionalGeneration(their_config()).eval()
    ours = tiny.state_dict()
    state = {
        name: ours[our_name(name)]
        for name in model.state_dict()
        if name != "model.dit.embed_tokens.weight"
    }
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == ["model.dit.embed_tokens.weight"]
    assert not unexpected
    return model


def our_name(name: str) -> str:
    for old, new in (
        ("model.vlm.vision_tower.vision_model.", "model.vlm.vision_tower."),  # before 5.23
        (
            "model.vlm.vision_tower.embeddings.patch_embedding.",
            "vision_tower.patch_embedding.conv.",
        ),
        (
            "model.vlm.vision_tower.embeddings.position_embedding.weight",
            "vision_tower.patch_embedding.position",
        ),
        ("model.vlm.vision_tower.encoder.layers.", "vision_tower.blocks."),
        ("model.vlm.vision_tower.post_layernorm.", "vision_tower.norm."),
        ("model.vlm.multi_modal_projector.linear.", "projector."),
        ("model.vlm.language_model.embed_tokens.", "token_embedding."),
        ("model.vlm.language_model.layers.", "vlm.blocks."),
        ("model.vlm.language_model.norm.", "vlm.norm."),
        ("model.dit.layers.", "expert.blocks."),
        ("model.dit.norm.", "expert.norm."),
        ("embed_action_time.", ""),
        (".layer_norm1.", ".norm1."),
        (".layer_norm2.", ".norm2."),
        (".input_layernorm.", ".norm1."),
        (".post_attention_layernorm.", ".norm2."),
        (".self_attn.", "."),
        (".mlp.", "."),
    ):
        name = name.replace(old, new)
    return name


def observation(masked_camera: bool, text: int) -> tuple[ModelInputs, torch.Tensor]:
    inputs, noise = random_inputs(CONFIG, cameras=3, tokens=16, seed=1)
    if masked_camera:
        inputs.image_mask[0, 1] = False
    inputs.token_mask[0, text:] = False
    return inputs, noise


def their_arguments(inputs: ModelInputs) -> dict[str, torch.Tensor]:
    """Theirs has no place in the sequence for a masked camera; the model is handed all images."""
    patches = int(inputs.image_mask.sum()) * CONFIG.vision.num_patches
    return {
        "state": inputs.state,
        "input_ids": torch.cat([torch.full((1, patches), IMAGE_TOKEN), inputs.tokens], 1),
        "attention_mask": torch.cat(
            [torch.ones(1, patches, dtype=torch.long), inputs.token_mask.long()], 1
        ),
        "pixel_values": inputs.images,
        "pixel_attention_mask": inputs.image_mask,
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("masked_camera", "text"), [(False, 16), (False, 9), (True, 9)])
def test_actions(tiny: Pi0, theirs, masked_camera: bool, text: int) -> None:
    inputs, noise = observation(masked_camera, text)
    ours = tiny.sample_actions(inputs, noise, steps=10)
    expected = theirs.sample_actions(**their_arguments(inputs), noise=noise, num_steps=10)
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(ours, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("masked_camera", [False, True])
def test_prefix_embeddings(tiny: Pi0, theirs, masked_camera: bool) -> None:
    """Where valid: what stands at padded places is of no effect and theirs to choose."""
    inputs, _ = observation(masked_camera, 9)
    arguments = their_arguments(inputs)
    del arguments["state"]
    with torch.no_grad():
        ours, valid = tiny.embed_prefix(inputs, no_tap)
        expected = theirs.model.embed_prefix(**arguments)
    expected = expected[arguments["attention_mask"].bool()]
    torch.testing.assert_close(ours[valid], expected, atol=TOLERANCE, rtol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("t", [1.0, 0.5, 0.1])
def test_velocity_of_each_step(tiny: Pi0, theirs, t: float) -> None:
    inputs, noise = observation(True, 9)
    time = torch.tensor([t])
    with torch.no_grad():
        ours = tiny.velocity(noise, time, inputs.state, tiny.prefill(inputs))
        expected = theirs(
            **their_arguments(inputs), noise=noise, timestep=time, actions=noise
        ).logits
    torch.testing.assert_close(ours, expected[:, -CONFIG.horizon :], atol=TOLERANCE, rtol=0)
