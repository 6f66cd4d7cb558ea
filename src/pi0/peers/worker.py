"""The process that holds another implementation's model.

`python -m pi0.peers.worker NAME CKPT BASE HORIZON MAX_TOKENS DTYPE DEVICE` answers messages on
standard input with messages on standard output; BASE is an adapter's full model, or empty. It runs
in the interpreter that has the other implementation. That interpreter need not have pi0 installed:
torch, numpy and safetensors are enough.
"""

from __future__ import annotations

import importlib
import os
import resource
import sys
import time
from typing import Any

import torch

from pi0.checkpoint.load import open_checkpoint
from pi0.errors import EngineError, Pi0Error
from pi0.peers.frames import receive, send


def main() -> None:
    """Serves until standard input ends."""
    name, path, base, horizon, max_tokens, dtype, device = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what their code prints must not be taken for an answer
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched
    try:
        module = importlib.import_module(f"pi0.peers.{name}")
        require_device(device)
        checkpoint = open_checkpoint(path, int(horizon), int(max_tokens), base or None)
        model = module.Model(checkpoint, dtype, device)
    except (Pi0Error, ImportError) as error:
        send(answers, error=str(error))
        return
    send(answers, name=model.name, torch=torch.__version__)
    place = torch.device(device)
    while (message := receive(sys.stdin.buffer)) is not None:
        try:
            send(answers, **answer(model, message, place))
        except Pi0Error as error:
            send(answers, error=str(error))


@torch.no_grad()
def answer(model: Any, message: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """What the model answers to a message. `seconds` is the time from inputs in memory to results
    in memory, without communication."""
    command = str(message.pop("command"))
    steps = int(message.pop("steps", 0))
    start = time.perf_counter()
    arrays = {name: torch.from_numpy(value).to(device) for name, value in message.items()}
    if command == "prefill":
        result = model.prefill(arrays)
    elif command == "velocity":
        result = {"velocity": model.velocity(arrays["x_t"], arrays["t"])}
    else:
        noise = arrays.pop("noise")
        result = {"actions": model.sample(arrays, noise, steps)}
    outputs = {name: value.float().cpu().numpy() for name, value in result.items()}
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # prefill shows nothing that would wait for it
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    cuda = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return outputs | {"seconds": seconds, "peak": peak, "cuda_peak": cuda}


def require_device(name: str) -> None:
    """Raises EngineError if this interpreter's PyTorch has no such device."""
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise EngineError(
            f"device {name}: expected a PyTorch built for CUDA in {sys.executable} and a device, "
            f"found torch {torch.__version__} and none."
        )


if __name__ == "__main__":
    main()
