"""The configuration of a checkpoint, from the shapes of its tensors and the config.json beside it.

Everything follows from shapes but the number of heads (known for the published widths), the horizon
and the prompt length; config.json declares those, in the words of openpi, LeRobot, transformers or
our own (docs/checkpoints.md). Where both say something they must agree.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from pi0.checkpoint.files import get_nested
from pi0.config import (
    GEMMA_2B,
    GEMMA_300M,
    MAX_STEPS,
    SO400M,
    GemmaConfig,
    Pi0Config,
    SiglipConfig,
)
from pi0.errors import CheckpointError, ConfigError
from pi0.model.flow import MAX_PERIOD, MIN_PERIOD
from pi0.number import is_count

T = TypeVar("T")
Shapes = Mapping[str, tuple[int, ...]]  # by our names

# Our field → where config.json may hold it, ours first.
CONFIG_JSON: dict[str, tuple[str, ...]] = {
    "vision.width": ("vision.width", "vlm_config.vision_config.hidden_size"),
    "vision.depth": ("vision.depth", "vlm_config.vision_config.num_hidden_layers"),
    "vision.mlp_dim": ("vision.mlp_dim", "vlm_config.vision_config.intermediate_size"),
    "vision.num_heads": ("vision.num_heads", "vlm_config.vision_config.num_attention_heads"),
    "vision.patch_size": ("vision.patch_size", "vlm_config.vision_config.patch_size"),
    "vision.image_size": ("vision.image_size", "vlm_config.vision_config.image_size"),
    "vocab_size": ("vocab_size", "vlm_config.text_config.vocab_size"),
    "state_dim": ("state_dim", "max_state_dim"),
    "action_dim": ("action_dim", "max_action_dim"),
    "horizon": ("horizon", "action_horizon", "chunk_size"),
    "max_tokens": ("max_tokens", "max_token_len", "tokenizer_max_length"),
}
for _trunk, _theirs in (("vlm", "vlm_config.text_config"), ("expert", "dit_config")):
    CONFIG_JSON |= {
        f"{_trunk}.width": (f"{_trunk}.width", f"{_theirs}.hidden_size"),
        f"{_trunk}.depth": (f"{_trunk}.depth", f"{_theirs}.num_hidden_layers"),
        f"{_trunk}.mlp_dim": (f"{_trunk}.mlp_dim", f"{_theirs}.intermediate_size"),
        f"{_trunk}.num_heads": (f"{_trunk}.num_heads", f"{_theirs}.num_attention_heads"),
        f"{_trunk}.num_kv_heads": (f"{_trunk}.num_kv_heads", f"{_theirs}.num_key_value_heads"),
        f"{_trunk}.head_dim": (f"{_trunk}.head_dim", f"{_theirs}.head_dim"),
    }
VARIANTS = {
    "gemma_2b": GEMMA_2B,
    "gemma_2b_lora": GEMMA_2B,
    "gemma_300m": GEMMA_300M,
    "gemma_300m_lora": GEMMA_300M,
    "dummy": GemmaConfig(64, 4, 128, num_heads=8, num_kv_heads=1, head_dim=16),  # of openpi's debug
}
VARIANT_KEYS = {"paligemma_variant": "vlm", "action_expert_variant": "expert"}
PUBLISHED: dict[str, SiglipConfig | GemmaConfig] = {
    "vision": SO400M,
    "vlm": GEMMA_2B,
    "expert": GEMMA_300M,
}
MODEL_TYPES = {"pi0": False, "pi05": True}  # → adaptive_norm
MAX_COUNT = 10_000_000  # more is a damaged file, and overflows later
# What LeRobot's and transformers' config.json say of flow matching.
STEPS_KEYS = ("num_inference_steps", "num_steps")  # newest first
PERIODS = {"min_period": MIN_PERIOD, "max_period": MAX_PERIOD}
DEFAULT_STEPS = 10
DEFAULT_HORIZON = 50
DEFAULT_MAX_TOKENS = {False: 48, True: 200}  # by adaptive_norm


class MissingTensorError(CheckpointError):
    """A tensor, by our name, without which a size cannot be inferred."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name}: expected this tensor, found it missing.")
        self.name = name


@dataclass(frozen=True)
class Inferred:
    """A configuration, and which of its fields nothing declares, so that they are assumed."""

    config: Pi0Config
    assumed: list[str]


def infer_config(
    shapes: Shapes,
    settings: Mapping[str, Any] | None,
    stated: Mapping[str, int | None] | None = None,
    heads: Mapping[str, int] | None = None,
) -> Inferred:
    """The configuration of a checkpoint.

    Args:
        shapes: of the tensors, by our names.
        settings: the content of config.json, if there is one.
        stated: `horizon` and `max_tokens` as the caller states them; None: not stated.
        heads: head counts that the files tell, by our fields; None: they tell none.

    Raises:
        MissingTensorError: a tensor from which a size is read is missing.
        CheckpointError: head counts are declared nowhere, or the last layers are lost.
        ConfigError: config.json contradicts the tensors, the caller or itself.
    """
    declared = _read_settings(settings or {})
    for name, value in (stated or {}).items():
        if value is not None:
            _state(declared, name, value)
    inferred = _read_shapes(shapes) | dict(heads or {})
    contradictions = [
        "{}: the tensors say {}, config.json says {}".format(
            *_in_words(name, inferred[name], declared[name])
        )
        for name in inferred
        if name in declared and declared[name] != inferred[name]
    ]
    if contradictions:
        raise ConfigError(
            "config.json: expected what the tensors say, found " + "; ".join(contradictions) +
            ". Put the config.json that belongs to this checkpoint beside it."
        )  # fmt: skip
    _refuse_lost_layers(inferred, declared)
    values = declared | inferred
    _fill_heads(values, shapes)
    adaptive = bool(values["adaptive_norm"])
    values.setdefault("state_dim", values["action_dim"])
    defaults = {"horizon": DEFAULT_HORIZON, "max_tokens": DEFAULT_MAX_TOKENS[adaptive]}
    assumed = [name for name in defaults if name not in values]
    return Inferred(_build(defaults | values), assumed)


def stated_steps(settings: Mapping[str, Any]) -> int:
    """The denoising steps that a config.json states, else 10."""
    stated = (n for key in STEPS_KEYS if isinstance(n := settings.get(key), int))
    return next(stated, DEFAULT_STEPS)


def declared_lora(settings: Mapping[str, Any]) -> str | None:
    """The field of a config.json, openpi's or ours, that says that the model has LoRA."""
    variants = (key for key in VARIANT_KEYS if str(settings.get(key)).endswith("_lora"))
    return next(variants, "lora" if settings.get("lora") else None)


def unfit_flow(settings: Mapping[str, Any]) -> list[str]:
    """A sentence for each field of a config.json that would change how actions are sampled and is
    not carried out."""
    found = [
        (key, f"expected {value}, as this model has it", settings[key])
        for key, value in PERIODS.items()
        if settings.get(key) not in (None, value)
    ]
    steps = {key: settings[key] for key in STEPS_KEYS if settings.get(key) is not None}
    found += [
        (key, "expected a count of denoising steps", value)
        for key, value in steps.items()
        if not (_is_size(value) and value <= MAX_STEPS)
    ]
    if len(set(map(repr, steps.values()))) > 1:
        found.append((" and ".join(steps), "expected one number", list(steps.values())))
    return [
        f"config.json {key}: {expected}, found {_short(value)}." for key, expected, value in found
    ]


def to_config_json(config: Pi0Config) -> dict[str, Any]:
    """The config.json that `infer_config` reads back, as `pi0 synth` writes it."""
    values = asdict(config)
    adaptive = values.pop("adaptive_norm")
    model_type = next(name for name, value in MODEL_TYPES.items() if value == adaptive)
    return {"type": model_type, **values}


def _read_shapes(shapes: Shapes) -> dict[str, Any]:
    vision_patch = _shape(shapes, "vision_tower.patch_embedding.conv.weight")
    positions = _shape(shapes, "vision_tower.patch_embedding.position")[0]
    grid = round(positions**0.5)
    if grid**2 != positions:
        raise CheckpointError(
            f"vision position embedding: expected a square number of rows, found {positions}."
        )
    adaptive = any("norm" in name and ".dense." in name for name in shapes)
    inferred: dict[str, Any] = {
        "adaptive_norm": adaptive,
        "vision.width": vision_patch[0],
        "vision.patch_size": vision_patch[-1],
        "vision.image_size": grid * vision_patch[-1],
        "vision.depth": _depth(shapes, "vision_tower"),
        "vision.mlp_dim": _shape(shapes, "vision_tower.blocks.*.fc1.weight")[0],
        "vocab_size": _shape(shapes, "token_embedding.weight")[0],
        "action_dim": _shape(shapes, "action_in_proj.weight")[1],
    }
    if not adaptive:  # the state of a π0.5 is text
        inferred["state_dim"] = _shape(shapes, "state_proj.weight")[1]
    for trunk in ("vlm", "expert"):
        gate = _shape(shapes, f"{trunk}.blocks.*.gate_proj.weight")
        inferred |= {
            f"{trunk}.width": gate[1],
            f"{trunk}.mlp_dim": gate[0],
            f"{trunk}.depth": _depth(shapes, trunk),
        }
    return inferred


def _state(declared: dict[str, Any], name: str, value: int) -> None:
    """Adds what the caller states to what config.json declares."""
    option = "--" + name.replace("_", "-")
    if not _is_size(value):
        raise ConfigError(f"{name} ({option}): expected a count, found {_short(value)}.")
    if declared.setdefault(name, value) != value:
        raise ConfigError(
            f"{name} ({option}): expected {declared[name]} as config.json says, found {value}. "
            "Leave it out."
        )


def _refuse_lost_layers(inferred: Mapping[str, Any], declared: Mapping[str, Any]) -> None:
    """A file without its last layers would pass as a shallower model. The published towers are
    recognised by their width and MLP; they have another depth only if config.json declares it."""
    for tower, published in PUBLISHED.items():
        same = all(
            inferred[f"{tower}.{name}"] == getattr(published, name) for name in ("width", "mlp_dim")
        )
        depth = inferred[f"{tower}.depth"]
        if same and depth != published.depth and f"{tower}.depth" not in declared:
            raise CheckpointError(
                f"{tower}: expected {published.depth} layers, as the published tower of this width "
                f"has, found {depth}. Copy or download the file again, or, if that is meant, put a "
                f'config.json beside it: {{"{tower}": {{"depth": {depth}}}}}.'
            )


def _fill_heads(values: dict[str, Any], shapes: Shapes) -> None:
    """Completes head counts: from config.json, else from the published widths; checks them."""
    q = _shape(shapes, "vlm.blocks.*.q_proj.weight")[0]
    kv = _shape(shapes, "vlm.blocks.*.k_proj.weight")[0]
    if values["vision.width"] == SO400M.width:
        values.setdefault("vision.num_heads", SO400M.num_heads)
    if (q, kv) == (GEMMA_2B.num_heads * GEMMA_2B.head_dim, GEMMA_2B.head_dim):
        for name in ("num_heads", "num_kv_heads", "head_dim"):
            values.setdefault(f"vlm.{name}", getattr(GEMMA_2B, name))
    for name in ("num_heads", "num_kv_heads", "head_dim"):
        if f"vlm.{name}" in values:  # the two trunks share them
            values.setdefault(f"expert.{name}", values[f"vlm.{name}"])
    needed = ("vision.num_heads", "vlm.num_heads", "vlm.num_kv_heads", "vlm.head_dim")
    missing = [name for name in needed if name not in values]
    if missing:
        raise CheckpointError(
            f"config.json: expected {', '.join(missing)}, which cannot be inferred from shapes at "
            'this size, found none. Put a config.json beside the weights, such as {"vision": '
            '{"num_heads": 4}, "vlm": {"num_heads": 8, "num_kv_heads": 1, "head_dim": 16}}.'
        )
    heads, kv_heads, head_dim = (
        values[f"vlm.{n}"] for n in ("num_heads", "num_kv_heads", "head_dim")
    )
    if (heads * head_dim, kv_heads * head_dim) != (q, kv):
        raise ConfigError(
            f"vlm heads: the tensors have {q} query and {kv} key rows, config.json says {heads} "
            f"and {kv_heads} heads of {head_dim}."
        )


def _read_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a config.json declares, by our names."""
    declared: dict[str, Any] = {}

    def declare(name: str, value: Any, source: str) -> None:
        if declared.setdefault(name, value) != value:
            field, first, second = _in_words(name, declared[name], value)
            raise ConfigError(
                f"config.json: expected one value for {field}, found {first} and {second} (under "
                f"{source}). Remove the one that is wrong."
            )

    for name, paths in CONFIG_JSON.items():
        for path in paths:
            value = get_nested(settings, path)
            if value is None:
                continue
            if not _is_size(value):
                raise ConfigError(f"config.json {path}: expected a count, found {_short(value)}.")
            declare(name, value, path)
    for key, trunk in VARIANT_KEYS.items():
        variant = settings.get(key)
        if variant is not None:
            for name, value in asdict(_one_of(VARIANTS, key, variant)).items():
                declare(f"{trunk}.{name}", value, key)
    for key, adaptive_norm in read_types(settings).items():
        declare("adaptive_norm", adaptive_norm, key)
    if isinstance(settings.get("pi05"), bool):
        declare("adaptive_norm", settings["pi05"], "pi05")
    return declared


def read_types(settings: Mapping[str, Any]) -> dict[str, bool]:
    """Whether the model that config.json declares has adaptive norms, by the field that says so.

    Raises:
        ConfigError: it declares a model that is neither π0 nor π0.5.
    """
    return {
        key: _one_of(MODEL_TYPES, key, settings[key])
        for key in ("type", "model_type")
        if settings.get(key) is not None
    }


def _in_words(name: str, *values: Any) -> list[Any]:
    """A field and values of it as config.json has them."""
    if name != "adaptive_norm":
        return [name, *values]
    models = {adaptive: model for model, adaptive in MODEL_TYPES.items()}
    return ["type", *(models[value] for value in values)]


def _one_of(known: Mapping[str, T], key: str, value: Any) -> T:
    if not isinstance(value, str) or value not in known:
        raise ConfigError(
            f"config.json {key}: expected one of {', '.join(known)}, found {_short(value)}. Other "
            "models are not read; if this is none, put the config.json that belongs to it beside "
            "the weights."
        )
    return known[value]


def _is_size(value: Any) -> bool:
    return is_count(value) and value <= MAX_COUNT


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"


def _shape(shapes: Shapes, template: str) -> tuple[int, ...]:
    """The shape of a tensor; `*` is the first layer that has it."""
    pattern = re.compile(re.escape(template).replace(r"\*", r"\d+"))
    for name, shape in shapes.items():
        if pattern.fullmatch(name):
            if len(shape) < (1 if name.endswith(("bias", "norm.weight")) else 2):
                raise CheckpointError(f"{name}: expected a matrix, found shape {list(shape)}.")
            if 0 in shape:
                raise CheckpointError(f"{name}: expected values, found shape {list(shape)}.")
            return shape
    raise MissingTensorError(template.replace("*", "0"))


def _depth(shapes: Shapes, module: str) -> int:
    pattern = re.compile(rf"{module}\.blocks\.(\d{{1,9}})\.")
    layers = [int(layer[1]) for name in shapes if (layer := pattern.match(name))]
    depth = max(layers, default=-1) + 1
    if depth > len(shapes):
        raise CheckpointError(f"{module}: expected layers one after the other, found {depth - 1}.")
    return depth


def _build(values: Mapping[str, Any]) -> Pi0Config:
    def part(module: str) -> dict[str, Any]:
        prefix = module + "."
        return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}

    plain = {name: value for name, value in values.items() if "." not in name}
    return Pi0Config(
        vision=SiglipConfig(**part("vision")),
        vlm=GemmaConfig(**part("vlm")),
        expert=GemmaConfig(**part("expert")),
        **plain,
    )
