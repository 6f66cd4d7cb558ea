"""When the engine captures and releases sampling calls, on a card that is not there."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_card import Buffer, FakeCard
from torch import Tensor

from pi0.checkpoint.load import open_checkpoint
from pi0.config import Pi0Config
from pi0.engines.base import EngineOptions
from pi0.engines.tenstorrent.engine import TtnnEngine, TtnnHostEngine
from pi0.engines.tenstorrent.host import HostTensor
from pi0.errors import EngineError
from pi0.inputs import ModelInputs, random_inputs

pytestmark = pytest.mark.ttnn


def as_host(value: Any) -> Any:
    if isinstance(value, Buffer):
        return HostTensor(value.value, value.dtype)
    return [as_host(each) for each in value] if isinstance(value, list) else value


class Engine(TtnnEngine):
    """The engine, on the host's arithmetic behind a card's face."""

    room, ahead = True, 1

    @classmethod
    def _require_device(cls, device: str | None) -> None:
        pass

    def _open(self, device: str | None) -> FakeCard:
        host = TtnnHostEngine._open(self, None)

        def compute(name: str, *args: Any, **options: Any) -> Any:
            given = {key: as_host(value) for key, value in options.items()}
            result = host.run(name, *(as_host(arg) for arg in args), **given)
            if isinstance(result, tuple):
                return [(each.value, each.dtype) for each in result]
            return result.value, result.dtype

        card = FakeCard(compute, host.ttnn, host.arch, self.ahead, self.room)
        self._close_device = card.close
        return card


class Cramped(Engine):
    room = False


def test_nothing_is_put_beside_a_capture(either_path: Path) -> None:
    engine = Engine(open_checkpoint(either_path), EngineOptions("accurate"))
    library = engine.backend.ttnn
    two, noise = random_inputs(engine.config, 2, 10, 0)
    one, _ = random_inputs(engine.config, 1, 10, 0)
    for inputs, steps, captured in (
        (two, 1, 1),
        (two, 1, 1),  # the same sizes: replayed
        (one, 1, 2),
        (one, 2, 3),
        (two, 1, 4),
    ):
        engine.sample(inputs, noise, steps)
        assert (library.captured, len(library.live)) == (captured, 1)
    prefix = engine.prefill(two)
    assert not library.live
    engine.sample(two, noise, 1)
    assert library.captured == 5
    engine.velocity(noise, torch.ones(1), prefix)
    assert not library.live
    engine.sample(two, noise, 1)
    engine.close()
    assert not library.live


def batch(config: Pi0Config, size: int) -> tuple[ModelInputs, Tensor]:
    rows = [random_inputs(config, 2, 10, seed) for seed in range(size)]
    return ModelInputs.joined([row for row, _ in rows]), torch.cat([noise for _, noise in rows])


def test_rows_of_a_batch_are_their_own(either_path: Path) -> None:
    """Passes replayed one after another with the next inputs going up are what they are
    uncaptured, and each row what it is alone but for the order of sums."""
    engine = Engine(open_checkpoint(either_path), EngineOptions("fast"))
    inputs, noise = batch(engine.config, 5)
    together = engine.sample(inputs, noise, 1)
    assert torch.equal(engine.sample(inputs, noise, 1), together)
    assert engine.backend.ttnn.captured == 1
    other = Cramped(open_checkpoint(either_path), EngineOptions("fast"))
    with pytest.warns(UserWarning, match="trace region"):
        uncaptured = other.sample(inputs, noise, 1)
    assert torch.equal(uncaptured, together)
    for i, row in enumerate(together):
        alone = other.sample(inputs.row(i), noise[i : i + 1], 1)[0]
        assert (alone - row).norm() <= 0.02 * (row - noise[i]).norm()
    for size in (3, 1, 2, 5, 6):  # in as many passes of the same size, filled up
        fewer = inputs.rows(torch.arange(size) % 5), noise[torch.arange(size) % 5]
        found = engine.sample(*fewer, 1)
        assert torch.equal(found, together[torch.arange(size) % 5])
    assert engine.backend.ttnn.captured == 1
    assert engine.sample(inputs.rows(slice(4)), noise[:4], 1).shape == noise[:4].shape
    assert engine.backend.ttnn.captured == 2, "four fit at once"
    assert engine.sample(inputs, noise, 1).shape == noise.shape
    assert engine.backend.ttnn.captured == 2


def test_a_batch_by_another_sampler(either_path: Path) -> None:
    """It goes through `prefill`, which takes one observation."""
    engine = Engine(open_checkpoint(either_path), EngineOptions("fast"))
    inputs, noise = batch(engine.config, 2)
    steps: list[int] = []
    together = engine.sample(inputs, noise, 1, lambda: steps.append(1), None, "midpoint")
    assert len(steps) == 1
    for i, row in enumerate(together):
        alone = engine.sample(inputs.row(i), noise[i : i + 1], 1, sampler="midpoint")
        assert torch.equal(alone[0], row)


def test_batches_are_served() -> None:
    """What `pi0 serve --batch` and a policy ask."""
    for engine in (TtnnEngine, TtnnHostEngine):
        engine.check_batch(8)


def test_what_failed_is_said_though_closing_fails_too(either_path: Path) -> None:
    engine = Engine(open_checkpoint(either_path), EngineOptions("accurate"))
    inputs, noise = random_inputs(engine.config, 2, 10, 0)
    engine.sample(inputs, noise, 1)
    library = engine.backend.ttnn
    timeout = RuntimeError("TT_THROW @ system.cpp:7\ninfo:\ndevice timeout\nbacktrace:\n 0x1")
    for name in ("execute_trace", "release_trace"):
        setattr(library, name, lambda *_, **__: raised(timeout))
    engine._close_device = lambda: None
    with pytest.raises(EngineError, match="^replay: .*device timeout$"), engine:
        engine.sample(inputs, noise, 1)


def raised(error: Exception) -> None:
    raise error


def test_a_device_without_events_is_a_warning(
    either_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(open_checkpoint(either_path), EngineOptions("fast"))
    inputs, noise = random_inputs(engine.config, 2, 10, 0)

    def fail(*_: object) -> None:
        raise RuntimeError("TT_THROW @ system.cpp:7\ninfo:\nno events\nbacktrace:\n 0x1")

    monkeypatch.setattr(engine.backend.ttnn, "record_event", fail)
    with pytest.warns(UserWarning, match="found: no events. Calls run uncaptured"):
        assert engine.sample(inputs, noise, 1).shape == noise.shape


def test_no_room_for_a_capture_is_a_warning_once(either_path: Path) -> None:
    engine = Cramped(open_checkpoint(either_path), EngineOptions("accurate"))
    inputs, noise = random_inputs(engine.config, 2, 10, 0)
    with pytest.warns(UserWarning, match="for trace region. Calls run uncaptured"):
        first = engine.sample(inputs, noise, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(engine.sample(inputs, noise, 1), first)
    assert engine.backend.ttnn.captured == 1
