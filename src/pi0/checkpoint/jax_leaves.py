"""The leaves of openpi's JAX parameters: names, shapes, and how each becomes our tensors.

A leaf holds all layers of a kind of tensor, on its first axis, with heads on axes of their own and
matrices as [in, out]; ours are one per layer, as PyTorch has them: [out, in]. Each line of the
tables says both: the axes of the leaf, an arrow, the axes of our tensor, where parentheses join
axes. An axis that is not on the right is counted out: layers, or the tensors that a leaf holds side
by side (key and value; gate and up).

    l w m n h   vision: layers, width, MLP, heads, head dim    p q s   patch, patch, positions
    L N K H V   layers, heads, key-value heads, head dim, vocabulary
    D M   VLM: width, MLP       E F   expert: width, MLP       A S   action and state

Source: openpi's `models/{siglip,gemma,pi0}.py`. Knows nothing of files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

Shape = tuple[int, ...]
Index = tuple[int, ...]

_BLOCK = "PaliGemma/img/Transformer/encoderblock"
_HEADS = f"{_BLOCK}/MultiHeadDotProductAttention_0"
_LAYERS = "PaliGemma/llm/layers"
VISION = {
    f"{_HEADS}/query/kernel": ("l w n h -> (n h) w", "blocks.*.q_proj.weight"),
    f"{_HEADS}/query/bias": ("l n h -> (n h)", "blocks.*.q_proj.bias"),
    f"{_HEADS}/key/kernel": ("l w n h -> (n h) w", "blocks.*.k_proj.weight"),
    f"{_HEADS}/key/bias": ("l n h -> (n h)", "blocks.*.k_proj.bias"),
    f"{_HEADS}/value/kernel": ("l w n h -> (n h) w", "blocks.*.v_proj.weight"),
    f"{_HEADS}/value/bias": ("l n h -> (n h)", "blocks.*.v_proj.bias"),
    f"{_HEADS}/out/kernel": ("l n h w -> w (n h)", "blocks.*.out_proj.weight"),
    f"{_HEADS}/out/bias": ("l w -> w", "blocks.*.out_proj.bias"),
    f"{_BLOCK}/LayerNorm_0/scale": ("l w -> w", "blocks.*.norm1.weight"),
    f"{_BLOCK}/LayerNorm_0/bias": ("l w -> w", "blocks.*.norm1.bias"),
    f"{_BLOCK}/LayerNorm_1/scale": ("l w -> w", "blocks.*.norm2.weight"),
    f"{_BLOCK}/LayerNorm_1/bias": ("l w -> w", "blocks.*.norm2.bias"),
    f"{_BLOCK}/MlpBlock_0/Dense_0/kernel": ("l w m -> m w", "blocks.*.fc1.weight"),
    f"{_BLOCK}/MlpBlock_0/Dense_0/bias": ("l m -> m", "blocks.*.fc1.bias"),
    f"{_BLOCK}/MlpBlock_0/Dense_1/kernel": ("l m w -> w m", "blocks.*.fc2.weight"),
    f"{_BLOCK}/MlpBlock_0/Dense_1/bias": ("l w -> w", "blocks.*.fc2.bias"),
    "PaliGemma/img/Transformer/encoder_norm/scale": ("w -> w", "norm.weight"),
    "PaliGemma/img/Transformer/encoder_norm/bias": ("w -> w", "norm.bias"),
    "PaliGemma/img/embedding/kernel": ("p q 3 w -> w 3 p q", "patch_embedding.conv.weight"),
    "PaliGemma/img/embedding/bias": ("w -> w", "patch_embedding.conv.bias"),
    "PaliGemma/img/pos_embedding": ("1 s w -> s w", "patch_embedding.position"),
}
PROJECTOR = {
    "PaliGemma/img/head/kernel": ("w D -> D w", "projector.weight"),
    "PaliGemma/img/head/bias": ("D -> D", "projector.bias"),
    "PaliGemma/llm/embedder/input_embedding": ("V D -> V D", "token_embedding.weight"),
}
# Of a trunk; `{}` is nothing for the VLM and _1 for the expert, whose width and MLP are E and F.
GEMMA = {
    _LAYERS + "/attn/q_einsum{}/w": ("L N D H -> (N H) D", "blocks.*.q_proj.weight"),
    _LAYERS + "/attn/kv_einsum{}/w": (
        "L 2 K D H -> (K H) D", "blocks.*.k_proj.weight", "blocks.*.v_proj.weight"
    ),
    _LAYERS + "/attn/attn_vec_einsum{}/w": ("L N H D -> D (N H)", "blocks.*.o_proj.weight"),
    _LAYERS + "/mlp{}/gating_einsum": (
        "L 2 D M -> M D", "blocks.*.gate_proj.weight", "blocks.*.up_proj.weight"
    ),
    _LAYERS + "/mlp{}/linear": ("L M D -> D M", "blocks.*.down_proj.weight"),
}  # fmt: skip
NORMS = {
    _LAYERS + "/pre_attention_norm{}": ("L ", "blocks.*.norm1"),
    _LAYERS + "/pre_ffw_norm{}": ("L ", "blocks.*.norm2"),
    "PaliGemma/llm/final_norm{}": ("", "norm"),
}
# Module → the axes of its kernel; its bias has the last of them.
PROJECTIONS = {"action_in_proj": "A E", "action_out_proj": "E A"}
PROJECTIONS_PI0 = {"state_proj": "S E", "action_time_mlp_in": "2E E", "action_time_mlp_out": "E E"}
PROJECTIONS_PI05 = {"time_mlp_in": "E E", "time_mlp_out": "E E"}

ATTENTION_OUT = "attn_vec_einsum"


@dataclass(frozen=True)
class Leaf:
    """A leaf of the tree.

    Attributes:
        axes: of the leaf, such as ("L", "2", "K", "D", "H").
        groups: of its axes, one for each axis of our tensor.
        targets: our names, `*` standing for the layer; one for each tensor held side by side.
    """

    axes: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...]
    targets: tuple[str, ...]

    @property
    def kept(self) -> list[str]:
        """The axes of one of our tensors, in the leaf's order."""
        return [axis for axis in self.axes if any(axis in group for group in self.groups)]

    def tensors(self, shape: Shape) -> Iterator[tuple[Index, str]]:
        """Where each of our tensors lies in a leaf of this shape, and its name."""
        layers = shape[0] if "*" in self.targets[0] else 1
        aside = next((axis for axis in self.axes if axis.isdigit()), None)
        for layer in range(layers):
            for at, target in enumerate(self.targets):
                index = (layer,) if "*" in target else ()
                yield (
                    (*index, at) if aside in ("1", "2") else index,
                    target.replace("*", str(layer)),
                )

    def our_shape(self, shape: Shape) -> Shape:
        """The shape of each of our tensors, for a leaf of this shape."""
        sizes = dict(zip(self.axes, shape, strict=True))
        our = []
        for group in self.groups:
            size = 1
            for axis in group:
                size *= sizes[axis]
            our.append(size)
        return tuple(our)

    def to_ours(self, part: Tensor) -> Tensor:
        """Our tensor from its part of the leaf, [*kept]: a view where it can be."""
        order = [self.kept.index(axis) for group in self.groups for axis in group]
        sizes = dict(zip(self.kept, part.shape, strict=True))
        shape = [1] * len(self.groups)
        for i, group in enumerate(self.groups):
            for axis in group:
                shape[i] *= sizes[axis]
        return part.permute(order).reshape(shape)

    def to_part(self, ours: Tensor, shape: Shape) -> Tensor:
        """The part of a leaf of this shape that one of our tensors is; inverse of `to_ours`."""
        sizes = dict(zip(self.axes, shape, strict=True))
        order = [axis for group in self.groups for axis in group]
        whole = ours.reshape([sizes[axis] for axis in order])
        return whole.permute([order.index(axis) for axis in self.kept])


def leaves(adaptive_norm: bool) -> dict[str, Leaf]:
    """Every leaf of a π0, or of a π0.5 (adaptive_norm), in the tree's order."""
    found: dict[str, Leaf] = {}

    def add(name: str, axes: str, *targets: str) -> None:
        left, right = axes.split(" -> ")
        groups = tuple(
            tuple(group.strip("()").split()) for group in re.findall(r"\([^)]*\)|\S+", right)
        )
        found[name] = Leaf(tuple(left.split()), groups, targets)

    for name, (axes, target) in VISION.items():
        add(name, axes, f"vision_tower.{target}")
    for name, (axes, target) in PROJECTOR.items():
        add(name, axes, target)
    for trunk, suffix, widths in (("vlm", "", {}), ("expert", "_1", {"D": "E", "M": "F"})):
        renamed = str.maketrans(widths)
        for name, (axes, *targets) in GEMMA.items():
            ours = [f"{trunk}.{target}" for target in targets]
            add(name.format(suffix), axes.translate(renamed), *ours)
        for name, (layers, target) in NORMS.items():
            name, target = name.format(suffix), f"{trunk}.{target}"
            if adaptive_norm and trunk == "expert":
                add(f"{name}/Dense_0/kernel", f"{layers}E 3E -> 3E E", f"{target}.dense.weight")
                add(f"{name}/Dense_0/bias", f"{layers}3E -> 3E", f"{target}.dense.bias")
            else:
                axes = f"{layers}D -> D".translate(renamed)
                add(f"{name}/scale", axes, f"{target}.weight")
    for name, axes in (
        PROJECTIONS | (PROJECTIONS_PI05 if adaptive_norm else PROJECTIONS_PI0)
    ).items():
        into, out = axes.split()
        if into == out:  # both axes need a name of their own
            into = "1E"
        add(f"{name}/kernel", f"{into} {out} -> {out} {into}", f"{name}.weight")
        add(f"{name}/bias", f"{out} -> {out}", f"{name}.bias")
    return dict(sorted(found.items()))


def lora_leaves(name: str) -> tuple[str, str]:
    """The two leaves with the factors of a leaf's LoRA."""
    stem = name.removesuffix("/w")
    join = "_" if stem == name else "/"
    return f"{stem}{join}lora_a", f"{stem}{join}lora_b"


def is_adaptive(names: Iterable[str]) -> bool:
    """Whether names of leaves are those of a π0.5."""
    return any(name.startswith("time_mlp_in/") or "norm_1/Dense_0/" in name for name in names)


def find_sizes(table: Mapping[str, Leaf], shapes: Mapping[str, Shape]) -> dict[str, int]:
    """The size of every axis.

    Raises:
        ValueError: (name, expected shape, found shape) of a leaf that does not fit the others.
    """
    sizes: dict[str, int] = {}
    for name, leaf in table.items():
        shape = shapes[name]
        if len(shape) != len(leaf.axes) or 0 in shape:
            raise ValueError(name, leaf.axes, shape)
        for axis, size in zip(leaf.axes, shape, strict=True):
            factor, letter = _parse(axis)
            if letter and size % factor == 0:
                sizes.setdefault(letter, size // factor)
        expected = expected_shape(leaf, sizes)
        if shape != expected:
            raise ValueError(name, expected, shape)
    return sizes


def expected_shape(leaf: Leaf, sizes: Mapping[str, int]) -> Shape:
    """The shape of a leaf in a model of these sizes."""
    return tuple(
        factor * sizes.get(letter, 1) for factor, letter in (_parse(axis) for axis in leaf.axes)
    )


def _parse(axis: str) -> tuple[int, str]:
    """Factor and letter of an axis: "3E" is three times E, "2" is two."""
    digits = re.match(r"\d*", axis)
    assert digits is not None
    return int(digits[0] or 1), axis[digits.end() :]
