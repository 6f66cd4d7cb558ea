"""What robots notice of faults around a server: `python benchmarks/serve_faults.py CKPT`.

Four rounds, each with robots that ask all the while and count what they get:

    cut        clients that are killed in the middle of a frame, by the hundred
    restart    the server is killed (SIGKILL) and started again; robots reconnect
    shutdown   the server is told to end (SIGTERM) while robots ask
    full disk  `--record` to a file system of 4 MB (needs the right to mount one: unshare)

Prints a table in Markdown. Counts, and times nothing but how long robots were without a server.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.request import urlopen

from serve_load import add_server_options, resident_mb, sample, served
from websockets.exceptions import ConnectionClosed, WebSocketException

from pi0.serve.load import connected
from pi0.serve.wire import pack

ROBOTS = 4
PAUSE = 0.2  # seconds before a robot tries again
UNSHARE = ["unshare", "--user", "--map-root-user", "--mount"]
FULL_MB = 4
UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)


@dataclass
class Seen:
    """What robots got.

    Attributes:
        answers: chunks.
        errors: texts instead.
        lost: connections that ended, or were refused.
        codes: with which they were closed.
        longest: seconds between two chunks of one robot.
    """

    answers: int = 0
    errors: int = 0
    lost: int = 0
    codes: set[int] = field(default_factory=set)
    longest: float = 0.0


@contextlib.contextmanager
def robots(address: str, robot: str) -> Iterator[Seen]:
    """Robots that ask as fast as they get answers, and connect again when they have to."""
    seen, lock, stop = Seen(), threading.Lock(), threading.Event()

    def live(number: int) -> None:
        frame, last = pack(sample(robot, number)), time.monotonic()
        while not stop.is_set():
            try:
                with connected(address) as client:
                    while not stop.is_set():
                        client.send(frame)
                        answer = client.recv(timeout=60)
                        now = time.monotonic()
                        with lock:
                            seen.answers += isinstance(answer, bytes)
                            seen.errors += isinstance(answer, str)
                            seen.longest = max(seen.longest, now - last)
                        last = now
            except (OSError, WebSocketException) as gone:
                with lock:
                    seen.lost += 1
                    if isinstance(gone, ConnectionClosed) and gone.rcvd:
                        seen.codes.add(gone.rcvd.code)
                stop.wait(PAUSE)

    threads = [threading.Thread(target=live, args=(number,)) for number in range(ROBOTS)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def wait_for(seen: Seen, more: int) -> None:
    """Until the robots have received that many more chunks."""
    goal, end = seen.answers + more, time.monotonic() + 120
    while seen.answers < goal:
        if time.monotonic() > end:
            raise SystemExit("the robots get no answers any more")
        time.sleep(0.02)


def cut(args: argparse.Namespace) -> str:
    """Clients that vanish inside a frame."""
    frame = pack(sample(args.robot))
    head = bytes([0x82, 0xFF]) + len(frame).to_bytes(8, "big") + bytes(4)
    with served(args) as (address, process), robots(address, args.robot) as seen:
        wait_for(seen, 20)
        before = resident_mb(process)
        host, port = re.findall(r"//(.+):(\d+)", address)[0]
        for i in range(args.cuts):
            with socket.create_connection((host, int(port))) as raw:
                raw.sendall(UPGRADE)
                raw.recv(1000)
                raw.sendall((head + frame)[: 1 + (i * 997) % len(frame)])
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        wait_for(seen, 20)
        grown = resident_mb(process) - before
    return row(f"{args.cuts} clients cut", seen, f"memory grew by {grown:.1f} MB")


def restart(args: argparse.Namespace) -> str:
    """SIGKILL, and another process on the same port."""
    port = free_port()
    with contextlib.ExitStack() as stack:
        with served(args, port=port) as (address, process):
            seen = stack.enter_context(robots(address, args.robot))
            wait_for(seen, 20)
            subprocess.run(["kill", "-KILL", str(process)], check=True)
        with served(args, port=port):
            wait_for(seen, 20)
            stack.close()
    return row("server killed and started again", seen, "every robot came back")


def shutdown(args: argparse.Namespace) -> str:
    """SIGTERM while robots ask."""
    with served(args) as (address, process), robots(address, args.robot) as seen:
        wait_for(seen, 20)
        subprocess.run(["kill", "-TERM", str(process)], check=True)
        end = time.monotonic() + 60
        while not seen.codes and time.monotonic() < end:
            time.sleep(0.02)
    return row("server told to end", seen, f"closed with {sorted(seen.codes)}")


def full_disk(args: argparse.Namespace) -> str:
    """Recording to a disk that fills up at once."""
    with tempfile.TemporaryDirectory() as folder:
        mount = f'mount -t tmpfs -o size={FULL_MB}m none {folder} && exec "$@"'
        before = [*UNSHARE, "sh", "-c", mount, "sh"]
        try:
            subprocess.run([*before, "true"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return "| full disk | not run: no file system can be mounted here | | | | |"
        with served(args, "--record", f"{folder}/recorded", before=before) as (address, _):
            with robots(address, args.robot) as seen:
                wait_for(seen, 100)
            with urlopen(f"http{address[2:]}/metrics", timeout=60) as response:
                text = response.read().decode()
        found = dict(re.findall(r'pi0_recorded_total\{what="(\w+)"\} (\d+)', text))
    told = ", ".join(f"{count} {what}" for what, count in found.items())
    return row(f"--record on {FULL_MB} MB", seen, told)


def row(what: str, seen: Seen, more: str) -> str:
    return (
        f"| {what} | {seen.answers} | {seen.errors} | {seen.lost} | {seen.longest:.1f} | {more} |"
    )


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_server_options(parser)
    parser.add_argument("--cuts", type=int, default=200)
    args = parser.parse_args()
    print("| fault | chunks | errors | connections lost | longest wait, s | |")
    print("|---|---:|---:|---:|---:|---|", flush=True)
    for fault in (cut, restart, shutdown, full_disk):
        print(fault(args), flush=True)


if __name__ == "__main__":
    main()
