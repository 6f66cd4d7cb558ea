"""What each part of the tabletop's recipe is worth: `python benchmarks/ablations.py [--out DIR]`.

One lift-only training a row, all alike but for one thing, each evaluated on the same seeds. A run
that was stopped goes on. About 20 processor minutes a row.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PI0 = str(Path(sys.executable).with_name("pi0"))
EPISODES, STEPS = 3000, 3500


@dataclass(frozen=True)
class Row:
    """A variant: what differs from the first row."""

    label: str
    episodes: int = EPISODES
    disturb: float = 0.75
    draws: int = 4
    image_size: int = 56
    named: bool = True  # losses on the object that the sentence names
    objects: bool = True  # the loss on where all objects are


ROWS = (
    Row("as shipped, lift only"),
    Row("no loss on the named object", named=False),
    Row("no auxiliary loss at all", named=False, objects=False),
    Row("demonstrations without pushes", disturb=0.0),
    Row("one draw of noise and time", draws=1),
    Row("42 pixels", image_size=42),
    Row("a tenth of the demonstrations", episodes=EPISODES // 10),
)


def run(*words: object) -> None:
    subprocess.run([str(word) for word in words], check=True)


def train(row: Row, out: Path, data: Path) -> None:
    resume = ["--resume"] if (out / "training_state.pt").is_file() else []
    named = ["--point", "aux.target_point@1", "--aux", "aux.target_position@1"]
    objects = ["--point", "aux.object_points@0"]
    run(
        *(PI0, "train", ROOT / "examples" / "tabletop" / "model.toml", "--data", data),
        *(
            "--out",
            out,
            "--robot",
            "tabletop",
            "--execute",
            2,
            "--steps",
            STEPS,
            "--draws",
            row.draws,
        ),
        *("--image-size", row.image_size, "--learning-rate", 1e-3, "--final", 0.03),
        *("--warmup", 200, "--ema", 0.998, "--weight-decay", 1e-4, "--aux-weight", 0.3),
        *("--crop", 1, "--rotate", 0, "--colour", 0.3, "--save-every", 500, "--keep", 1),
        *(named if row.named else []),
        *(objects if row.objects else []),
        *resume,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/ablations"))
    parser.add_argument("--episodes", type=int, default=100, help="of each evaluation")
    arguments = parser.parse_args()
    lines = []
    for number, row in enumerate(ROWS):
        data = arguments.out / f"demos-{row.episodes}-{row.disturb}"
        out, results = arguments.out / f"run-{number}", arguments.out / f"results-{number}.json"
        if not results.is_file():
            run(
                *(PI0, "demos", "--tasks", "lift", "--episodes", row.episodes, "--seed", 2_000_000),
                *("--disturb", row.disturb, "--out", data),
            )
            if not (out / "checkpoints" / f"{STEPS:06d}").is_dir():
                train(row, out, data)
            run(
                *(PI0, "eval", out / "last", "--tasks", "lift", "--episodes", arguments.episodes),
                *("--seed-start", 9_100_000, "--workers", 2, "--out", results),
            )
        found = json.loads(results.read_text())
        lines.append(
            f"| {row.label} | {found['success']} of {found['episodes']} | {found['wrong']} |"
        )
    print("| | lifted | wrong cube |\n|---|---|---|", *lines, sep="\n")


if __name__ == "__main__":
    main()
