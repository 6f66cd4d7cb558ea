"""The engines: the network on a card, and on the host with the card's numerics."""

from __future__ import annotations

import contextlib
import itertools
import os
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from pi0.checkpoint.load import Checkpoint, empty_model, load_model
from pi0.config import Pi0Config
from pi0.engines.base import Capabilities, Engine, EngineOptions, exclusive
from pi0.engines.tenstorrent import golden, ttnn_import
from pi0.engines.tenstorrent.backend import Backend, Handle, Upload
from pi0.engines.tenstorrent.boards import find_board
from pi0.engines.tenstorrent.constants import Constants, upload_constants
from pi0.engines.tenstorrent.device import TORCH_DTYPES, DeviceBackend
from pi0.engines.tenstorrent.host import HostBackend
from pi0.engines.tenstorrent.layout import TILE, TileLayout, View, additive, tiled
from pi0.engines.tenstorrent.network import (
    HandleTap,
    KeyValue,
    TtnnNetwork,
    no_handle_tap,
)
from pi0.engines.tenstorrent.ops import Ops
from pi0.engines.tenstorrent.precision import (
    BF16,
    HOST_PRESETS,
    PRESETS,
    Precision,
    for_arch,
)
from pi0.engines.tenstorrent.program_configs import TILE_BYTES, ceil
from pi0.engines.tenstorrent.replay import CaptureError, Replay
from pi0.engines.tenstorrent.silicon import CARD, IDEAL
from pi0.engines.tenstorrent.timestep import Timestep, put_timesteps
from pi0.engines.tenstorrent.weights import Packer
from pi0.errors import EngineError
from pi0.inputs import ModelInputs
from pi0.model import Pi0, Tap
from pi0.model.flow import schedule
from pi0.model.pi0 import no_tap

UPDATED_ROWS = 256  # that TTNN writes into a cache at once, at most; of one head where B is not 1
HOST_NOTE = "ttnn-host: a card's arithmetic and rounding computed on the host; no card was used."


@dataclass(frozen=True)
class DevicePrefix:
    """A prefix on the device: keys and values of each layer, π0's state token, and what else the
    suffix needs."""

    on: Constants
    given: dict[str, Handle]
    layers: list[KeyValue]
    state: Handle | None


class TtnnEngine(Engine):
    """π0 or π0.5 on a Tenstorrent card or simulator; `device` is the card's number.

    On a card a sampling call is captured, and replayed as long as the numbers of observations,
    views, tokens and steps stay; a smaller batch fills it up. Up to four observations are computed
    at once; those of a larger batch go up on a second command queue, each pass while the one before
    it is computed. One capture is held at a time and released before anything else is put on the
    card: replayed, it writes where its tensors were, whatever is there by then. What cannot be
    captured runs without, with a warning.

    Attributes:
        captures: whether sampling calls are captured.
    """

    name = "ttnn"
    capabilities = Capabilities(precisions=tuple(PRESETS), devices=("0",))
    unrounded = MappingProxyType(dict.fromkeys(HOST_PRESETS, "ttnn-host:exact"))

    def __init__(self, checkpoint: Checkpoint, options: EngineOptions) -> None:
        super().__init__(checkpoint, options)
        precision = HOST_PRESETS[options.precision]
        self.backend = self._open(options.device)
        if isinstance(self.backend, DeviceBackend):
            require_dram(checkpoint.config, precision, self.backend.dram()[1])
        loaded = TORCH_DTYPES[precision.loaded]
        model = load_model(checkpoint, loaded, "cpu", options.image_size, options.progress)
        self.network = build_network(model, self.backend, precision)
        self._constants: dict[tuple[int, int, int], Constants] = {}
        self._timesteps: list[Timestep] = []  # of the last number of steps
        # Of these numbers of views, tokens and steps, and of observations at once.
        self._replay: tuple[tuple[tuple[int, ...], int], Replay] | None = None
        self.captures = isinstance(self.backend, DeviceBackend) and self.backend.can_replay

    @classmethod
    def check_available(cls, config: Pi0Config, options: EngineOptions) -> None:
        """See `Engine`."""
        size = options.image_size
        require_tile_widths(config if size is None else config.with_image_size(size))
        require_short_suffix(config)
        cls._require_device(options.device)

    @classmethod
    def _require_device(cls, device: str | None) -> None:
        if not (device or "0").isdecimal():
            raise EngineError(f"device: expected the number of a card, found {device!r}.")
        ttnn_import.require_ttnn()
        if not ttnn_import.has_device():
            raise EngineError(
                f"engine ttnn: expected a Tenstorrent card ({ttnn_import.DRIVER}), a simulator "
                f"({ttnn_import.SIMULATOR}) or the kernel emulator ({ttnn_import.EMULATOR}), found "
                "none. `--engine ttnn-host` computes its numerics, `pi0 ttnn dry-run` checks that "
                "the model fits, `pi0 ttnn doctor` says what is missing."
            )
        ttnn_import.require_compiler()

    @exclusive
    def prefill(self, inputs: ModelInputs, tap: Tap = no_tap) -> DevicePrefix:
        """One observation; see `Engine`.

        Raises:
            EngineError: more than one.
        """
        if inputs.batch_size != 1:
            raise EngineError(
                f"engine ttnn: expected one observation, found {inputs.batch_size}. Only `sample` "
                "takes several."
            )
        self._release_replay()
        on = self._on(inputs)
        self.backend.stage = "inputs"
        given = self._put(on.layout.uploads(inputs, self.network.ops.precision))
        layers = self.network.prefill(on, given, self._adapt(tap, on.layout), tap is not no_tap)
        return DevicePrefix(on, given, layers, self.network.embed_state(on, given))

    @exclusive
    def velocity(self, x_t: Tensor, t: Tensor, cache: DevicePrefix, tap: Tap = no_tap) -> Tensor:
        on, layout = cache.on, cache.on.layout
        self._release_replay()
        (timestep,) = self._put_timesteps(t, tap)
        given = self._tap_mask(cache, tap)
        v = self.network.velocity(
            on,
            given,
            cache.layers,
            cache.state,
            self.backend.put(layout.actions(x_t)),
            timestep,
            self._adapt(tap, layout),
        )
        return layout.view["actions"].cut(self.backend.get(v))

    def _sample(
        self, inputs: ModelInputs, noise: Tensor, steps: int, on_step: Callable[[], None]
    ) -> Tensor:
        """See `Engine`. The whole loop runs on the device; a batch as few passes of equal size as
        there can be, the last one filled with its last observation."""
        shape = inputs.image_mask.shape[1], inputs.tokens.shape[1], steps
        size = ceil(inputs.batch_size, ceil(inputs.batch_size, most_rows(self.config)))
        if self._replay:
            captured, most = self._replay[0]
            if captured == shape and size <= most:
                size = most
            else:
                self._release_replay()
        passes = ceil(inputs.batch_size, size)
        on = self._on(inputs, size)
        times = torch.tensor(schedule(steps))
        if len(times) != len(self._timesteps):
            self._timesteps = self._put_timesteps(times)
        timesteps, layout = self._timesteps, on.layout
        rows = torch.arange(passes * size).clamp(max=inputs.batch_size - 1).view(passes, size)

        def uploads(which: Tensor) -> dict[str, Upload]:
            given = layout.uploads(inputs.rows(which), self.network.ops.precision)
            return given | {"x_t": layout.actions(noise[which])}

        done = itertools.count(1)

        def on_pass_step() -> None:
            if next(done) % passes == 0:  # steps of the whole batch are told
                on_step()

        def call(given: dict[str, Handle], on_step: Callable[[], None] = lambda: None) -> Handle:
            return self.network.sample(on, given, timesteps, on_step)

        if self.captures and self._replay is None:
            self._capture((shape, size), uploads(rows[0]), call)
        actions = []
        if self._replay is None:
            for which in rows:
                result = self.backend.get(call(self._put(uploads(which)), on_pass_step))
                actions.append(layout.chunks(result))
        else:
            for result in self._replay[1](map(uploads, rows)):
                actions.append(layout.chunks(result))
                for _ in range(steps):
                    on_pass_step()
        return torch.cat(actions)[: inputs.batch_size]

    def _integrate(
        self, inputs: ModelInputs, noise: Tensor, steps: int, on_step: Callable[[], None], *how: Any
    ) -> Tensor:
        """See `Engine`: one observation after another, as `prefill` takes them."""
        one, last = super()._integrate, len(noise) - 1
        told = [on_step if i == last else lambda: None for i in range(len(noise))]
        rows = [(inputs.row(i), noise[i : i + 1], steps, told[i]) for i in range(len(noise))]
        return torch.cat([one(*row, *how) for row in rows])

    def _capture(
        self,
        key: tuple[tuple[int, ...], int],
        uploads: dict[str, Upload],
        call: Callable[[dict[str, Handle]], Handle],
    ) -> None:
        """Captures a call for replays; warns where that cannot be done, and does not try again."""
        assert isinstance(self.backend, DeviceBackend)
        try:
            self._replay = key, Replay(self.backend, uploads, call)
        except CaptureError as error:
            self.captures = False
            warnings.warn(
                f"engine ttnn: {str(error).rstrip('.')}. Calls run uncaptured from now on, which "
                "gives the same actions, more slowly.",
                stacklevel=2,
            )

    def _close(self) -> None:
        with contextlib.suppress(EngineError):  # of a card that hangs: what failed before says so
            self._release_replay()
        del self.network, self._constants, self._timesteps
        if isinstance(self.backend, DeviceBackend):
            self._close_device()

    def _open(self, device: str | None) -> Backend:
        environment = {}
        if os.environ.get(ttnn_import.EMULATOR):  # it needs to know which board it is
            environment[ttnn_import.MOCK] = os.environ.get(ttnn_import.MOCK) or describe("n150")
        self.notes = ttnn_import.log_warnings()
        if pids := ttnn_import.holders():
            warnings.warn(
                "engine ttnn: other processes have a card open, for which TTNN may wait: "
                f"{', '.join(map(str, pids))}. End them, or set {ttnn_import.VISIBLE} to the "
                "number of a card that is free, which is card 0 then.",
                stacklevel=2,
            )
        backend = DeviceBackend(ttnn_import.load(environment), int(device or "0"))
        self._close_device = weakref.finalize(self, backend.close)
        return backend

    def _on(self, inputs: ModelInputs, batch: int = 1) -> Constants:
        key = inputs.image_mask.shape[1], inputs.tokens.shape[1], batch
        if key not in self._constants:
            network = self.network
            self._constants[key] = upload_constants(
                TileLayout(self.config, *key),
                network.weights,
                network.ops.precision,
                self.backend,
            )
        return self._constants[key]

    def _put(self, uploads: dict[str, Upload]) -> dict[str, Handle]:
        return {name: self.backend.put(upload) for name, upload in uploads.items()}

    def _put_timesteps(self, t: Tensor, tap: Tap = no_tap) -> list[Timestep]:
        self.backend.stage = "suffix"
        time, precision = self.network.weights.time, self.network.ops.precision
        return put_timesteps(time, t, precision, self.backend.put, tap)

    def _release_replay(self) -> None:
        if self._replay:
            (_, replay), self._replay = self._replay, None
            replay.release()

    def _adapt(self, tap: Tap, layout: TileLayout) -> HandleTap:
        if tap is no_tap:
            return no_handle_tap
        backend = self.backend

        def adapted(name: str, handle: Handle, kind: str) -> Handle:
            view = layout.view[kind]
            seen = view.cut(backend.get(handle))
            returned = tap(name, seen)
            if returned is seen:
                return handle
            padded = view.fill(returned, tuple(handle.shape))
            return backend.put(Upload(padded, backend.dtype(handle)))

        return adapted

    def _tap_mask(self, cache: DevicePrefix, tap: Tap) -> dict[str, Handle]:
        """Shows the mask as the device has it: of the VLM's queries, then of the expert's."""
        if tap is no_tap:
            return cache.given
        prefix, suffix = (cache.on.layout.view[name] for name in ("prefix", "suffix"))
        columns = torch.cat([cache.on.layout.suffix + prefix.rows, suffix.rows])
        upper = View(prefix.rows, prefix.shape, prefix.rows)
        lower = View(suffix.rows, suffix.shape, columns)
        masks = [self.backend.get(cache.given[f"{name}_mask"]) for name in ("prefix", "suffix")]
        top, bottom = upper.cut(masks[0]) == 0, lower.cut(masks[1]) == 0
        seen = torch.cat([torch.nn.functional.pad(top, (0, len(suffix.rows))), bottom], dim=1)
        returned = tap("sequence", seen)
        if torch.equal(returned, seen):
            return cache.given
        visible = lower.fill(returned[:, len(prefix.rows) :], masks[1].shape)[0] > 0
        return cache.given | {"suffix_mask": self.backend.put(Upload(additive(visible), BF16))}


class TtnnHostEngine(TtnnEngine):
    """The same network in golden functions on the host, rounded as on a card: no speed, only
    numbers. In precision `exact` nothing is rounded, which shows the network itself."""

    name = "ttnn-host"
    capabilities = Capabilities(precisions=tuple(HOST_PRESETS))
    notes = (HOST_NOTE, golden.NOTE)

    @classmethod
    def _require_device(cls, device: str | None) -> None:
        if device not in (None, "cpu"):
            raise EngineError(f"device: expected cpu for engine ttnn-host, found {device!r}.")
        ttnn_import.require_ttnn()

    def _open(self, device: str | None) -> Backend:
        environment = {}
        if not ttnn_import.has_device():  # its conversions ask for a chip, without touching it
            environment[ttnn_import.MOCK] = describe("n150")
        silicon = IDEAL if self.options.precision == "exact" else CARD
        return HostBackend(ttnn_import.load(environment), silicon)


def describe(board: str) -> str:
    """The path of a board's description, which is written."""
    return str(find_board(board).write(ttnn_import.cache_folder()))


def build_network(model: Pi0, backend: Backend, precision: Precision) -> TtnnNetwork:
    """Packs a model, which is empty afterwards, onto a backend."""
    precision = for_arch(precision, backend.arch.name)
    backend.stage = "weights"
    with torch.no_grad():
        weights = Packer(precision, backend.put).pack(model)
    return TtnnNetwork(model.config, weights, Ops(backend, precision))


def most_rows(config: Pi0Config) -> int:
    """Observations that can be computed at once."""
    return UPDATED_ROWS // tiled(config.suffix_len) if config.expert.num_kv_heads == 1 else 1


def require_tile_widths(config: Pi0Config) -> None:
    """Raises EngineError if a width that operations cut or join is no whole number of tiles."""
    for name, trunk in (("VLM", config.vlm), ("expert", config.expert)):
        if trunk.width % TILE:
            raise EngineError(
                f"engine ttnn: expected a width of the {name} that is a multiple of {TILE}, found "
                f"{trunk.width}."
            )


def require_short_suffix(config: Pi0Config) -> None:
    """Raises EngineError if state and actions are more than TTNN writes into a cache at once."""
    if config.suffix_len > UPDATED_ROWS:
        raise EngineError(
            f"horizon: expected at most {UPDATED_ROWS - config.state_tokens} actions for engine "
            f"ttnn, found {config.horizon}."
        )


def require_dram(config: Pi0Config, precision: Precision, dram: int) -> None:
    """Raises EngineError if the weights do not fit into `dram` bytes."""
    needed = packed_bytes(config, precision)
    if needed > dram:
        raise EngineError(
            f"weights: expected at most the {dram / 1e9:.1f} GB of DRAM of the board, found "
            f"{needed / 1e9:.1f} GB. Use --dtype fast, or a board with more."
        )


def packed_bytes(config: Pi0Config, precision: Precision) -> int:
    """Bytes of DRAM that the weights take."""
    sizes = []

    def put(upload: Upload) -> None:
        *outer, rows, columns = upload.value.shape
        if upload.tiled:
            rows, columns = tiled(rows), tiled(columns)
        elements = torch.Size([*outer, rows, columns]).numel()
        sizes.append(elements * TILE_BYTES[upload.dtype] // TILE**2)

    with torch.no_grad():
        Packer(precision, put).pack(empty_model(config, torch.bfloat16))
    return sum(sizes)
