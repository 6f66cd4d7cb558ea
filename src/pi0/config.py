"""Sizes of a π0 model: three frozen tables and complete presets.

Knows nothing of files or robots. A configuration of a checkpoint is inferred from its tensors
(`pi0.checkpoint.infer`); the presets are used to synthesise checkpoints and by tests.

Source of the published sizes: openpi's `gemma.py`, `siglip.py` and `pi0_config.py`.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace

from pi0.errors import ConfigError

PALIGEMMA_VOCABULARY = 257152  # pieces; whose tokenizer is not ours to write
MAX_STEPS = 10_000  # of denoising; engines keep something for each
MAX_IMAGE_SIZE = 1_000_000  # sizes of tensors overflow beyond


@dataclass(frozen=True)
class SiglipConfig:
    """A SigLIP vision tower. `image_size` is in pixels and is the size the model runs at."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    patch_size: int
    image_size: int

    @property
    def grid(self) -> int:
        """Patches along one side; a rest of less than one patch is left out (384 px: 27)."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid**2

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads


@dataclass(frozen=True)
class GemmaConfig:
    """A Gemma trunk: the VLM or the action expert."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Pi0Config:
    """A whole π0 (or π0.5) model.

    Attributes:
        vision, vlm, expert: the three towers. VLM and expert agree in depth, heads and head_dim.
        vocab_size: rows of the token embedding.
        state_dim, action_dim: padded widths of state and action (32 in the published model).
        horizon: actions in a chunk (50).
        max_tokens: length prompts are padded to (48 in π0, 200 in π0.5).
        adaptive_norm: True for π0.5, whose expert norms depend on the timestep and whose
            suffix has no state token.
    """

    vision: SiglipConfig
    vlm: GemmaConfig
    expert: GemmaConfig
    vocab_size: int
    state_dim: int
    action_dim: int
    horizon: int
    max_tokens: int
    adaptive_norm: bool

    def __post_init__(self) -> None:
        shared = ("depth", "num_heads", "num_kv_heads", "head_dim")
        for name in shared:
            vlm, expert = getattr(self.vlm, name), getattr(self.expert, name)
            if vlm != expert:
                raise ConfigError(
                    f"expert {name}: expected {vlm} as in the VLM, whose keys and values it "
                    f"attends to layer by layer, found {expert}."
                )
        if self.vision.width % self.vision.num_heads:
            raise ConfigError(
                f"vision num_heads: expected a divisor of the width {self.vision.width}, "
                f"found {self.vision.num_heads}."
            )
        if self.vlm.num_heads % self.vlm.num_kv_heads or self.vlm.head_dim % 2:
            raise ConfigError(
                "gemma heads: expected num_heads to be a multiple of num_kv_heads and an even "
                f"head_dim, found {self.vlm.num_heads}, {self.vlm.num_kv_heads} and "
                f"{self.vlm.head_dim}."
            )
        if self.expert.width % 2:
            raise ConfigError(
                "expert width: expected an even number, half of it sines and half cosines of the "
                f"time, found {self.expert.width}."
            )
        if self.vision.grid < 1:
            raise ConfigError(
                f"image_size: expected at least one patch of {self.vision.patch_size} pixels, "
                f"found {self.vision.image_size}."
            )

    @property
    def state_tokens(self) -> int:
        """Suffix tokens of the state, before those of the actions: one in π0, none in π0.5."""
        return 0 if self.adaptive_norm else 1

    @property
    def suffix_len(self) -> int:
        """Suffix tokens: those of the state, and one for each action."""
        return self.state_tokens + self.horizon

    def prefix_len(self, cameras: int, tokens: int | None = None) -> int:
        """Prefix tokens for a number of cameras and text tokens (default: max_tokens)."""
        return cameras * self.vision.num_patches + (self.max_tokens if tokens is None else tokens)

    def with_image_size(self, pixels: int) -> Pi0Config:
        """The same model run on square images of another size in pixels.

        Raises:
            ConfigError: no whole number of pixels, too few for a patch, or absurdly many.
        """
        try:
            pixels = operator.index(pixels)
        except TypeError as error:
            raise ConfigError(
                f"image_size: expected a whole number of pixels, found {pixels!r}."
            ) from error
        if pixels > MAX_IMAGE_SIZE:
            raise ConfigError(
                f"image_size: expected at most {MAX_IMAGE_SIZE} pixels, found {pixels}."
            )
        return replace(self, vision=replace(self.vision, image_size=pixels))


GEMMA_2B = GemmaConfig(
    width=2048, depth=18, mlp_dim=16384, num_heads=8, num_kv_heads=1, head_dim=256
)
GEMMA_300M = GemmaConfig(
    width=1024, depth=18, mlp_dim=4096, num_heads=8, num_kv_heads=1, head_dim=256
)
SO400M = SiglipConfig(
    width=1152, depth=27, mlp_dim=4304, num_heads=16, patch_size=14, image_size=224
)

PRESETS = {
    # The published model.
    "pi0_base": Pi0Config(
        vision=SO400M,
        vlm=GEMMA_2B,
        expert=GEMMA_300M,
        vocab_size=PALIGEMMA_VOCABULARY,
        state_dim=32,
        action_dim=32,
        horizon=50,
        max_tokens=48,
        adaptive_norm=False,
    ),
    # Real image size and chunk, narrow towers: runs in a fraction of a second on any machine.
    "small": Pi0Config(
        vision=SiglipConfig(
            width=128, depth=4, mlp_dim=384, num_heads=4, patch_size=14, image_size=224
        ),
        vlm=GemmaConfig(width=256, depth=4, mlp_dim=1024, num_heads=8, num_kv_heads=1, head_dim=32),
        expert=GemmaConfig(
            width=128, depth=4, mlp_dim=512, num_heads=8, num_kv_heads=1, head_dim=32
        ),
        vocab_size=512,
        state_dim=32,
        action_dim=32,
        horizon=50,
        max_tokens=48,
        adaptive_norm=False,
    ),
    # For tests: 4 patches an image, two layers everywhere.
    "tiny": Pi0Config(
        vision=SiglipConfig(
            width=48, depth=2, mlp_dim=96, num_heads=4, patch_size=14, image_size=28
        ),
        vlm=GemmaConfig(width=64, depth=2, mlp_dim=128, num_heads=8, num_kv_heads=1, head_dim=16),
        expert=GemmaConfig(width=32, depth=2, mlp_dim=64, num_heads=8, num_kv_heads=1, head_dim=16),
        vocab_size=512,
        state_dim=32,
        action_dim=32,
        horizon=50,
        max_tokens=48,
        adaptive_norm=False,
    ),
}
for _name in list(PRESETS):  # π0.5: the same towers, a longer prompt, which holds the state
    _pi05 = replace(PRESETS[_name], max_tokens=200, adaptive_norm=True)
    PRESETS[f"pi05_{_name.removeprefix('pi0_')}"] = _pi05
