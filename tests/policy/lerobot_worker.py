"""Runs LeRobot's own processors of some folders; started in LeRobot's environment.

    python lerobot_worker.py TOKENIZER FOLDER…

Reads FOLDER/inputs.npz and writes FOLDER/lerobot.npz: what the preprocessor makes of the inputs,
and the postprocessor of "model_actions".
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from lerobot.policies.factory import make_pre_post_processors
from transformers import PreTrainedTokenizerFast


def run(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    preprocess, postprocess = make_pre_post_processors(
        None,
        pretrained_path=str(folder),
        preprocessor_overrides={"tokenizer_processor": {"tokenizer": tokenizer}},
    )
    inputs = np.load(folder / "inputs.npz")
    batch = {name: torch.from_numpy(value) for name, value in inputs.items()}
    model_actions = batch.pop("model_actions")
    result = preprocess({**batch, "task": "pick up the cube"})
    result = {name: value for name, value in result.items() if isinstance(value, torch.Tensor)}
    np.savez(
        folder / "lerobot.npz",
        decoded=postprocess(model_actions).numpy(),
        **{name: value.numpy() for name, value in result.items()},
    )


if __name__ == "__main__":
    words = PreTrainedTokenizerFast(tokenizer_file=sys.argv[1], pad_token="<pad>")
    for name in sys.argv[2:]:
        run(Path(name), words)
