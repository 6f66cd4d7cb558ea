"""Captured calls: the order of both queues, on a card that runs them in the worst one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fake_card import Buffer, FakeCard, Library, NoEvents
from torch import Tensor

from pi0.engines.tenstorrent.backend import Handle, Upload
from pi0.engines.tenstorrent.replay import CaptureError, Replay
from pi0.errors import EngineError


def arithmetic(name: str, *args: Any) -> tuple[Tensor, str]:
    a, b = (arg.value if isinstance(arg, Buffer) else arg for arg in args)
    return {"add": torch.add, "multiply": torch.mul}[name](a, b), "float32"


def observation(i: int) -> dict[str, Upload]:
    return {"x": Upload(torch.full((1, 1, 2, 2), float(i)), "float32"), "y": scalar(10.0 * i)}


def scalar(value: float) -> Upload:
    return Upload(torch.tensor(value), "float32")


def make(card: FakeCard) -> Replay:
    weight = card.put(scalar(3.0))

    def call(given: dict[str, Handle]) -> Handle:
        return card.run("add", card.run("multiply", given["x"], weight), given["y"])

    return Replay(card, observation(0), call)


EXPECTED = [13.0 * i for i in (5, 1, 2, 7)]


def results(replay: Replay) -> list[float]:
    return [result[0, 0, 0, 0].item() for result in replay(observation(i) for i in (5, 1, 2, 7))]


@pytest.mark.parametrize("ahead", [0, 1])
def test_each_observation_gives_its_own_result(ahead: int) -> None:
    """Whichever queue runs ahead, also when a second batch follows the first."""
    replay = make(FakeCard(arithmetic, ahead=ahead))
    assert results(replay) == EXPECTED
    assert results(replay) == EXPECTED


@pytest.mark.parametrize("ahead", [0, 1])
def test_the_card_punishes_a_missing_event(ahead: int) -> None:
    replay = make(FakeCard(arithmetic, ahead=ahead, library=NoEvents))
    assert results(replay) != EXPECTED


def test_the_next_inputs_go_up_beside_a_replay() -> None:
    """With a second queue that runs ahead: written before the replay of the observation before."""
    card = FakeCard(arithmetic, ahead=1)
    results(make(card))
    commands = [name for name in card.ttnn.done if name != "record"]
    first, beside = ["write"] * 2 + ["move"] * 2, ["write"] * 2 + ["replay"] + ["move"] * 2
    assert commands[2:] == first + 3 * beside + ["replay"]  # two moves built the program


def test_observations_are_made_while_a_replay_runs() -> None:
    card = FakeCard(arithmetic)
    replay, made = make(card), []

    def observations() -> Iterator[dict[str, Upload]]:
        for i in range(3):
            made.append(i)
            yield observation(i)

    seen = [list(made) for _ in replay(observations())]
    assert seen == [[0, 1], [0, 1, 2], [0, 1, 2]]


def test_inputs_live_until_they_are_written() -> None:
    """Also those of an observation whose result nobody waits for any more."""
    card = FakeCard(arithmetic)
    replay = make(card)
    for i in (5, 1):
        results_of = replay(observation(each) for each in (i, 2))
        assert next(results_of)[0, 0, 0, 0].item() == 13.0 * i
        del results_of
    card.ttnn.drain(1)
    assert results(replay) == EXPECTED


def fails_at(method: str) -> type[Library]:
    """A library of a card that does not answer any more."""

    def fail(self: Library, *_: Any, **__: Any) -> None:
        raise RuntimeError("TT_THROW @ system.cpp:7\ninfo:\ndevice timeout\nbacktrace:\n --- 0x1")

    return type("Hung", (Library,), {method: fail})


@pytest.mark.parametrize(
    "method", ["wait_for_event", "copy_host_to_device_tensor", "execute_trace", "record_event"]
)
def test_a_card_that_hangs_is_one_sentence(method: str) -> None:
    card = FakeCard(arithmetic)
    replay = make(card)
    broken = fails_at(method)
    card.ttnn.__class__ = broken
    with pytest.raises(
        EngineError, match="^(inputs|replay): expected a device .*: device timeout$"
    ):
        results(replay)


@pytest.mark.parametrize("method", ["begin_trace_capture", "end_trace_capture"])
def test_a_card_that_cannot_capture(method: str) -> None:
    card = FakeCard(arithmetic, library=fails_at(method))
    with pytest.raises(CaptureError, match="^capture: expected .*found: device timeout$"):
        make(card)


def test_a_capture_that_cannot_be_released() -> None:
    card = FakeCard(arithmetic)
    replay = make(card)
    card.ttnn.__class__ = fails_at("release_trace")
    with pytest.raises(EngineError, match="^capture: expected one that can be released, found"):
        replay.release()


def test_no_room_for_commands() -> None:
    card = FakeCard(arithmetic, room=False)
    with pytest.raises(CaptureError, match="room for the commands.*only 1B is allocated"):
        make(card)
    assert not card.ttnn.live
    card.put(scalar(1.0))


def test_a_call_that_does_not_run_is_no_failed_capture() -> None:
    card = FakeCard(arithmetic)
    with pytest.raises(KeyError):
        Replay(card, observation(0), lambda given: card.run("divide", given["x"], given["y"]))
    assert card.ttnn.captured == 0


def test_what_the_card_forbids() -> None:
    card = FakeCard(arithmetic)
    make(card)
    x = Buffer(torch.zeros(1), "float32")
    for forbidden in (
        lambda: card.put(scalar(1.0)),
        lambda: card.run("add", x, x),
        lambda: card.run("copy", x, x),  # a program of another shape
    ):
        with pytest.raises(AssertionError, match="where a replay writes"):
            forbidden()
