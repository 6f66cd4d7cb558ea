"""Options that several verbs share, and the help of those that name engines."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperOption

from pi0.config import MAX_STEPS

if TYPE_CHECKING:
    from pi0.policy import PolicyOptions as PolicyOptions
else:  # typer evaluates annotations; this one it never sees (`with_policy`)
    PolicyOptions = Any

Checkpoint = Annotated[
    Path,
    typer.Argument(
        metavar="CKPT",
        help="Checkpoint folder (JAX's, too), .safetensors file, shard index, adapter folder, or "
        "`tabletop`, which comes with pi0.",
        show_default=False,
    ),
]
Base = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="The full model of a checkpoint that is a PEFT (LoRA) adapter; default: the one that "
        "adapter_config.json names, beside it.",
        show_default=False,
    ),
]
GRAMMAR = "ENGINE[:PRECISION][@DEVICE]"
ENGINE_HELP = (
    "Engine that computes, as in cpu:int8 or reference@cuda:1. reference: plain PyTorch; "
    "cpu, cuda: fast; ttnn: a Tenstorrent card; ttnn-host: its arithmetic on the host."
)


def parse_names(text: str) -> tuple[str, ...]:
    """The names in "A, B"."""
    return tuple(name.strip() for name in text.split(","))


def check_engines(param: typer.CallbackParam, value: Any) -> Any:
    """The value of an option that takes engines.

    Raises:
        EngineError: a word names none. It may be the checkpoint, if the option stands before it and
            too few engines after it; typer would only say that the checkpoint is missing.
    """
    from pi0.engines.registry import engine_names
    from pi0.errors import EngineError

    names = engine_names() + ["auto"] * (param.default == "auto")
    words = f"{param.nargs} engines" if param.nargs > 1 else "an engine"
    for word in [value] if isinstance(value, str) else value:
        name = re.split("[:@]", word)[0]
        if name not in names:
            remedy = ""
            if name == "auto":
                remedy = " Only commands with a policy choose one: act, eval and serve."
            elif word.startswith("-"):
                remedy = f" Name {words} after one {param.opts[0]}."
            elif "/" in word or (word and Path(word).exists()):
                remedy = (
                    f" It stands after {param.opts[0]}, which takes {words}: if it is the "
                    "checkpoint, name it first."
                )
            raise EngineError(
                f"engine: expected one of {', '.join(names)}, found {word!r}.{remedy}"
            )
    return value


Engine = Annotated[str, typer.Option(metavar=GRAMMAR, help=ENGINE_HELP, callback=check_engines)]
EngineOrAuto = Annotated[
    str,
    typer.Option(
        "--engine",
        metavar=GRAMMAR,
        help=f"{ENGINE_HELP} auto: the fastest on this machine that computes in float32.",
        callback=check_engines,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="The engine's device where --engine names none: cpu, cuda or cuda:N, for engine ttnn "
        "the number of a card; default: the engine's.",
        show_default=False,
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="The engine's precision where --engine names none, such as float32 or bfloat16; "
        "default: the engine's first.",
        show_default=False,
    ),
]
WeightCache = Annotated[
    bool,
    typer.Option(
        "--weight-cache",
        help="Keep the weights, packed for the engine, in a file beside the checkpoint, from which "
        "the next start loads them.",
    ),
]
Steps = Annotated[int, typer.Option(min=1, max=MAX_STEPS, help="Denoising steps.")]
PolicySteps = Annotated[
    int | None,
    typer.Option(
        "--steps",
        min=1,
        max=MAX_STEPS,
        help="Denoising steps; default: what config.json says, else 10.",
        show_default=False,
    ),
]


def _check_sampler(name: str) -> str:
    from pi0.model.flow import check_sampler  # needs torch

    return check_sampler(name)


Sampler = Annotated[
    str,
    typer.Option(
        callback=_check_sampler,
        help="How denoising steps are taken: euler, or midpoint, with two velocities in each.",
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the noise.")]
RealTime = Annotated[
    str | None,
    typer.Option(
        metavar="exact|identity",
        help="Real-time chunking: a chunk continues what is left of the previous one. exact: with "
        "the denoiser's Jacobian, engine reference; identity: any engine.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
ImageSize = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Side of the images that the model reads, in pixels; default: the checkpoint's.",
        show_default=False,
    ),
]
Cameras = Annotated[int, typer.Option(min=1, help="Cameras.")]
Tokens = Annotated[
    int | None,
    typer.Option(min=1, help="Text tokens; default: the checkpoint's.", show_default=False),
]
Horizon = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Actions in a chunk, where the checkpoint does not state it.",
        show_default=False,
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Tokens that prompts are padded to, where the checkpoint does not state it.",
        show_default=False,
    ),
]
Inputs = Annotated[
    Path | None,
    typer.Option(
        metavar="IN.npz", help="Inputs and noise as for `pi0 sample`.", show_default=False
    ),
]
# What verbs with a policy take for pre- and post-processing (`with_policy`).
RobotName = Annotated[
    str | None,
    typer.Option(
        "--robot",
        metavar="NAME|FILE.toml",
        help="generic, aloha, aloha_sim, libero, pi05_libero, droid, tabletop, an installed one, "
        "or a file; default: what the checkpoint's files say, else generic.",
        show_default=False,
    ),
]
TokenizerFile = Annotated[
    Path | None,
    typer.Option(
        "--tokenizer",
        help="SentencePiece .model or tokenizer.json; default: the checkpoint's, else one in the "
        "caches of openpi and Hugging Face.",
        show_default=False,
    ),
]
NormStats = Annotated[
    str | None,
    typer.Option(
        help="norm_stats.json, or `none` for states and actions in the model's units; default: the "
        "checkpoint's.",
        show_default=False,
    ),
]
NormMode = Annotated[
    str | None,
    typer.Option(
        help="mean_std, quantiles or min_max; default: what a LeRobot checkpoint says, else "
        "mean_std for π0 and quantiles for π0.5.",
        show_default=False,
    ),
]
Preprocessing = Annotated[
    str | None,
    typer.Option(
        help="openpi or lerobot: whose way of resizing images and cleaning prompts; default: the "
        "checkpoint's.",
        show_default=False,
    ),
]
Resize = Annotated[
    str | None,
    typer.Option(
        help="openpi or lerobot: how images are resized; default: as --preprocessing.",
        show_default=False,
    ),
]
PromptMode = Annotated[
    str | None,
    typer.Option(
        help="openpi or lerobot: how prompts are cleaned; default: as --preprocessing.",
        show_default=False,
    ),
]
StateInPrompt = Annotated[
    bool | None,
    typer.Option(
        help="The prompt of a π0.5 holds the state; --no-state-in-prompt: it does not; default: as "
        "the checkpoint's files or the robot say.",
        show_default=False,
    ),
]
# Parameter of a verb → its option, and the field of `PolicyOptions`.
POLICY = {
    "robot": (RobotName, "robot"),
    "tokenizer": (TokenizerFile, "tokenizer"),
    "norm_stats": (NormStats, "norm_stats"),
    "norm_mode": (NormMode, "norm_mode"),
    "preprocessing": (Preprocessing, "preprocessing"),
    "resize": (Resize, "resize"),
    "prompt_mode": (PromptMode, "prompt"),
    "state_in_prompt": (StateInPrompt, "state_in_prompt"),
    "image_size": (ImageSize, "image_size"),
}


def with_policy(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb with the options of `POLICY` in place of its parameter `wishes`, which gets them as
    `PolicyOptions`; but for those that the verb has as parameters of its own."""
    declared = inspect.signature(verb, eval_str=True).parameters
    added = {name: entry for name, entry in POLICY.items() if name not in declared}

    @functools.wraps(verb)
    def command(**given: Any) -> None:
        from pi0.policy import PolicyOptions

        said = {field: given.pop(name) for name, (_, field) in added.items()}
        verb(**given, wishes=PolicyOptions(**said))

    keyword = inspect.Parameter.KEYWORD_ONLY
    options = [
        inspect.Parameter(name, keyword, default=None, annotation=option)
        for name, (option, _) in added.items()
    ]
    parameters: list[inspect.Parameter] = []
    for parameter in declared.values():
        own = [parameter.replace(kind=keyword)]
        parameters += options if parameter.name == "wishes" else own
    command.__dict__["__signature__"] = inspect.Signature(parameters, return_annotation=None)
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


ENGINE_OPTIONS = ("engine", "engines", "against")


class VerbCommand(TyperCommand):
    """A command whose help fits a narrow terminal: --no-… is in the sentence of its option, not in
    a column of its own, which would be empty for all others."""

    def format_help(self, ctx: Any, formatter: Any) -> None:  # click's, which typer may contain
        negatives = {option: option.secondary_opts for option in self.params}
        for option in negatives:
            option.secondary_opts = []
        try:
            super().format_help(ctx, formatter)
        finally:
            for option, names in negatives.items():
                option.secondary_opts = names


class PluginCommand(VerbCommand):
    """A command whose help lists the engines and the installed robots, plug-ins included.

    They are listed when help is asked for, because reading entry points takes time.
    """

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from pi0.engines.registry import engine_names
        from pi0.plugins import ROBOTS, find_plugins

        robots = find_plugins(ROBOTS, frozenset())
        names = dict.fromkeys(ENGINE_OPTIONS, f" Engines: {', '.join(engine_names())}.")
        names["robot"] = f" Installed: {', '.join(robots)}." if robots else ""
        for option in self.params:
            if option.name in names and isinstance(option, TyperOption):
                text = names[option.name]
                option.help = (option.help or "").removesuffix(text) + text
        super().format_help(ctx, formatter)
