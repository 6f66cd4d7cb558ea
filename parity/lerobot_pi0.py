"""LeRobot's PI0Policy on our weights, inputs and noise. Runs in LeRobot's own environment.

Its processors are left out: the inputs are the model's. OUT.npz: actions [B, 50, 32]; prefix
[1, B, X, E], the embedded images and text, also where masked; velocity [steps, B, 50, 32].
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from exchange import EMBEDDING_HEAD, Task, fill, parse_task, skip

from pi0.config import Pi0Config

EMBEDDING = "model.paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"


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


def build(task: Task) -> Any:
    """Their policy with the checkpoint's weights."""
    from lerobot.policies.pi0 import modeling_pi0
    from lerobot.policies.pi0.configuration_pi0 import PI0Config
    from transformers.initialization import no_init_weights

    if task.preset != "pi0_base":
        shrink(modeling_pi0, task.config)
    side = task.config.vision.image_size
    config = PI0Config(device="cpu", dtype=task.dtype, image_resolution=(side, side))
    with no_init_weights():  # every tensor is filled below
        policy = modeling_pi0.PI0Policy(config).eval()
    # Of both heads none is used in sampling; the embedding is stored once, as the VLM's head.
    fill(
        policy.state_dict(),
        task.checkpoint,
        lambda name: ("model." + name, *([EMBEDDING] if name == EMBEDDING_HEAD else [])),
    )
    return policy


def main() -> None:
    task = parse_task(__doc__)
    try:
        name = f"LeRobot {version('lerobot')}"
    except PackageNotFoundError:
        skip('LeRobot is not installed in this environment: pip install "lerobot[pi]==0.6.1".')
    model = build(task).model
    arrays = task.read()
    model.embed_prefix = task.record("prefix", model.embed_prefix, lambda result: result[0])
    model.denoise_step = task.record("velocity", model.denoise_step, lambda velocity: velocity)
    actions = task.timed(model.sample_actions)(
        list(arrays["images"].unbind(1)),
        list(arrays["img_masks"].unbind(1)),
        arrays["tokens"],
        arrays["token_masks"],
        arrays["state"],
        noise=arrays["noise"],
        num_steps=10,
    )
    task.finish(name, actions)


if __name__ == "__main__":
    main()
