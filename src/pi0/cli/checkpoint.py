"""`pi0 synth` and `pi0 inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pi0.cli import options

if TYPE_CHECKING:
    from pi0.checkpoint.load import Checkpoint

MODELS = {"pi0": "π0", "pi05": "π0.5"}
HASH_DIGITS = 12  # of 64, that the table shows


def synth(
    folder: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder to write.", show_default=False)
    ],
    preset: Annotated[
        str,
        typer.Option(
            help="pi0_base or pi05_base (7 GB in bfloat16), small or tiny, pi05_small or pi05_tiny."
        ),
    ] = "small",
    layout: Annotated[
        str, typer.Option(help="Whose names: openpi, lerobot, legacy or transformers.")
    ] = "openpi",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the weights.")] = 0,
    statistics: Annotated[
        str,
        typer.Option(
            help="trained-like: attention as peaked, and actions moved as far, as in trained "
            "models; flat: neither."
        ),
    ] = "trained-like",
    outliers: Annotated[
        float,
        typer.Option(
            min=1.0,
            help="How many times as large every hundredth channel of the norms is; 30 is like "
            "trained models.",
        ),
    ] = 1.0,
) -> None:
    """Write a random checkpoint in exactly the real format.

    It comes with a config.json, normalisation statistics and, for the small presets, a tokenizer
    that knows bytes. Activations have a sane scale in every layer; actions mean nothing.

    **Examples**

        pi0 synth --preset tiny tiny
        pi0 synth --preset pi0_base --seed 1 --dtype bfloat16 base
        pi0 synth --preset small --layout lerobot like_lerobot
        pi0 synth --preset small --outliers 30 outliers
    """
    import math
    from dataclasses import replace

    from pi0.checkpoint.layouts import LAYOUTS
    from pi0.checkpoint.outputs import expand_user
    from pi0.checkpoint.synth import STATISTICS, synthesise, tensor_list
    from pi0.cli.show import byte_progress, human_bytes, print_line
    from pi0.config import PRESETS
    from pi0.dtypes import parse_dtype
    from pi0.errors import ConfigError

    for name, value, known in (
        ("preset", preset, PRESETS),
        ("layout", layout, LAYOUTS),
        ("statistics", statistics, STATISTICS),
    ):
        if value not in known:
            raise ConfigError(f"{name}: expected one of {', '.join(known)}, found {value!r}.")
    folder = expand_user(folder)
    config, names = PRESETS[preset], LAYOUTS[layout]
    torch_dtype = parse_dtype(dtype)
    tensors = tensor_list(config, names)
    parameters = sum(math.prod(shape) for _, shape in tensors.values())
    with byte_progress(f"writing {preset}", parameters * torch_dtype.itemsize) as progress:
        synthesise(
            folder,
            config,
            names,
            seed,
            torch_dtype,
            lambda n: progress(n * torch_dtype.itemsize),
            replace(STATISTICS[statistics], outliers=outliers),
        )
    size = human_bytes((folder / "model.safetensors").stat().st_size)
    print_line(f"{folder}: {len(tensors)} tensors, {size}, layout {layout}")


@options.with_policy
def inspect(
    checkpoint: options.Checkpoint,
    wishes: options.PolicyOptions,
    cameras: options.Cameras = 3,
    tokens: options.Tokens = None,
    horizon: options.Horizon = None,
    max_tokens: options.MaxTokens = None,
    base: options.Base = None,
    stats: Annotated[
        bool,
        typer.Option(
            "--stats", help="Read the weights, too: mean, std, largest magnitude, hash of each."
        ),
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Say what is in a checkpoint, and what `pi0 act` would use, without loading it.

    Layout and how it was recognised, modules, configuration, sequence lengths, memory; robot,
    statistics, tokenizer, preprocessing, and all that is assumed or does not fit. A checkpoint that
    does not fit in every name, shape and dtype is an error that lists what is wrong. With --stats
    the weights are read, too; hashes are the same in every layout. Findings do not change the exit
    code, as they do that of `pi0 doctor`.

    **Examples**

        pi0 inspect pi0_base
        pi0 inspect pi0_base --stats
        pi0 inspect pi0_libero --robot libero
        pi0 inspect pi0_base --cameras 2 --image-size 384 --tokens 32
        pi0 inspect pi0_base --json | jq .sequence
    """
    from pi0.checkpoint.load import open_checkpoint
    from pi0.checkpoint.report import report
    from pi0.cli.show import print_json
    from pi0.policy import prepare

    opened = open_checkpoint(checkpoint, horizon, max_tokens, base)
    config = opened.config
    data = report(
        opened, cameras, tokens or config.max_tokens, wishes.image_size or config.vision.image_size
    )
    setup = prepare(opened, wishes)
    data["policy"] = setup.describe()
    data["int8"] = _read_outliers(opened)
    if stats:
        data["contents"] = _read_contents(opened)
    if as_json:
        print_json(data)
    else:
        _print_report(data)


def _read_outliers(opened: Checkpoint) -> dict[str, Any]:
    """Which norms' outliers engine cpu evens out in int8."""
    from pi0.engines.fast.cpu.engine import SCHEMES
    from pi0.engines.fast.equalise import find_equalisers

    return {
        "equalised": {
            norm: {
                "largest_channel_by_median": found.largest,
                "expected_error": [found.before**0.5, found.after**0.5],
            }
            for norm, found in find_equalisers(opened, SCHEMES["int8"]).items()
        }
    }


def _read_contents(opened: Checkpoint) -> dict[str, Any]:
    from dataclasses import asdict

    from pi0.checkpoint.contents import read_contents, total_hash
    from pi0.cli.show import byte_progress

    with byte_progress("reading", opened.read_bytes) as progress:
        contents = read_contents(opened, progress)
    tensors = {name: asdict(content) for name, content in contents.items()}
    return {"hash": total_hash(contents), "tensors": tensors}


def _print_contents(contents: dict[str, Any]) -> None:
    from pi0.cli.show import print_line, table

    table(
        "Tensors",
        ["tensor", "shape", "dtype", "mean", "std", "max abs", f"hash, first {HASH_DIGITS}"],
        [
            [
                name,
                "×".join(map(str, row["shape"])),
                row["dtype"],
                *(f"{row[key]:.3g}" for key in ("mean", "std", "max_abs")),
                row["hash"][:HASH_DIGITS],
            ]
            for name, row in contents["tensors"].items()
        ],
        left=3,
    )
    print_line(f"hash of all: {contents['hash']}")


def _print_report(data: dict[str, Any]) -> None:
    from pi0.cli.show import count, human_bytes, print_line, table

    print_line(f"{data['path']}: {MODELS[data['model']]}, {count(data['tensors'], 'tensor')}")
    print_line(f"layout {data['layout']}: {data['layout_explanation']}")
    if adapter := data["adapter"]:
        merged, replaced = (len(adapter[name]) for name in ("merged", "replaced"))
        print_line(
            f"LoRA of rank {', '.join(map(str, adapter['ranks']))} merged into "
            f"{count(merged, 'tensor')} of {adapter['base']}, {replaced} replaced"
        )
    print_line(f"token embedding {data['embedding']}\n")
    table(
        "Modules",
        ["module", "tensors", "parameters", "bytes", "dtype"],
        [
            [
                row["module"],
                str(row["tensors"]),
                f"{row['parameters']:,}",
                human_bytes(row["bytes"]),
                " ".join(row["dtypes"]),
            ]
            for row in data["modules"]
        ],
    )
    config = data["config"]
    towers = ("vision", "vlm", "expert")
    fields = list(dict.fromkeys(field for tower in towers for field in config[tower]))
    table(
        "Configuration",
        ["", *towers],
        [[field, *(str(config[tower].get(field, "")) for tower in towers)] for field in fields],
    )
    plain = {n: value for n, value in config.items() if n not in (*towers, "adaptive_norm")}
    print_line(
        ", ".join(
            f"{name} {value}{' (assumed)' if name in data['assumed'] else ''}"
            for name, value in plain.items()
        )
        + "\n"
    )
    s = data["sequence"]
    print_line(
        f"sequence: {s['cameras']} cameras × {s['patches_per_camera']} patches "
        f"({s['image_size']} px) + {s['text_tokens']} text = prefix {s['prefix']}, "
        f"suffix {s['suffix']}, total {s['total']}\n"
    )
    if data["memory"]:
        table(
            "Memory at batch 1",
            ["engine", "dtype", "weights", "cache", "working", "total"],
            [
                [
                    row["engine"],
                    row["dtype"],
                    *(human_bytes(row[key]) for key in ("weights", "cache", "working", "total")),
                ]
                for row in data["memory"]
            ],
            left=2,
        )
    _print_outliers(data["int8"]["equalised"])
    if "contents" in data:
        _print_contents(data["contents"])
    _print_policy(data["policy"])


def _print_outliers(norms: dict[str, Any]) -> None:
    """Prints what engine cpu does about outliers in int8."""
    from pi0.cli.show import count, print_line

    if norms:
        largest = max(norm["largest_channel_by_median"] for norm in norms.values())
        print_line(
            f"cpu:int8: outliers in {count(len(norms), 'norm')}, up to {largest:.0f} times the "
            "median, are smoothed: scaled down there and up in the matrices that follow\n"
        )
    else:
        print_line("cpu:int8: no outliers in norms to smooth\n")


def _print_policy(policy: dict[str, Any]) -> None:
    """Prints what `pi0 act` would use, and the findings."""
    from pi0.cli.show import print_line

    robot, sources = policy["robot"], policy["sources"]
    stopped = any(finding["severity"] == "error" for finding in policy["findings"])
    print_line(f"pi0 act would {'stop at the errors below; known so far:' if stopped else 'use'}")
    if robot:
        cameras = ", ".join(
            f"{camera['key']}{'' if camera['required'] else ' (optional)'}"
            for camera in robot["cameras"]
        )
        state = ", ".join(f"{key} [{length or '?'}]" for key, length in robot["state"].items())
        print_line(
            f"  robot {robot['name']} ({sources['robot']}): cameras {cameras}; state {state}"
        )
        names = [(*camera["names"], camera["key"])[0] for camera in robot["cameras"]]
        print_line(f"  {' '.join(f'--image {name}=FILE' for name in names)}")
        relative = sum(robot["relative"])
        print_line(
            f"  actions: chunks of {policy['horizon']} with {robot['action_dim'] or '?'} values "
            f"each, {relative} of them relative to the state; limits "
            f"{'stated' if robot['limits'] else 'not stated'}"
        )
    for name in ("statistics", "tokenizer", "preprocessing"):
        if name in sources:
            print_line(f"  {name}: {sources[name]}")
    if policy["state_in_prompt"]:
        print_line("  the prompt holds the state")
    for finding in policy["findings"]:
        print_line(f"{finding['severity']} {finding['code']}: {finding['sentence']}")
