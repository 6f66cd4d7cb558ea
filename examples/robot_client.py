"""A robot's side of `pi0 serve` or openpi's server: `python examples/robot_client.py ADDRESS 3`.

Needs numpy, msgpack and websockets, not pi0. Asks the server at ws://HOST:PORT for three chunks,
with what a LIBERO arm might see, and connects again when the server is restarted. With --real-time
at the end (for `pi0 serve --real-time`) each chunk continues what is left of the last one.
"""

import sys
import time

import msgpack
import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect


def to_wire(x):
    return {b"__ndarray__": True, b"data": x.tobytes(), b"dtype": x.dtype.str, b"shape": x.shape}


def from_wire(x):
    return np.ndarray(x[b"shape"], x[b"dtype"], x[b"data"]) if b"__ndarray__" in x else x


def observe():
    image = np.random.randint(0, 256, (224, 224, 3), np.uint8)  # the robot's cameras and joints
    views = {"observation/image": image, "observation/wrist_image": image}
    return {**views, "observation/state": np.zeros(8), "prompt": "pick up the red cube"}


if len(sys.argv) < 3 or "://" not in sys.argv[1] or not sys.argv[2].isdecimal():
    sys.exit(__doc__)
address, chunks, real_time = sys.argv[1], int(sys.argv[2]), "--real-time" in sys.argv[3:]
EXECUTED, DELAY = 25, 5  # ticks between two observations, and from one to its answer
left = {}  # of the last chunk, from the tick of the next observation on
while chunks:
    try:
        with connect(address, compression=None, max_size=None) as server:
            server.recv()  # the greeting says what the policy is
            while chunks:
                server.send(msgpack.packb({**observe(), **left}, default=to_wire))
                answer = server.recv()  # the robot goes on meanwhile
                if isinstance(answer, str):
                    sys.exit(answer)  # one sentence: what is wrong with the observation
                actions = msgpack.unpackb(answer, object_hook=from_wire)["actions"]
                if real_time:
                    left = {"pi0/previous": actions[EXECUTED:], "pi0/delay": DELAY}
                print(f"{len(actions)} actions, the first: {actions[0].round(3)}")  # execute them
                chunks -= 1
    except (OSError, ConnectionClosed) as gone:
        print(f"no server ({gone}): again in a second", file=sys.stderr)
        left = {}  # by then it is over
        time.sleep(1)
