"""A sampling call of the published model on tensors without data: devices, and kernels counted.

Nothing is computed, so this is fast. Every kernel is a node of the graph and costs its launch; what
is fused is to stay fused.
"""

from __future__ import annotations

import importlib.util
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pi0.checkpoint.load import empty_model
from pi0.config import PRESETS, Pi0Config
from pi0.dtypes import parse_dtype
from pi0.engines.fast import weights as packing
from pi0.engines.fast.cuda import engine as cuda
from pi0.engines.fast.cuda import fp8
from pi0.engines.fast.cuda.graph import Call
from pi0.engines.fast.cuda.parts import make_parts
from pi0.engines.fast.network import Network
from pi0.engines.fast.plan import make_token_plan
from pi0.engines.fast.weights import PackedWeights, Scheme
from pi0.inputs import random_inputs

if not importlib.util.find_spec("triton"):
    pytest.skip("triton is not installed", allow_module_level=True)

META = torch.device("meta")
# Views and allocations launch nothing.
FREE = {"_unsafe_view", "alias", "detach", "empty", "empty_like", "new_empty", "empty_strided"}


class Counter(TorchDispatchMode):
    """Counts the kernels of operations; Triton's and PyTorch's attention are counted by `nodes`.

    Refuses tensors of another device, which products on tensors without data would take.
    """

    def __init__(self) -> None:
        super().__init__()
        self.nodes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor) and value.ndim:
                assert value.device == META, f"{func} on {value.device}"
        if not func.is_view and func.overloadpacket.__name__ not in FREE:
            self.nodes += 1
        return func(*args, **(kwargs or {}))


def nodes(run: Any) -> int:
    import triton

    with Counter() as counter:

        def launch(*_: Any, **__: Any) -> None:
            counter.nodes += 1

        def attention(q: Tensor, *_: Any) -> Tensor:
            counter.nodes += 1
            return q.new_empty(q.shape)

        with (
            patch.object(triton.JITFunction, "run", launch),
            patch.object(F, "scaled_dot_product_attention", attention),
        ):
            run()
    return counter.nodes


def meta_weights(config: Pi0Config, scheme: Scheme) -> PackedWeights:
    """As `pack` makes them, without data."""
    weights = PackedWeights(config, scheme)
    shapes = {name: p.shape for name, p in empty_model(config, scheme.dtype).named_parameters()}
    with META:
        packing._allocate(weights, shapes)
        for name in shapes:
            if name == packing.EMBEDDING or packing.MODULATION in name:
                weights.tensors[name] = torch.empty(shapes[name], dtype=torch.bfloat16)
        packing._fold(weights)
    return weights


def count(preset: str, precision: str) -> dict[str, int]:
    """Nodes of the parts, with two cameras and a prompt of 20 tokens."""
    from pi0.engines.fast.cuda.triton_kernels import TritonKernels

    config = PRESETS[preset]
    if precision == "fp8":
        scheme, _ = fp8.make_scheme(config, cuda.UNSPLIT)
    else:
        scheme = Scheme(parse_dtype(precision), mlp_chunk=cuda.UNSPLIT)
    weights, kernels = meta_weights(config, scheme), TritonKernels()
    network = Network(weights, kernels)
    inputs, noise = random_inputs(config, 2, 20, 0)
    bucket = cuda.choose_bucket(config)
    plan = make_token_plan(inputs, config.vision.num_patches, config.suffix_len, bucket)
    call = Call(inputs, plan, noise, 10)
    with torch.inference_mode():
        import triton

        with patch.object(triton.JITFunction, "run", lambda *_, **__: None):
            parts = make_parts(network, call, META)
        return {name: nodes(run) for name, run in parts.items()}


# Of vision, prefill with vision, a step, and a call of 10 steps. PyTorch's attention counts as one,
# though in float32 it is several.
MOST = {
    ("pi0_base", "bfloat16"): (281, 453, 158, 2080),
    ("pi0_base", "fp8"): (281, 470, 158, 2097),
    ("pi0_base", "float32"): (281, 453, 176, 2242),
    ("pi05_base", "bfloat16"): (281, 471, 156, 2022),
    ("pi05_base", "fp8"): (281, 488, 156, 2039),
    ("pi05_base", "float32"): (281, 454, 210, 2545),
}


@pytest.mark.parametrize(("preset", "precision"), MOST)
def test_nodes(preset: str, precision: str) -> None:
    """And that no operation mixes devices."""
    found = tuple(count(preset, precision).values())
    assert all(map(int.__le__, found, MOST[preset, precision])), found


def test_devices_that_mix_are_seen() -> None:
    with Counter(), pytest.raises(AssertionError, match="mm.* on cpu"):
        torch.zeros(2, 3) @ torch.zeros(3, 2, device=META)
