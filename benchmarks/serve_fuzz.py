"""Broken observations by the thousand: `python benchmarks/serve_fuzz.py CKPT --robot libero`.

Starts `pi0 serve`, sends frames that are noise, damaged msgpack, lying arrays, or observations with
values of wrong kinds, and checks that each is answered, that a robot beside them gets its actions
all the while, and that memory stays where it was. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
from serve_load import add_server_options, resident_mb, sample, served
from websockets.exceptions import ConnectionClosed

from pi0.serve.load import connected
from pi0.serve.wire import pack

ROUNDS = 10  # over which memory is watched
ODD_VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        -1,
        2**64 - 1,
        float("nan"),
        float("inf"),
        "",
        "\0",
        "x" * 5000,
        b"",
        b"\xff" * 9,
    ),
    *([], {}, [[]], [None], [1, "a"], {"a": {"b": {"c": {"d": 1}}}}),
    *(np.zeros(0), np.zeros((0, 3)), np.full(9, np.nan), np.zeros((2, 2, 2, 2, 2)), np.float32(1)),
    *(np.full((4, 4, 3), 300, np.int64), np.full((4, 4, 3), 9.0, np.float32), np.array("text")),
)
LIES: tuple[dict[bytes, Any], ...] = (
    {b"shape": [2**31, 2**31]},
    {b"shape": [-1]},
    {b"shape": "12"},
    {b"dtype": "|O"},
    {b"dtype": "<c16"},
    {b"dtype": "f4,f4"},
    {b"dtype": 4},
    {b"data": None},
    {b"data": "text"},
    {b"data": b"123"},
)


@dataclass
class Count:
    """What became of frames."""

    frames: int = 0
    actions: int = 0
    errors: int = 0
    closed: int = 0  # connections


def malformed(seed: int, count: int, observation: Mapping[str, Any]) -> Iterator[bytes | str]:
    """Frames, almost all of which are no observation; the same for the same seed."""
    chance = random.Random(seed)
    for i in range(count):
        yield KINDS[i % len(KINDS)](chance, observation)


def _noise(chance: random.Random, _: Mapping[str, Any]) -> bytes | str:
    size = chance.choice((0, 1, 3, 30, 3000))
    return "text " * size if chance.random() < 0.2 else chance.randbytes(size)


def _damaged(chance: random.Random, observation: Mapping[str, Any]) -> bytes:
    """Bytes changed, mostly near the beginning, where the structure is."""
    frame = bytearray(pack(observation))
    for _ in range(chance.randint(1, 20)):
        reach = chance.choice((20, 100, len(frame)))
        frame[chance.randrange(min(reach, len(frame)))] = chance.randrange(256)
    return bytes(frame)


def _cut(chance: random.Random, observation: Mapping[str, Any]) -> bytes:
    frame = pack(observation)
    if chance.random() < 0.5:
        return frame[: chance.randrange(len(frame))]
    return frame + chance.randbytes(chance.randint(1, 9))


def _nested(chance: random.Random, _: Mapping[str, Any]) -> bytes:
    """Lists in lists, or headers that promise more than there is."""
    depth = chance.choice((9, 100, 600, 20_000))
    opening = chance.choice((b"\x91", b"\x81\xa1a", b"\xdc\xff\xff", b"\xdd\xff\xff\xff\xff"))
    return opening * depth + b"\xc0"


def _lying(chance: random.Random, observation: Mapping[str, Any]) -> bytes:
    """One of the arrays says something untrue of itself."""
    unpacked = msgpack.unpackb(pack(observation))
    arrays = list(_arrays(unpacked))
    chance.choice(arrays).update(chance.choice(LIES))
    packed: bytes = msgpack.packb(unpacked)
    return packed


def _arrays(value: Any) -> Iterator[dict[Any, Any]]:
    if isinstance(value, dict):
        if b"__ndarray__" in value:
            yield value
        for inner in value.values():
            yield from _arrays(inner)


def _odd(chance: random.Random, observation: Mapping[str, Any]) -> bytes:
    """A value of another kind, a key too few or too many."""
    changed = dict(observation)
    key = chance.choice(list(changed))
    what = chance.random()
    if what < 0.2:
        del changed[key]
    elif what < 0.4:
        changed[chance.choice(("nonsense", "images/none", "", "state\n"))] = 1
    else:
        changed[key] = chance.choice(ODD_VALUES)
    return pack(changed)


KINDS = (_noise, _damaged, _cut, _nested, _lying, _odd)


def fuzz(address: str, frames: Iterable[bytes | str]) -> Count:
    """Sends frames one by one and reads an answer to each; a closed connection is opened anew."""
    count = Count()
    remaining = iter(frames)
    frame = next(remaining, None)
    while frame is not None:
        with connected(address) as client:
            try:
                while frame is not None:
                    client.send(frame)
                    answer = client.recv(timeout=60)
                    count.frames += 1
                    count.errors += isinstance(answer, str)
                    count.actions += isinstance(answer, bytes)
                    frame = next(remaining, None)
            except ConnectionClosed:
                count.frames += 1
                count.closed += 1
                frame = next(remaining, None)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_server_options(parser)
    parser.add_argument("--frames", type=int, default=10_000)
    args = parser.parse_args()
    print("| frames | errors | actions | closed | seconds | MB of memory | ms of a robot beside |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    with served(args) as (address, process):
        robot = sample(args.robot)
        for i in range(ROUNDS):
            start = time.perf_counter()
            count = fuzz(address, malformed(i, args.frames // ROUNDS, robot))
            seconds = time.perf_counter() - start
            with connected(address) as client:
                asked = time.perf_counter()
                client.send(pack(robot))
                if isinstance(client.recv(timeout=60), str):
                    raise SystemExit("the robot beside got no actions")
                beside = (time.perf_counter() - asked) * 1e3
            print(
                f"| {count.frames} | {count.errors} | {count.actions} | {count.closed} | "
                f"{seconds:.1f} | {resident_mb(process):.1f} | {beside:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
