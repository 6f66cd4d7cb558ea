"""One of several processes that train together: prints the losses of six steps.

Arguments: a folder; "shard" for FSDP. Started by torchrun, or alone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from episodes import PI05_SIZES, SIZES, make_run

from pi0.train.augment import Augmentation
from pi0.train.loop import LoopOptions, train
from pi0.train.processes import join_processes
from pi0.train.trainer import TrainerOptions


def main(folder: Path, shard: bool) -> None:
    torch.set_num_threads(1)
    # One group for both models: a second one in the same processes would find the first one's
    # addresses in torchrun's store and may wait for them for ever.
    with join_processes("cpu") as processes:
        for name, config in (("pi0", SIZES), ("pi05", PI05_SIZES)):
            run = make_run(
                folder / name,
                config=config,
                processes=processes,
                draws=2,
                heads=(("aux.place", 0),),
                augmentation=Augmentation(),
                trainer=TrainerOptions(micro_batch=2, recompute=True, shard=shard),
            )
            metrics: list[dict[str, float]] = []
            train(run, folder / name, {}, LoopOptions(), on_step=metrics.append)
            if processes.first:
                (folder / name / "losses.json").write_text(
                    json.dumps([step["total"] for step in metrics])
                )


main(Path(sys.argv[1]), "shard" in sys.argv)
