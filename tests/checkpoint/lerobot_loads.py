"""Loads folders with LeRobot's own from_pretrained and runs its policy; started in its environment.

    python lerobot_loads.py FOLDER…

Reads FOLDER/inputs.npz (a raw observation and noise) and writes FOLDER/lerobot.npz (actions in the
robot's units) and FOLDER/lerobot.txt (all that LeRobot said while loading). The folder's sizes may
be other than the published ones, which LeRobot's module hard-codes and its config.json cannot tell.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
import warnings
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import make_pre_post_processors
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from pi0.checkpoint.load import open_checkpoint
from pi0.peers.lerobot import shrink


def run(folder: Path) -> None:
    kind = json.loads((folder / "config.json").read_text())["type"]
    modeling = import_module(f"lerobot.policies.{kind}.modeling_{kind}")
    shrink(modeling, open_checkpoint(folder).config)
    drop_sizes(folder / "config.json")
    said = io.StringIO()
    logging.basicConfig(stream=said, level=logging.WARNING, force=True)
    with contextlib.redirect_stdout(said), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Python's libraries; what LeRobot says it prints
        config = PreTrainedConfig.from_pretrained(str(folder), local_files_only=True)
        policy_class = getattr(modeling, f"{kind.upper()}Policy")
        policy = policy_class.from_pretrained(str(folder), config=config, local_files_only=True)
        words = Tokenizer.from_file(str(folder / "tokenizer.json"))
        words.post_processor = TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")
        preprocess, postprocess = make_pre_post_processors(
            config,
            pretrained_path=str(folder),
            preprocessor_overrides={"tokenizer_processor": {"tokenizer": tokenizer}},
        )
    (folder / "lerobot.txt").write_text(said.getvalue())
    batch = dict(np.load(folder / "inputs.npz"))
    noise = torch.from_numpy(batch.pop("noise"))
    task = str(batch.pop("task"))
    observation = {name: torch.from_numpy(value) for name, value in batch.items()}
    given = preprocess({**observation, "task": task})
    with torch.no_grad():
        actions = policy.predict_action_chunk(given, noise=noise)
    np.savez(folder / "lerobot.npz", actions=postprocess(actions).numpy())


def drop_sizes(path: Path) -> None:
    settings = json.loads(path.read_text())
    sizes = ("vision", "vlm", "expert", "vocab_size", "state_dim", "action_dim")
    path.write_text(json.dumps({k: v for k, v in settings.items() if k not in sizes}))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        run(Path(name))
