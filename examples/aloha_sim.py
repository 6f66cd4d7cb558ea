"""openpi's ALOHA simulation against a policy server: `python examples/aloha_sim.py ADDRESS`.

Runs in an environment of its own (`make aloha`) with gym-aloha and openpi's
published client, without pi0: what a lab with openpi's loop has. Each chunk's first actions are
executed, then the next chunk is asked for; a film is written with --film.

    pi0 serve CKPT --robot aloha_sim                  # in one terminal
    python examples/aloha_sim.py ws://127.0.0.1:8000  # in another
"""

import argparse
import os

os.environ.setdefault("MUJOCO_GL", "egl")  # before the simulator: it draws without a screen

import gym_aloha  # noqa: F401 - registers its environments
import gymnasium
import imageio.v2 as imageio
import numpy as np
from dm_control.rl.control import PhysicsError
from openpi_client import action_chunk_broker, image_tools, websocket_client_policy

TASKS = {
    "gym_aloha/AlohaTransferCube-v0": "Transfer cube",  # as openpi says it
    "gym_aloha/AlohaInsertion-v0": "Insert the peg into the socket",
}


def observe(seen, prompt):
    """What the simulator sees, in the keys and form of openpi's ALOHA."""
    image = image_tools.convert_to_uint8(
        image_tools.resize_with_pad(seen["pixels"]["top"], 224, 224)
    )
    return {
        "state": seen["agent_pos"],
        "images": {"cam_high": np.ascontiguousarray(image.transpose(2, 0, 1))},
        "prompt": prompt,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address", help="ws://HOST:PORT")
    parser.add_argument("--env", choices=TASKS, default="gym_aloha/AlohaTransferCube-v0")
    parser.add_argument("--execute", type=int, default=10, help="actions of a chunk")
    parser.add_argument("--steps", type=int, default=400, help="of an episode, 50 a second")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--film", help="an MP4 to write")
    args = parser.parse_args()
    host, _, port = args.address.rpartition(":")
    client = websocket_client_policy.WebsocketClientPolicy(host, int(port))
    policy = action_chunk_broker.ActionChunkBroker(client, args.execute)
    env = gymnasium.make(args.env, obs_type="pixels_agent_pos", max_episode_steps=args.steps)
    seen, _ = env.reset(seed=args.seed)
    frames, best, over = [seen["pixels"]["top"]], 0.0, False
    while not over:
        action = policy.infer(observe(seen, TASKS[args.env]))["actions"]
        try:
            seen, reward, terminated, truncated, _ = env.step(action)
        except PhysicsError:  # what the actions of random weights may come to
            print("the simulation became unstable and ended: the actions are too far apart")
            break
        frames.append(seen["pixels"]["top"])
        best, over = max(best, float(reward)), terminated or truncated
    env.close()
    print(f"{len(frames) - 1} steps, best reward {best:g} of 4")
    if args.film:
        imageio.mimsave(args.film, frames, fps=50)


if __name__ == "__main__":
    main()
