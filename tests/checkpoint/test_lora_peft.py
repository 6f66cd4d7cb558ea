"""What peft makes for a configuration is what we expect in the file, and what we merge.

peft adapts a stand-in: modules of the kinds and names that LeRobot's π0 has, with a checkpoint's
weights. 1e-5 of the largest weight: both merge in float32, in another order of sums.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from peft_folder import configure, rewrite
from safetensors.torch import load_file
from torch import Tensor, nn

from pi0.checkpoint.layouts import LAYOUTS
from pi0.checkpoint.load import load_model, open_checkpoint
from pi0.checkpoint.synth import synthesise
from pi0.config import PRESETS
from pi0.errors import CheckpointError

peft = pytest.importorskip("peft")
P = "model.paligemma_with_expert."


class Norm(nn.Module):
    """A module that peft cannot adapt."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))


class Gain(nn.Module):
    """The same, without bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))


def make_module(weight: Tensor, bias: bool, embedding: bool) -> nn.Module:
    shape = weight.shape
    if len(shape) == 4:
        return nn.Conv2d(shape[1], shape[0], shape[2:], stride=shape[2:])
    if embedding:
        return nn.Embedding(*shape)
    if len(shape) == 2:
        return nn.Linear(shape[1], shape[0], bias=bias)
    return Norm(*shape) if bias else Gain(*shape)


def stand_in(tensors: dict[str, Tensor]) -> nn.Module:
    root = nn.Module()
    for name in [name for name in tensors if name.endswith(".weight")]:
        *path, leaf = name.removesuffix(".weight").split(".")
        parent = root
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        bias = name.removesuffix(".weight") + ".bias" in tensors
        parent.add_module(
            leaf, make_module(tensors[name], bias, "embed_tokens" in name or "position" in name)
        )
    root.load_state_dict(tensors, strict=True)
    return root


@pytest.fixture(scope="module", params=["tiny", "pi05_tiny"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "base"
    synthesise(folder, PRESETS[request.param], LAYOUTS["lerobot"], seed=0, dtype=torch.float32)
    return folder


NAMES = ["q_proj", "v_proj", "o_proj", "out_proj", "fc1", "gate_proj", "down_proj", "linear",
         "action_out_proj", "patch_embedding", "model.action_in_proj", "dense", "lm_head",
         "0.self_attn.k_proj", f"{P}gemma_expert.model.layers.1.mlp.up_proj"]  # fmt: skip
REGEXES = ["all-linear", r".*\.gemma_expert\..*\.(q|v)_proj", r".*_proj", r"model\.action_\w+",
           r".*\.layers\.[01]\.mlp\.(up|down)_proj", r".*vision_tower.*fc\d",
           r"(.*\.language_model\..*\.k_proj|model\.action_in_proj)"]  # fmt: skip
EXCLUDED = [
    None,
    ["q_proj"],
    ["0.self_attn.q_proj", "fc1"],
    r".*vision_tower.*",
    r".*\.layers\.1\..*",
]
SAVED = [None, [], ["action_out_proj"], ["norm"], ["gemma_expert.model.norm"], ["vision_tower"],
         ["layers.1.mlp"], ["lm_head", "action_in_proj"], ["d_tokens"]]  # fmt: skip
PATTERNS = [
    {},
    {"q_proj": 3},
    {r".*\.1\..*": 1, "q_proj": 5},
    {"proj": 2},
    {"^model.action_in_proj": 3},
]


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "r": draw(st.integers(1, 4)),
        "lora_alpha": draw(st.sampled_from([1, 4, 7])),
        "target_modules": draw(
            st.one_of(
                st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True),
                st.sampled_from(REGEXES),
            )
        ),
        "exclude_modules": draw(st.sampled_from(EXCLUDED)),
        "modules_to_save": draw(st.sampled_from(SAVED)),
        "rank_pattern": draw(st.sampled_from(PATTERNS)),
        "alpha_pattern": draw(st.sampled_from(PATTERNS)),
        "use_rslora": draw(st.booleans()),
        "bias": draw(st.sampled_from(["none", "all", "lora_only"])),
    }
    if isinstance(fields["target_modules"], list):
        fields["layers_to_transform"] = draw(st.sampled_from([None, 0, [1], [0, 1], []]))
        if fields["layers_to_transform"] is not None:
            fields["layers_pattern"] = draw(
                st.sampled_from([None, "layers", ["layers"], ["encoder.layers"], ["h", "layers"]])
            )
    return fields


def train(base: Path, folder: Path, fields: dict[str, Any]) -> dict[str, Tensor]:
    """Lets peft write an adapter with random values; returns its merged weights."""
    torch.manual_seed(0)
    model = stand_in(load_file(base / "model.safetensors"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**fields))
        except (ValueError, peft.utils.NoMatchingPeftModuleError) as error:
            assume("target" not in str(error).lower() and "excluded" not in str(error).lower())
            raise
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn_like(parameter)
        adapted.save_pretrained(str(folder), save_embedding_layers=False)
        merged = adapted.merge_and_unload().state_dict()
    configure(folder, base_model_name_or_path=str(base))
    return dict(merged)


# Not shrunk: an example takes half a second.
@settings(max_examples=8, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(fields=configurations(), data=st.data())
def test_as_peft(base: Path, fields: dict[str, Any], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        adapter = Path(name)
        merged = train(base, adapter, fields)
        keys = load_file(adapter / "adapter_model.safetensors")
        assume(any("lm_head" not in key for key in keys))  # heads alone change nothing
        try:
            opened = open_checkpoint(adapter)
        except CheckpointError as refusal:  # `norm` is to be saved and has `dense` inside
            assume("found both" not in str(refusal))
            raise
        ours = load_model(opened).state_dict()
        for theirs, name in open_checkpoint(base).names.ours.items():
            limit = 1e-5 * float(merged[theirs].abs().max())
            torch.testing.assert_close(ours[name], merged[theirs], atol=limit, rtol=0)
        assert opened.adapter
        if opened.adapter.pairs:
            lost = data.draw(st.sampled_from(sorted(opened.adapter.pairs)))
            pair = opened.adapter.pairs[lost]
            rewrite(adapter, lambda tensors: (tensors.pop(pair.a), tensors.pop(pair.b)))
            with pytest.raises(CheckpointError, match=f"{lost}: expected lora_A|found none"):
                open_checkpoint(adapter)
