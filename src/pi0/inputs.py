"""ModelInputs: the border between robots and the model, checked once.

Before it there are camera names, strings and joint units; after it only tensors. Inside the border
code trusts shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.masked import is_masked_tensor

from pi0.config import Pi0Config
from pi0.errors import ObservationError

MAX_PIXEL = 1.001  # pixels are in [-1, 1], give or take rounding
# Of noise and states, in standard deviations; beyond it float32 overflows inside the model.
OVERFLOW_SIGMA = 1e12


@dataclass(frozen=True)
class ModelInputs:
    """One batch of observations, as the model reads it.

    Attributes:
        images: [B, V, 3, S, S] float32 in [-1, 1], one square image a view.
        image_mask: [B, V] bool, False for an absent view.
        tokens: [B, L] int64, the tokenised prompt.
        token_mask: [B, L] bool, False for padding.
        state: [B, state_dim] float32, normalised and zero-padded; π0.5 reads it from the prompt
            instead.
    """

    images: Tensor
    image_mask: Tensor
    tokens: Tensor
    token_mask: Tensor
    state: Tensor

    @classmethod
    def validated(
        cls, config: Pi0Config, *, max_pixel: float = MAX_PIXEL, **arrays: NDArray[Any] | Tensor
    ) -> ModelInputs:
        """Inputs from arrays or tensors, checked against a model's configuration.

        Args:
            max_pixel: the largest magnitude of a pixel.

        Raises:
            ObservationError: a shape, dtype or value that the model cannot read.
        """
        t = {name: to_tensor(name, value) for name, value in arrays.items()}
        size = config.vision.image_size
        batch, views, length = _leading(t)
        _expect("images", t["images"], (batch, views, 3, size, size), torch.float32)
        _expect("image_mask", t["image_mask"], (batch, views), torch.bool)
        _expect("tokens", t["tokens"], (batch, length), torch.int64)
        _expect("token_mask", t["token_mask"], (batch, length), torch.bool)
        _expect("state", t["state"], (batch, config.state_dim), torch.float32)
        expect_finite("images", t["images"])
        expect_moderate("state", t["state"])
        low, high = t["images"].aminmax()
        if low < -max_pixel or high > max_pixel:
            raise ObservationError(
                f"images: expected pixels in [-1, 1], found {low:.4g} to {high:.4g}. "
                "Scale uint8 pixels by x / 255 * 2 - 1."
            )
        if ((t["tokens"] < 0) | (t["tokens"] >= config.vocab_size)).any():
            raise ObservationError(
                f"tokens: expected ids from 0 to {config.vocab_size - 1}, found "
                f"{int(t['tokens'].min())} to {int(t['tokens'].max())}. Use the tokenizer that "
                "belongs to the checkpoint."
            )
        if not (t["image_mask"].any(1) | t["token_mask"].any(1)).all():
            raise ObservationError(
                "image_mask and token_mask: expected at least one valid image or token in every "
                "row of the batch, found a row with none."
            )
        return cls(**t)

    @property
    def batch_size(self) -> int:
        return self.state.shape[0]

    def row(self, i: int) -> ModelInputs:
        """One observation of the batch."""
        return self.rows(slice(i, i + 1))

    def rows(self, which: slice | Tensor) -> ModelInputs:
        """Some observations of the batch, by their numbers."""
        return ModelInputs(**{name: value[which] for name, value in vars(self).items()})

    @classmethod
    def joined(cls, rows: Sequence[ModelInputs]) -> ModelInputs:
        """Observations of equal shapes as one batch, in their order; `row` is the inverse."""
        names = vars(rows[0])
        return cls(**{name: torch.cat([getattr(row, name) for row in rows]) for name in names})

    @property
    def shape(self) -> tuple[torch.Size, ...]:
        """Of each tensor; observations with equal ones can be joined."""
        return tuple(value.shape for value in vars(self).values())

    def same_prefix(self, other: ModelInputs) -> bool:
        """Whether all but the state is equal."""
        mine, theirs = vars(self), vars(other)
        return all(torch.equal(mine[name], theirs[name]) for name in mine if name != "state")

    def to(self, device: torch.device) -> ModelInputs:
        return ModelInputs(**{name: value.to(device) for name, value in vars(self).items()})


def random_inputs(
    config: Pi0Config, cameras: int, tokens: int, seed: int
) -> tuple[ModelInputs, Tensor]:
    """One observation of noise, everything valid, and the noise [1, horizon, action_dim] to start
    from."""
    generator = torch.Generator().manual_seed(seed)
    size = config.vision.image_size
    inputs = ModelInputs.validated(
        config,
        images=torch.rand(1, cameras, 3, size, size, generator=generator) * 2 - 1,
        image_mask=torch.ones(1, cameras, dtype=torch.bool),
        tokens=torch.randint(config.vocab_size, (1, tokens), generator=generator),
        token_mask=torch.ones(1, tokens, dtype=torch.bool),
        state=torch.randn(1, config.state_dim, generator=generator),
    )
    return inputs, torch.randn(1, config.horizon, config.action_dim, generator=generator)


NPZ_NAMES = {
    "images": "images",
    "img_masks": "image_mask",
    "tokens": "tokens",
    "token_masks": "token_mask",
    "state": "state",
}


def from_npz(config: Pi0Config, arrays: Mapping[str, NDArray[Any]]) -> tuple[ModelInputs, Tensor]:
    """Inputs and noise [B, horizon, action_dim] from the arrays of an exchange file.

    The names are those that π0 oracles use: images, img_masks, tokens, token_masks, state, noise.
    A state is not read for π0.5, whose state is in the prompt.

    Raises:
        ObservationError: an array is missing or is not what the model reads.
    """
    needed = [name for name in NPZ_NAMES if name != "state" or config.state_tokens]
    missing = [name for name in (*needed, "noise") if name not in arrays]
    if missing:
        raise ObservationError(
            f"inputs: expected the arrays {', '.join(needed)} and noise, found no "
            f"{', '.join(missing)}."
        )
    given: dict[str, Any] = {NPZ_NAMES[theirs]: arrays[theirs] for theirs in needed}
    if not config.state_tokens:
        given["state"] = torch.zeros(len(arrays["tokens"]), config.state_dim)
    inputs = ModelInputs.validated(config, **given)
    noise = to_tensor("noise", arrays["noise"])
    return inputs, check_noise(config, inputs.batch_size, noise)


def to_npz(inputs: ModelInputs, noise: Tensor) -> dict[str, NDArray[Any]]:
    """The arrays of an exchange file, as `from_npz` reads them."""
    arrays = {theirs: getattr(inputs, ours).numpy() for theirs, ours in NPZ_NAMES.items()}
    return {**arrays, "noise": noise.numpy()}


def check_noise(config: Pi0Config, batch: int | None, noise: Tensor) -> Tensor:
    """The noise itself, if it is float32 [batch, horizon, action_dim], or without `batch`
    [horizon, action_dim], of at most OVERFLOW_SIGMA.

    Raises:
        ObservationError: it is not.
    """
    rows = () if batch is None else (batch,)
    _expect("noise", noise, (*rows, config.horizon, config.action_dim), torch.float32)
    expect_moderate("noise", noise)
    return noise


def to_tensor(name: str, value: NDArray[Any] | Tensor) -> Tensor:
    """Raises ObservationError if the value is no array of numbers."""
    try:
        if isinstance(value, np.ma.MaskedArray):
            raise TypeError("a MaskedArray")
        if isinstance(value, np.ndarray):  # copied if PyTorch cannot take it as it is
            value = np.require(value, value.dtype.newbyteorder("="), ["C", "W"])
        if isinstance(value, (bytes, bytearray)):
            raise TypeError(f"a {type(value).__name__}")
        tensor = torch.as_tensor(value)
        found = without_values(tensor)
        if found:
            raise TypeError(found)
        return tensor.resolve_conj().resolve_neg()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ObservationError(f"{name}: expected an array of numbers, found {error}.") from error


def without_values(tensor: Tensor) -> str | None:
    """What a tensor is whose values are not simply there; None: they are."""
    kinds = {
        "a nested tensor": tensor.is_nested,
        "a tensor on the meta device": tensor.is_meta,
        "a masked tensor": is_masked_tensor(tensor),
        f"a tensor of {tensor.dtype}": tensor.is_quantized,
        f"a tensor of {tensor.layout}": tensor.layout is not torch.strided,
    }
    return next((kind for kind, is_one in kinds.items() if is_one), None)


def to_float64(name: str, value: NDArray[Any] | Tensor) -> NDArray[np.float64]:
    """Raises ObservationError if the value is no array of real numbers."""
    tensor = to_tensor(name, value)
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise ObservationError(f"{name}: expected real numbers, found {_short(tensor.dtype)}.")
    numbers: NDArray[np.float64] = tensor.detach().to("cpu", torch.float64).numpy()
    return numbers


def expect_finite(name: str, value: Tensor) -> None:
    """Raises ObservationError if the tensor holds a NaN or an infinity, naming the first place."""
    # NaN and infinity are among the extremes, which take a tenth of the time to find.
    if value.numel() and not torch.stack(value.aminmax()).isfinite().all():
        bad = ~torch.isfinite(value)
        raise ObservationError(
            f"{name}: expected finite values, found {int(bad.sum())} NaN or infinite, the first at "
            f"index {bad.nonzero()[0].tolist()}."
        )


def expect_moderate(name: str, value: Tensor) -> None:
    """Raises ObservationError if the tensor holds what overflows in the model."""
    expect_finite(name, value)
    if (value.abs() > OVERFLOW_SIGMA).any():
        raise ObservationError(
            f"{name}: expected values up to {OVERFLOW_SIGMA:g}, with which the model can compute, "
            f"found {value.abs().max():.6g}."
        )


def _leading(t: dict[str, Tensor]) -> tuple[int, int, int]:
    for name, ndim in (("images", 5), ("tokens", 2)):
        if t[name].ndim != ndim:
            raise ObservationError(
                f"{name}: expected {ndim} dimensions, found shape {list(t[name].shape)}."
            )
    batch, views = t["images"].shape[:2]
    if not batch or not views:
        raise ObservationError(
            f"images: expected at least one view and row, found shape {list(t['images'].shape)}."
        )
    if not t["tokens"].shape[1]:
        raise ObservationError(
            f"tokens: expected at least one, found shape {list(t['tokens'].shape)}. Mask one for a "
            "call without a prompt."
        )
    return batch, views, t["tokens"].shape[1]


def _expect(name: str, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(value.shape) != shape or value.dtype != dtype:
        raise ObservationError(
            f"{name}: expected {_short(dtype)} {list(shape)}, found {_short(value.dtype)} "
            f"{list(value.shape)}."
        )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
