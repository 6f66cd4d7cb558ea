"""NaN, infinity and overflow anywhere in weights or activations never become finite actions.

Loading refuses weights that are not finite; here they are damaged after it, as packed for each
engine, so that every kernel meets them.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from pi0.checkpoint.load import Checkpoint, load_model, open_checkpoint
from pi0.config import PRESETS
from pi0.engines.base import make_engine, require_finite
from pi0.engines.fast.cpu import engine as cpu
from pi0.engines.fast.cpu.int8 import Int8Kernels
from pi0.engines.fast.cpu.native import Native, NativeUnavailable
from pi0.engines.fast.cpu.native_kernels import NativeKernels
from pi0.engines.fast.cuda import fp8
from pi0.engines.fast.cuda.fp8 import Fp8Kernels
from pi0.engines.fast.kernels import Kernels, Norm
from pi0.engines.fast.matrix import Matrix
from pi0.engines.fast.network import Network
from pi0.engines.fast.plan import make_token_plan
from pi0.engines.fast.weights import PackedWeights, Scheme, pack
from pi0.errors import EngineError, Pi0Error
from pi0.inputs import random_inputs

CONFIG = PRESETS["tiny"]
INPUTS, NOISE = random_inputs(CONFIG, 2, 6, 0)
VALUES = (torch.nan, torch.inf, -torch.inf, 1e38)
# SiLU of -1e37, which is no overflow, is exactly 0.
RIGHTLY_FINITE = {("time_mlp_out.weight", 1e38)}
try:
    NATIVE: Native | None = Native()
except NativeUnavailable:
    NATIVE = None
needs_native = pytest.mark.skipif(NATIVE is None, reason="no native code on this machine")

FLOAT32, INT8 = Scheme(torch.float32, mlp_chunk=64), Scheme(torch.float32, {".*": torch.int8})
ENGINES: dict[str, tuple[Callable[[], Kernels], Scheme]] = {
    "plain float32": (Int8Kernels, FLOAT32),
    "plain int8": (Int8Kernels, INT8),
    "bfloat16": (Int8Kernels, Scheme(torch.bfloat16)),
    "cuda float32": (Fp8Kernels, FLOAT32),
    "cuda fp8": (Fp8Kernels, fp8.make_scheme(CONFIG, 2**31)[0]),
}
if NATIVE is not None:
    ENGINES["native float32"] = lambda: NativeKernels(NATIVE), FLOAT32  # type: ignore[arg-type]
    ENGINES["native int8"] = lambda: NativeKernels(NATIVE), INT8  # type: ignore[arg-type]


def actions(weights: PackedWeights, kernels: Kernels) -> Tensor:
    """Of two steps, as an engine's `sample` answers them."""
    network = Network(weights, kernels)
    config = weights.config
    plan = make_token_plan(INPUTS, config.vision.num_patches, config.suffix_len)
    with torch.inference_mode():
        cache = network.prefill(INPUTS, plan)
        times = network.step_times(2)
        return require_finite(network.denoise(NOISE, times, cache))


@pytest.fixture(scope="module")
def checkpoint(each_path: Path) -> Checkpoint:
    return open_checkpoint(each_path)


def parts(weights: PackedWeights) -> Iterator[tuple[str, Tensor]]:
    """Every tensor, but of one layer only and without the quantised values."""
    for name, tensor in weights.state().items():
        whole = tensor.dtype in (torch.float32, torch.bfloat16)
        read = name != "vlm.norm.weight"  # only a tap would show what it makes
        if read and whole and ".blocks.1." not in name.replace("vlm.blocks.1.kv", ""):
            yield name, tensor


def damage(name: str, tensor: Tensor, value: float) -> None:
    """One element, of a token that is read."""
    if name.startswith("token_embedding"):
        tensor[INPUTS.tokens[0, 0], 0] = value
    else:
        tensor.view(-1)[len(tensor.view(-1)) // 3] = value


@pytest.mark.parametrize("engine", ENGINES)
def test_one_damaged_weight_gives_no_actions(checkpoint: Checkpoint, engine: str) -> None:
    make_kernels, scheme = ENGINES[engine]
    kernels = make_kernels()
    sound = pack(checkpoint, scheme, lay_out=kernels.lay_out)
    finite = []
    for name, _ in parts(sound):
        for value in VALUES:
            weights = PackedWeights(checkpoint.config, scheme)
            weights.restore({key: tensor.clone() for key, tensor in sound.state().items()})
            damage(name, weights.state()[name], value)
            try:
                actions(weights, kernels)
            except EngineError:
                continue
            finite.append((name, value))
    assert set(finite) <= RIGHTLY_FINITE


@torch.no_grad()
def test_nor_by_the_model(checkpoint: Checkpoint) -> None:
    model = load_model(checkpoint)
    finite = []
    for name, parameter in model.named_parameters():
        last = name.startswith("vlm.blocks.1") and not re.search("norm1|k_proj|v_proj", name)
        if name == "vlm.norm.weight" or last:  # never read
            continue
        sound = parameter.clone()
        for value in VALUES:
            damage(name, parameter, value)
            if model.sample_actions(INPUTS, NOISE, 2).isfinite().all():
                finite.append((name, value))
        parameter.copy_(sound)
    assert set(finite) <= RIGHTLY_FINITE


@pytest.mark.parametrize("engine", ENGINES)
def test_norms_that_overflow_the_logits(checkpoint: Checkpoint, engine: str) -> None:
    make_kernels, scheme = ENGINES[engine]
    kernels = make_kernels()
    weights = pack(checkpoint, scheme, lay_out=kernels.lay_out)
    for name, tensor in weights.tensors.items():
        if name.endswith(("norm1.weight", "norm1.dense.weight")):
            weights.tensors[name] = tensor * 1e30
    with pytest.raises(EngineError, match="expected finite values"):
        actions(weights, kernels)


@pytest.mark.parametrize("dtype", ["float32", "int8", "bfloat16"])
@pytest.mark.parametrize("value", VALUES[:3])
@pytest.mark.parametrize(
    ("preset", "name"),
    [
        ("tiny", "input_layernorm.weight"),
        ("tiny", "fc1.bias"),
        ("tiny", "q_proj.weight"),
        ("tiny", "position_embedding.weight"),
        ("pi05_tiny", "input_layernorm.dense.weight"),
        ("pi05_tiny", "norm.dense.bias"),
        ("pi05_tiny", "time_mlp_in.bias"),
    ],
)
def test_damaged_files_give_no_actions(
    request: pytest.FixtureRequest,
    preset: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: float,
    dtype: str,
) -> None:
    monkeypatch.setattr(cpu, "require_fast_bfloat16", lambda: None)
    path = request.getfixturevalue(f"{preset}_path")
    shutil.copytree(path, tmp_path, dirs_exist_ok=True)
    tensors = load_file(path / "model.safetensors")
    damaged = next(key for key in tensors if key.endswith(name))
    tensors[damaged].view(-1)[3] = value
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(Pi0Error, match="expected finite"):
        make_engine(f"cpu:{dtype}", open_checkpoint(tmp_path)).sample(INPUTS, NOISE, 2)


@needs_native
@pytest.mark.parametrize("value", VALUES[:3])
@given(rows=st.integers(1, 8), width=st.integers(1, 70), data=st.data())
def test_native_rows_with_a_damaged_value(
    value: float, rows: int, width: int, data: st.DataObject
) -> None:
    """Its row, and no other, is NaN in everything that follows."""
    row = data.draw(st.integers(0, rows - 1))
    x = torch.randn(rows, width)
    x[row, data.draw(st.integers(0, width - 1))] = value
    damaged = torch.arange(rows) == row
    kernels = NativeKernels(NATIVE)  # type: ignore[arg-type]
    into = Matrix(torch.empty(1, 1, 1), None, torch.ones(1), torch.zeros(1, dtype=torch.int32))
    ones = torch.ones(width)
    for result in (
        kernels.operand(x, into),
        kernels.rms_norm(x, Norm(ones), into),
        kernels.rms_norm(x, Norm(ones, ones), into),
        kernels.layer_norm(x, ones, ones, into),
    ):
        assert torch.equal(result.scale.isnan(), damaged)
    kernels.native("softmax", rows, width, 1.0, None, x)
    assert torch.equal(x.isnan().all(dim=1), damaged)


@needs_native
@pytest.mark.parametrize("value", VALUES[:3])
@pytest.mark.parametrize("int8", [False, True])
def test_native_gate_with_a_damaged_value(value: float, int8: bool) -> None:
    """Its column, and no other, is not finite."""
    kernels = NativeKernels(NATIVE)  # type: ignore[arg-type]
    empty, gate = Matrix(torch.empty(32, 8)), torch.ones(32)
    if int8:
        empty = Matrix(torch.empty(32, 8, dtype=torch.int8), scale=torch.empty(32))
    matrix = kernels.lay_out(empty)
    matrix.write_rows(0, torch.ones(32, 8))
    gate[5] = value
    out = kernels.project(
        kernels.operand(torch.ones(3, 8), matrix), matrix, torch.ones(3, 32), gate
    )
    assert torch.equal(~out.isfinite(), (torch.arange(32) == 5).expand(3, -1))


@needs_native
def test_native_softmax_does_not_look_at_masked_columns() -> None:
    x, valid = torch.zeros(2, 20), torch.ones(20, dtype=torch.bool)
    x[:, 7], valid[7] = torch.nan, False
    NATIVE("softmax", 2, 20, 1.0, valid, x)  # type: ignore[misc]
    assert torch.allclose(x[:, valid], torch.tensor(1 / 19))
