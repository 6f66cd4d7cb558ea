"""From a checkpoint's files and a user's wishes to a pipeline, with everything that was assumed.

A policy moves a robot only by what its checkpoint's files or its user said. What neither of them
said is a finding: a warning where a default is harmless, an error that names the option where it
would move a robot wrongly. `Policy` and `pi0 inspect` read the same findings.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pi0.checkpoint.lerobot import POSTPROCESSOR, PREPROCESSOR
from pi0.checkpoint.load import Checkpoint
from pi0.config import Pi0Config
from pi0.errors import Pi0Error
from pi0.findings import warning
from pi0.policy import lerobot
from pi0.policy.examine import examine
from pi0.policy.fit import aloha_flags, length_findings, of_base, settings_findings
from pi0.policy.images import RESIZE
from pi0.policy.lerobot import LerobotProgram
from pi0.policy.normalize import (
    NEEDED,
    Floats,
    Normalizer,
    Statistics,
    identity,
    make_normalizer,
)
from pi0.policy.observation import check_default_prompt
from pi0.policy.pipeline import Pipeline
from pi0.policy.robot import Robot
from pi0.policy.robots import PI05, ROBOTS, find_robot, robot_of_assets
from pi0.policy.setup import PolicyOptions, PolicySetup
from pi0.policy.statistics import (
    find_norm_stats,
    find_origin,
    read_norm_stats,
    stated_mode,
    statistics_folder,
)
from pi0.policy.tokenizer import (
    FILE_NAMES,
    PromptFormat,
    Tokenizer,
    find_tokenizer,
    load_tokenizer_of,
)

Conventions = tuple[str, str]  # of resizing and of prompts
LEROBOT_KEYS = {"observation.state": "state", "action": "actions"}


def prepare(checkpoint: Checkpoint, options: PolicyOptions) -> PolicySetup:
    """Everything around the model for a checkpoint; reads its small files only."""
    setup = PolicySetup(checkpoint, findings=list(checkpoint.findings))
    config = checkpoint.config
    if options.image_size is not None:
        config = config.with_image_size(options.image_size)
    program = _program(checkpoint, options, setup)
    settings = checkpoint.settings  # of transformers' config.json, too
    setup.findings += settings_findings(settings, checkpoint.config)
    setup.steps = checkpoint.steps
    if any(finding.severity == "error" for finding in setup.findings):
        _examine_the_rest(checkpoint, options, config, setup)
        return setup
    if options.norm_stats or not program:
        setup.origin = find_origin(checkpoint, options.norm_stats)
    conventions = setup.attempt(
        "preprocessing-unknown", lambda: _conventions(checkpoint, options, program, setup)
    )
    robot = setup.attempt("robot-unknown", lambda: _robot(checkpoint, options, program, setup))
    setup.robot = robot
    stats = setup.attempt(
        "statistics-unusable", lambda: _statistics(checkpoint, options, program, setup)
    )
    setup.statistics = stats
    tokenizer = setup.attempt(
        "tokenizer-unusable", lambda: _tokenizer(checkpoint, options, config, setup)
    )
    setup.findings += examine(setup, options, program, conventions and conventions[0])
    state_in_prompt = setup.attempt(
        "prompt-unknown", lambda: _state_in_prompt(options, program, setup)
    )
    if options.default_prompt is not None:
        setup.attempt("prompt-unknown", lambda: check_default_prompt(options.default_prompt))
    if any(finding.severity == "error" for finding in setup.findings):
        return setup
    assert robot is not None
    assert conventions and stats  # noqa: PT018
    assert tokenizer is not None
    assert state_in_prompt is not None
    setup.pipeline = Pipeline(
        config=config,
        robot=robot,
        tokenizer=tokenizer,
        resize=conventions[0],
        prompt=_prompt_format(conventions[1], config, program, state_in_prompt),
        state_stats=stats[0],
        action_stats=stats[1],
        target_stats=stats[2],
        image_stats=program.images if program else {},
        rename=_renames(program, checkpoint, robot) if program else {},
        default_prompt=options.default_prompt,
    )
    return setup


def _examine_the_rest(
    checkpoint: Checkpoint, options: PolicyOptions, config: Pi0Config, setup: PolicySetup
) -> None:
    """Finds what is wrong apart from LeRobot's files; the rest would only repeat that of these."""
    if options.robot is not None:
        setup.robot = setup.attempt(
            "robot-unknown", lambda: _robot(checkpoint, options, None, setup)
        )
    setup.attempt("tokenizer-unusable", lambda: _tokenizer(checkpoint, options, config, setup))


def _program(
    checkpoint: Checkpoint, options: PolicyOptions, setup: PolicySetup
) -> LerobotProgram | None:
    """What a LeRobot folder's own files say, if it is one."""
    folder = checkpoint.folder_of(PREPROCESSOR, POSTPROCESSOR)
    openpi = options.preprocessing == "openpi" and options.norm_stats is not None
    if openpi or not lerobot.is_lerobot(checkpoint):
        setup.n_action_steps = checkpoint.settings.get("n_action_steps")  # of `pi0 train`
        return None

    def read() -> LerobotProgram:
        return lerobot.read_program(
            folder,
            checkpoint.settings,
            statistics=_given_statistics(checkpoint, folder, options),
            norm_mode=options.norm_mode,
            robot_given=options.robot is not None,
            tokenizer_given=options.tokenizer is not None,
        )

    program = setup.attempt("processors-unusable", read)
    if program:
        if options.norm_stats is None and folder != checkpoint.folder:
            setup.findings.append(of_base("processors", folder))
        stated = {"processors-assumed"} if options.preprocessing == "lerobot" else set()
        setup.findings += [f for f in program.findings if f.code not in stated]
        setup.findings += length_findings(checkpoint, program.max_tokens)
        if program.max_tokens:  # then it is not assumed
            setup.findings = [f for f in setup.findings if f.code != "max-tokens-assumed"]
        setup.n_action_steps = program.n_action_steps
    return program


def _given_statistics(
    checkpoint: Checkpoint, folder: Path, options: PolicyOptions
) -> Mapping[str, Statistics] | Literal["none"] | None:
    """Statistics in place of a LeRobot folder's own files: named ones, or, where there are no
    files, those that older versions of LeRobot kept among the weights."""
    if options.norm_stats == "none":
        return "none"
    if options.norm_stats is not None:
        return read_norm_stats(Path(options.norm_stats))
    buffers = {} if lerobot.has_processors(folder) else checkpoint.statistics_buffers
    if not buffers:
        return None
    tables: dict[str, dict[str, Floats]] = {"state": {}, "actions": {}}
    for name, values in buffers.items():
        key, _, kind = name.rpartition(".")
        if key in LEROBOT_KEYS:
            tables[LEROBOT_KEYS[key]][kind] = values.numpy()
    return tables


def _conventions(
    checkpoint: Checkpoint,
    options: PolicyOptions,
    program: LerobotProgram | None,
    setup: PolicySetup,
) -> Conventions:
    for name in ("preprocessing", "resize", "prompt"):
        value = getattr(options, name)
        if value is not None and value not in RESIZE:
            raise Pi0Error(f"{name}: expected openpi or lerobot, found {value!r}.")
    declared = None if program else checkpoint.settings.get("preprocessing")
    base = options.preprocessing or declared  # as `pi0 convert` writes it
    if base not in (None, *RESIZE):
        raise Pi0Error(f"config.json preprocessing: expected openpi or lerobot, found {base!r}.")
    if base is None:
        base = "lerobot" if program else "openpi"
        theirs = checkpoint.names.layout == "lerobot"
        known = program or (_has_openpi_files(statistics_folder(checkpoint)) and not theirs)
        if not known and not (options.resize and options.prompt):
            sentence = (
                f"preprocessing: no file of {checkpoint.folder} says whose way of resizing images "
                "and cleaning prompts it was trained with{}. Say it with --preprocessing openpi "
                "or lerobot."
            )
            if theirs:
                raise Pi0Error(sentence.format(", and its tensor names are LeRobot's"))
            setup.findings.append(
                warning("preprocessing-assumed", sentence.format("; openpi's is assumed"))
            )
    setup.sources["preprocessing"] = base
    return options.resize or base, options.prompt or base


def _robot(
    checkpoint: Checkpoint,
    options: PolicyOptions,
    program: LerobotProgram | None,
    setup: PolicySetup,
) -> Robot:
    if options.robot is not None:
        setup.sources["robot"] = "named"
        robot = find_robot(options.robot, checkpoint.config.adaptive_norm)
        if robot in PI05.values() and checkpoint.config.state_tokens:
            other = next(name for name, table in PI05.items() if table == robot)
            raise Pi0Error(
                f"robot {robot.name}: expected a π0.5, as openpi's configuration of that name is, "
                f"found a π0. Name it {other}."
            )
        if robot.name in PI05 and robot == ROBOTS[robot.name] and checkpoint.config.adaptive_norm:
            raise Pi0Error(
                f"robot {robot.name}: expected openpi's table for a π0.5, found the one for a π0. "
                f'Pass the name, robot="{robot.name}", which is {PI05[robot.name].name} here.'
            )
        return robot
    aloha = aloha_flags(checkpoint.settings)
    if aloha:
        raise Pi0Error(
            f"robot: config.json sets {' and '.join(aloha)}, which asks for ALOHA's joint signs, "
            "gripper units or relative joints. Name the robot: --robot aloha (relative joints) or "
            "--robot aloha_sim (absolute)."
        )
    declared = checkpoint.settings.get("robot")  # written by `pi0 train`
    if isinstance(declared, str) and declared:
        setup.sources["robot"] = "config.json"
        try:
            return find_robot(declared, checkpoint.config.adaptive_norm)
        except Pi0Error as error:
            raise Pi0Error(f"config.json: {error}") from error
    if program:
        setup.sources["robot"] = "config.json and LeRobot's processors"
        return lerobot.robot_of(program, checkpoint.settings)
    if setup.origin is not None:
        raise Pi0Error(
            f"robot: the statistics are those of {setup.origin}, whose actions are not joint "
            "targets as they leave the model. Name the robot: --robot "
            f"{robot_of_assets(setup.origin)}, or --robot "
            "generic for the model's own actions."
        )
    setup.sources["robot"] = "assumed"
    setup.findings.append(
        warning(
            "robot-assumed",
            "robot: no file of the checkpoint names one; generic is assumed, without relative "
            "joints or a robot's own conventions. Name it with --robot NAME or a file.toml.",
        )
    )
    return ROBOTS["generic"]


def _statistics(
    checkpoint: Checkpoint,
    options: PolicyOptions,
    program: LerobotProgram | None,
    setup: PolicySetup,
) -> tuple[Normalizer, Normalizer, Normalizer]:
    """Normalisers of the state, of actions out, and of actions in."""
    config, mode = checkpoint.config, options.norm_mode
    if program:
        setup.sources["statistics"] = str(options.norm_stats or "LeRobot's processors")
        return program.state, program.actions, program.actions_in or program.actions
    if mode is not None and mode not in NEEDED:
        raise Pi0Error(f"norm_mode: expected one of {', '.join(NEEDED)}, found {mode!r}.")
    if options.norm_stats == "none":
        setup.sources["statistics"] = "none: states and actions are in the model's units"
        actions = identity("actions", config.action_dim)
        return identity("state", config.state_dim), actions, actions
    folder = statistics_folder(checkpoint)
    path = Path(options.norm_stats).expanduser() if options.norm_stats else find_norm_stats(folder)
    stats = read_norm_stats(path)
    if options.norm_stats is None and folder != checkpoint.folder:
        setup.findings.append(of_base("statistics", folder))
    mode = mode or stated_mode(checkpoint)
    setup.sources["statistics"] = f"{path} ({mode})"
    state, actions = (
        make_normalizer(what, mode, "openpi", stats[what]) for what in ("state", "actions")
    )
    return state, actions, actions


def _tokenizer(
    checkpoint: Checkpoint, options: PolicyOptions, config: Pi0Config, setup: PolicySetup
) -> Tokenizer:
    folder = checkpoint.folder_of(*FILE_NAMES)
    path = Path(options.tokenizer).expanduser() if options.tokenizer else find_tokenizer(folder)
    tokenizer = load_tokenizer_of(path, config.vocab_size)
    setup.sources["tokenizer"] = str(path)
    return tokenizer


def _state_in_prompt(
    options: PolicyOptions, program: LerobotProgram | None, setup: PolicySetup
) -> bool:
    stated = options.state_in_prompt
    if setup.checkpoint.config.state_tokens:
        declared = setup.checkpoint.settings.get("discrete_state_input")
        if (declared if stated is None else stated) or (program and program.state_in_prompt):
            raise Pi0Error(
                "state_in_prompt: expected a π0.5, whose prompt holds the state, found the weights "
                "of a π0, which has a token of the state."
            )
        return False
    if stated is None and program:
        stated = program.state_in_prompt
        declared = setup.checkpoint.settings.get("discrete_state_input")
        if declared not in (None, stated):
            raise Pi0Error(
                "state_in_prompt: expected config.json's discrete_state_input as LeRobot's "
                f"processors have it, {stated}, found {declared}. Say it with --state-in-prompt or "
                "--no-state-in-prompt."
            )
        if not stated:
            sentence = (
                "state_in_prompt: expected LeRobot's processors of a π0.5 to write the state into "
                "the prompt, as its own do, found that these do not. Are they this checkpoint's? "
                "Say it with --state-in-prompt or --no-state-in-prompt."
            )
            setup.findings.append(warning("state-in-prompt-missing", sentence))
    if stated is None:
        stated = setup.checkpoint.settings.get("discrete_state_input")
    if stated is None and setup.robot:
        stated = setup.robot.state_in_prompt
    trained = setup.robot and setup.robot.state_in_prompt
    by_files = options.state_in_prompt is None and stated is not None
    if by_files and trained is not None and stated != trained:
        sentence = (
            f"state_in_prompt: expected prompts {'with' if trained else 'without'} the state, with "
            f"which robot {setup.robot and setup.robot.name} was trained, found that the "
            f"checkpoint's files say {'with' if stated else 'without'}; the files are followed. Is "
            "it this robot's checkpoint? Say it with --state-in-prompt or --no-state-in-prompt."
        )
        setup.findings.append(warning("state-in-prompt-differs", sentence))
    if stated is None:
        sentence = (
            "state_in_prompt: no file says whether the prompt holds the state; it is assumed, as "
            "in openpi's π0.5. Say it with --state-in-prompt or --no-state-in-prompt."
        )
        setup.findings.append(warning("state-in-prompt-assumed", sentence))
        return True
    if not isinstance(stated, bool):
        raise Pi0Error(f"config.json discrete_state_input: expected true or false, found {stated}.")
    return stated


def _prompt_format(
    convention: str, config: Pi0Config, program: LerobotProgram | None, state: bool
) -> PromptFormat:
    if program is None:
        return PromptFormat(convention, config.max_tokens, newline=not state, state=state)
    return PromptFormat(
        convention,
        program.max_tokens or config.max_tokens,
        program.newline and not (state and not program.state_in_prompt),
        program.padding_side,
        state,
    )


def _renames(program: LerobotProgram, checkpoint: Checkpoint, robot: Robot) -> dict[str, str]:
    """The checkpoint's renames; of another robot than its own only those to keys that the table
    has, since it may state the keys as the robot itself calls them."""
    if program.cameras and robot == lerobot.robot_of(program, checkpoint.settings):
        return dict(program.rename)
    keys = {camera.key for camera in robot.cameras} | {key for key, _ in robot.state}
    return {key: name for key, name in program.rename.items() if name in keys | {*robot.ignored}}


def _has_openpi_files(folder: Path) -> bool:
    return any(folder.glob("assets/**/norm_stats.json"))
