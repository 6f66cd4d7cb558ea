"""Runs in openpi-client's own environment, with its client as it is published.

Reads a pickle-free job as JSON on stdin and prints results as JSON; imports nothing of pi0.
"""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any

import numpy as np
from openpi_client import action_chunk_broker, msgpack_numpy, websocket_client_policy

IMAGE = np.arange(48 * 64 * 3, dtype=np.uint32).astype(np.uint8).reshape(48, 64, 3)


def observation(robot: str) -> dict[str, Any]:
    """An observation in the keys and forms of openpi's own example of a robot."""
    prompt = "put the cube into the bowl"
    if robot == "aloha":
        cameras = ("cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist")
        images = {name: np.ascontiguousarray(IMAGE.transpose(2, 0, 1)) for name in cameras}
        return {"state": np.ones(14), "images": images, "prompt": prompt}
    if robot == "libero":
        return {
            "observation/image": IMAGE,
            "observation/wrist_image": IMAGE,
            "observation/state": np.linspace(-1, 1, 8),
            "prompt": prompt,
        }
    if robot == "droid":
        return {
            "observation/exterior_image_1_left": IMAGE,
            "observation/wrist_image_left": IMAGE,
            "observation/joint_position": np.linspace(-1, 1, 7),
            "observation/gripper_position": np.zeros(1),
            "prompt": prompt,
        }
    return {"images": {"base": IMAGE}, "state": np.zeros(14, np.float32), "prompt": prompt}


def infer(job: dict[str, Any]) -> dict[str, Any]:
    """What the client gets for one observation, and through openpi's chunk broker."""
    made = websocket_client_policy.WebsocketClientPolicy(
        job["host"], job["port"], api_key=job.get("api_key")
    )
    broker = action_chunk_broker.ActionChunkBroker(made, 50)
    answer = made.infer(observation(job["robot"]))
    steps = [broker.infer(observation(job["robot"]))["actions"] for _ in range(50)]
    try:
        made.infer({"nonsense": 1})
        error = "none"
    except RuntimeError as raised:
        error = str(raised)
    again = made.infer(observation(job["robot"]))
    shape = made.get_server_metadata()["noise_shape"]
    more = {"pi0/noise": np.ones(shape, np.float32), "pi0/reset": True}
    more |= {"pi0/previous": answer["actions"][25:], "pi0/delay": 5}
    extras = made.infer({**observation(job["robot"]), **more})
    return {
        "extras": list(extras),
        "metadata": made.get_server_metadata(),
        "keys": list(answer),
        "actions": answer["actions"].tolist(),
        "dtype": answer["actions"].dtype.str,
        "step_shapes": sorted({step.shape for step in steps}),
        "server_timing": again["server_timing"],
        "error": error,
    }


def repack(job: dict[str, Any]) -> dict[str, Any]:
    """Hashes of messages that are unpacked and packed again by openpi's code."""
    packer = msgpack_numpy.Packer()
    frames = [bytes.fromhex(frame) for frame in job["frames"]]
    again = [packer.pack(msgpack_numpy.unpackb(frame)) for frame in frames]
    return {"hashes": [hashlib.sha256(frame).hexdigest() for frame in again]}


if __name__ == "__main__":
    print(json.dumps([globals()[job["do"]](job) for job in json.load(sys.stdin)]))
