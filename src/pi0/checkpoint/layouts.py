"""Whose names a checkpoint uses: one table per layout, mapping their names to ours.

A π0 checkpoint is the same set of tensors under several spellings, which differ only in the
prefixes of its parts. Below a prefix all of them use the names of transformers' SigLIP and Gemma.
A layout is recognised part by part, so that a file that mixes spellings is read all the same.

Knows nothing of shapes or files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from pi0.errors import CheckpointError

# Their name below a part's prefix → our name below the part's module. `*` is a layer.
VISION = {
    "embeddings.patch_embedding": "patch_embedding.conv",
    "embeddings.position_embedding.weight": "patch_embedding.position",
    "encoder.layers.*.layer_norm1": "blocks.*.norm1",
    "encoder.layers.*.self_attn.q_proj": "blocks.*.q_proj",
    "encoder.layers.*.self_attn.k_proj": "blocks.*.k_proj",
    "encoder.layers.*.self_attn.v_proj": "blocks.*.v_proj",
    "encoder.layers.*.self_attn.out_proj": "blocks.*.out_proj",
    "encoder.layers.*.layer_norm2": "blocks.*.norm2",
    "encoder.layers.*.mlp.fc1": "blocks.*.fc1",
    "encoder.layers.*.mlp.fc2": "blocks.*.fc2",
    "post_layernorm": "norm",
}
GEMMA = {
    "layers.*.input_layernorm": "blocks.*.norm1",
    "layers.*.self_attn.q_proj": "blocks.*.q_proj",
    "layers.*.self_attn.k_proj": "blocks.*.k_proj",
    "layers.*.self_attn.v_proj": "blocks.*.v_proj",
    "layers.*.self_attn.o_proj": "blocks.*.o_proj",
    "layers.*.post_attention_layernorm": "blocks.*.norm2",
    "layers.*.mlp.gate_proj": "blocks.*.gate_proj",
    "layers.*.mlp.up_proj": "blocks.*.up_proj",
    "layers.*.mlp.down_proj": "blocks.*.down_proj",
    "norm": "norm",
}
_PROJECTION_NAMES = (
    "state_proj",
    "action_in_proj",
    "action_out_proj",
    "action_time_mlp_in",
    "action_time_mlp_out",
    "time_mlp_in",  # π0.5
    "time_mlp_out",
)
PROJECTIONS = {name: name for name in _PROJECTION_NAMES}
# Part → (table, our module). The projections lie at the root in every layout.
PARTS: dict[str, tuple[dict[str, str], str]] = {
    "vision": (VISION, "vision_tower."),
    "projector": ({"linear": "projector"}, ""),
    "language": (GEMMA, "vlm."),
    "expert": (GEMMA, "expert."),
}
EMBEDDING = "token_embedding.weight"
EMBEDDINGS = (EMBEDDING, "vision_tower.patch_embedding.position")


@dataclass(frozen=True)
class Layout:
    """The prefixes of the parts, and under which names the token embedding is stored.

    Attributes:
        embedding: full names (without root) that a written checkpoint gives to the embedding.
        unread: full names of tensors that such files hold and π0 never reads.
    """

    name: str
    origin: str
    root: str
    vision: str
    projector: str
    language: str
    expert: str
    embedding: tuple[str, ...]
    unread: tuple[str, ...]


_P = "paligemma_with_expert."
_EXPERT_HEAD = _P + "gemma_expert.lm_head.weight"

OPENPI = Layout(
    name="openpi",
    origin="openpi's PyTorch port, pi0_base (777 tensors) and pi05_base (812)",
    root="",
    vision=_P + "paligemma.model.vision_tower.vision_model.",
    projector=_P + "paligemma.model.multi_modal_projector.",
    language=_P + "paligemma.model.language_model.",
    expert=_P + "gemma_expert.model.",
    embedding=(_P + "paligemma.lm_head.weight",),
    unread=(_EXPERT_HEAD,),
)
LEROBOT = Layout(
    name="lerobot",
    origin="LeRobot's save_pretrained (778 tensors, 813 in π0.5)",
    root="model.",
    vision=OPENPI.vision,
    projector=OPENPI.projector,
    language=OPENPI.language,
    expert=OPENPI.expert,
    embedding=(
        _P + "paligemma.model.language_model.embed_tokens.weight",
        _P + "paligemma.lm_head.weight",
    ),
    unread=(_EXPERT_HEAD,),
)
LEGACY = Layout(
    name="legacy",
    origin="files written with transformers before 4.52",
    root="",
    vision=_P + "paligemma.vision_tower.vision_model.",
    projector=_P + "paligemma.multi_modal_projector.",
    language=_P + "paligemma.language_model.model.",
    expert=OPENPI.expert,
    embedding=(_P + "paligemma.language_model.lm_head.weight",),
    unread=(_EXPERT_HEAD,),
)
TRANSFORMERS = Layout(
    name="transformers",
    origin="save_pretrained of transformers' PI0ForConditionalGeneration",
    root="",
    vision=_P + "paligemma.model.vision_tower.",
    projector=OPENPI.projector,
    language=_P + "paligemma.model.language_model.model.",
    expert=OPENPI.expert,
    embedding=(_P + "paligemma.model.language_model.model.embed_tokens.weight",),
    unread=(_EXPERT_HEAD,),
)
LAYOUTS = {layout.name: layout for layout in (OPENPI, LEROBOT, LEGACY, TRANSFORMERS)}
# The head that openpi keeps at the expert, wherever a layout puts it, is never read.
UNREAD = {name for layout in LAYOUTS.values() for name in layout.unread} | {
    _P + "gemma_expert.model.embed_tokens.weight"
}
LM_HEADS = {
    name for layout in LAYOUTS.values() for name in layout.embedding if "lm_head" in name
} | {_P + "paligemma.model.lm_head.weight"}

UNMERGED = (
    "They are of a model whose LoRA was not merged. Save what peft's merge_and_unload returns, or "
    "the adapter alone with its base."
)

# Buffers of the normalisation that older LeRobot policies had inside.
BUFFER = re.compile(
    r"(?:un)?normalize(?:_inputs|_targets|_outputs)?\.(?:buffer_)?"
    r"(?P<feature>action|observation_\w+)\.(?P<statistic>mean|std|min|max|q\d\d)"
)


@dataclass(frozen=True)
class NameMap:
    """Which of a checkpoint's tensors is which.

    Attributes:
        layout: name of the layout, and how it was recognised.
        ours: their name → our name, for every tensor that the model reads.
        unread: their names that are known and not read.
        buffers: their name → the statistic that it holds, such as "action.std" (`buffers.py`).
        unexpected: their names that no layout knows.
        embeddings: their names that can serve as token embedding; the first one is read.
    """

    layout: str
    explanation: str
    ours: dict[str, str]
    unread: list[str]
    buffers: dict[str, str]
    unexpected: list[str]
    embeddings: list[str]


def map_names(names: Iterable[str]) -> NameMap:
    """Recognises the layout of a checkpoint from the names of its tensors.

    Raises:
        CheckpointError: the names are not those of a π0 checkpoint in any known layout.
    """
    names = list(names)
    root = "model." if any(name.startswith("model." + _P) for name in names) else ""
    bare = {name: name.removeprefix(root) for name in names}
    prefixes = {part: _find_prefix(part, bare.values()) for part in PARTS}
    missing = [part for part, prefix in prefixes.items() if prefix is None]
    if missing:
        hint = ""
        if any(".base_layer." in name for name in names):
            hint = f" {UNMERGED}"
        elif any("lora_" in name for name in names):
            hint = " They are of an adapter: call the file adapter_model.safetensors."
        raise CheckpointError(
            f"tensor names: expected a π0 checkpoint in one of the layouts {', '.join(LAYOUTS)}, "
            f"found {len(names)} tensors without a known {' or '.join(missing)} part"
            + (f", such as {', '.join(sorted(names)[:3])}." if names else ".")
            + hint
        )
    language = prefixes["language"] or ""
    ours: dict[str, str] = {}
    unread: list[str] = []
    buffers: dict[str, str] = {}
    unexpected: list[str] = []
    embeddings: list[str] = []
    seen: set[str] = set()
    for name, short in bare.items():
        if short in seen:  # once with the root and once without
            unexpected.append(name)
        elif short == language + "embed_tokens.weight":
            embeddings.insert(0, name)
        elif short in LM_HEADS:
            embeddings.append(name)
        elif short in UNREAD:
            unread.append(name)
        elif (our := _rename(short, prefixes)) is not None:
            ours[name] = our
        elif (statistic := _buffer_statistic(short)) is not None:
            buffers[name] = statistic
        else:
            unexpected.append(name)
        seen.add(short)
    if embeddings:
        ours[embeddings[0]] = EMBEDDING
    layout, explanation = _explain(root, prefixes)
    return NameMap(layout, explanation, ours, unread, buffers, unexpected, embeddings)


def their_names(layout: Layout, our_name: str) -> tuple[str, ...]:
    """The names that a layout gives to one of our tensors: several for the embedding, else one."""
    if our_name == EMBEDDING:
        return tuple(layout.root + name for name in layout.embedding)
    for part, (table, module) in PARTS.items():
        if our_name.startswith(module):
            inverse = {ours: name for name, ours in table.items()}
            theirs = _lookup(inverse, our_name.removeprefix(module))
            if theirs is not None:
                return (layout.root + getattr(layout, part) + theirs,)
    return (layout.root + our_name,)  # a projection


def spelling_of(names: Iterable[str]) -> Layout:
    """The layout of a model some of whose names are given, by part; a part that none of them is of
    is spelled as in the first layout that has the others."""
    names = list(names)
    root = LEROBOT.root if any(name.startswith(LEROBOT.root) for name in names) else ""
    bare = [name.removeprefix(root) for name in names]
    prefixes = {part: _find_prefix(part, bare) for part in PARTS}
    found = {part: prefix for part, prefix in prefixes.items() if prefix is not None}
    likely = (
        layout
        for layout in LAYOUTS.values()
        if all(getattr(layout, part) == prefix for part, prefix in found.items())
    )
    layout = replace(next(likely, OPENPI), root=root)
    for part, prefix in found.items():
        layout = replace(layout, **{part: prefix})  # type: ignore[arg-type]
    return layout


def module_name(layout: Layout, our_name: str) -> str:
    """The name of one of our tensors in the model that a layout was saved from, which has the
    embedding in one place."""
    if our_name == EMBEDDING:
        return f"{layout.root}{layout.language}embed_tokens.weight"
    return their_names(layout, our_name)[0]


def our_name(name: str) -> str | None:
    """Our name of a tensor that is spelled as in any of the layouts; None: it is in none."""
    bare = name.removeprefix(LEROBOT.root)
    for layout in LAYOUTS.values():
        if bare == f"{layout.language}embed_tokens.weight":
            return EMBEDDING
        found = _rename(bare, {part: getattr(layout, part) for part in PARTS})
        if found is not None:
            return found
    return None


def is_unread(name: str) -> bool:
    """Whether a name is one of a head, which LeRobot's π0 has and never reads."""
    return name.removeprefix(LEROBOT.root) in UNREAD | LM_HEADS


def _find_prefix(part: str, names: Iterable[str]) -> str | None:
    """The spelling of a part's prefix that the most names have in common with its table."""
    table, _ = PARTS[part]
    spellings = sorted({getattr(layout, part) for layout in LAYOUTS.values()})
    counts = {
        prefix: sum(
            name.startswith(prefix) and _lookup(table, name.removeprefix(prefix)) is not None
            for name in names
        )
        for prefix in spellings
    }
    best = max(counts, key=lambda prefix: counts[prefix])
    return best if counts[best] else None


def _rename(name: str, prefixes: dict[str, str | None]) -> str | None:
    for part, (table, module) in PARTS.items():
        prefix = prefixes[part]
        if prefix is not None and name.startswith(prefix):
            found = _lookup(table, name.removeprefix(prefix))
            if found is not None:
                return module + found
    return _lookup(PROJECTIONS, name)


def _lookup(table: dict[str, str], name: str) -> str | None:
    for theirs, ours in table.items():
        found = _match(theirs, name)
        if found is not None:
            layer, rest = found
            return ours.replace("*", layer) + rest
    return None


def _buffer_statistic(name: str) -> str | None:
    """The statistic that a buffer holds, as "action.std"; None for the name of another tensor.

    LeRobot replaced the dots of a feature's name by underscores. Those of the features that it
    knows are put back; of a camera's name only the first two are.
    """
    found = BUFFER.fullmatch(name)
    if found is None:
        return None
    feature = re.sub(r"^observation_(images_)?", lambda m: m[0].replace("_", "."), found["feature"])
    return f"{feature}.{found['statistic']}"


def _match(template: str, name: str) -> tuple[str, str] | None:
    """Layer number and ending (.weight, .dense.bias, ...) of a name that fits a template."""
    if "*" not in template and not name.startswith(template):
        return None
    pattern = re.escape(template).replace(r"\*", r"(?P<layer>\d+)")
    found = re.fullmatch(rf"{pattern}(?P<rest>|(\.dense)?\.(weight|bias))", name)
    if found is None:
        return None
    return found.groupdict().get("layer") or "", found["rest"]


def _explain(root: str, prefixes: dict[str, str | None]) -> tuple[str, str]:
    """Name of the layout and one sentence on how it was recognised."""
    for layout in LAYOUTS.values():
        if root == layout.root and all(getattr(layout, part) == prefixes[part] for part in PARTS):
            return layout.name, (
                f"{layout.origin}: names {'begin with ' + repr(root) if root else 'have no root'}, "
                f"vision under {prefixes['vision']!r}, language under {prefixes['language']!r}"
            )
    sources = {
        part: next(n for n, layout in LAYOUTS.items() if getattr(layout, part) == prefixes[part])
        for part in PARTS
    }
    where = ", ".join(f"{part} as in {source}" for part, source in sources.items())
    return "mixed", f"spellings of several layouts: root {root!r}, {where}"
