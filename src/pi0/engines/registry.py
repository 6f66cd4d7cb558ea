"""Which engines there are, by name: those of this package, and plug-ins (group `pi0.engines`).

Names are listed without importing an engine, or torch.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pi0.errors import EngineError, Pi0Error
from pi0.plugins import ENGINES, describe, find_plugins, load_plugin

if TYPE_CHECKING:
    from pi0.engines.base import Engine

BUILT_IN = {
    "reference": "pi0.engines.reference:ReferenceEngine",
    "compiled": "pi0.engines.reference:CompiledEngine",
    "cpu": "pi0.engines.fast.cpu.engine:CpuEngine",
    "cuda": "pi0.engines.fast.cuda.engine:CudaEngine",
    "ttnn": "pi0.engines.tenstorrent.engine:TtnnEngine",
    "ttnn-host": "pi0.engines.tenstorrent.engine:TtnnHostEngine",
    "transformers": "pi0.peers.engine:TransformersEngine",
    "lerobot": "pi0.peers.engine:LerobotEngine",
}


def engine_names() -> list[str]:
    """The names of all engines, built-in ones first."""
    return [*BUILT_IN, *sorted(find_plugins(ENGINES, frozenset(BUILT_IN)))]


def find_engine(name: str) -> type[Engine]:
    """The class of an engine, imported on first use.

    Raises:
        EngineError: no engine of that name, or a plug-in that cannot be used.
    """
    plugins = find_plugins(ENGINES, frozenset(BUILT_IN))
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        built_in: type[Engine] = getattr(importlib.import_module(module), attribute)
        return built_in
    if name not in plugins:
        raise EngineError(f"engine: expected one of {', '.join(engine_names())}, found {name!r}.")
    try:
        engine = load_plugin(plugins[name])
    except Pi0Error as error:
        raise EngineError(f"engine {name}: {error}") from error
    from pi0.engines.base import Engine

    if not (isinstance(engine, type) and issubclass(engine, Engine)):
        raise EngineError(
            f"engine {name}: expected a subclass of pi0.engines.base.Engine from plug-in "
            f"{describe(plugins[name])}, found {engine!r}."
        )
    if getattr(engine, "name", None) != name:
        raise EngineError(
            f"engine {name}: expected name = {name!r} on {engine.__qualname__}, found "
            f"{getattr(engine, 'name', None)!r}. The entry point and the class give one name."
        )
    try:
        check_declarations(engine)
    except EngineError as error:
        raise EngineError(f"engine {name}: {error}") from error
    return engine


def check_declarations(engine: type[Engine]) -> None:
    """Raises EngineError if a class does not declare its name and capabilities as `Engine` says."""
    from pi0.engines.base import Capabilities

    label = engine.__qualname__
    name = getattr(engine, "name", None)
    if not isinstance(name, str) or not name or set(name) & set(":@ "):
        raise EngineError(
            f"{label}.name: expected a word without colon and at sign, found {name!r}."
        )
    can = getattr(engine, "capabilities", None)
    if not isinstance(can, Capabilities):
        raise EngineError(
            f"{label}.capabilities: expected pi0.engines.base.Capabilities, found {can!r}."
        )
    for field, values in (("precisions", can.precisions), ("devices", can.devices)):
        texts = isinstance(values, tuple) and all(isinstance(value, str) for value in values)
        if not texts or not values:
            raise EngineError(
                f"{label}.capabilities.{field}: expected a tuple of at least one name, found "
                f"{values!r}."
            )


@contextmanager
def plugin_errors(name: str, task: str) -> Iterator[None]:
    """Whatever code of a plug-in raises becomes a sentence that names it; a built-in engine's
    errors stay as they are.

    Raises:
        EngineError: the block raised something that is no Pi0Error.
    """
    try:
        yield
    except Exception as error:
        entry = find_plugins(ENGINES, frozenset(BUILT_IN)).get(name)
        if entry is None or isinstance(error, Pi0Error):
            raise
        raise EngineError(
            f"engine {name}: expected plug-in {describe(entry)} to {task}, found "
            f"{type(error).__name__}: {error}."
        ) from error


def find_peers() -> list[str]:
    """The names of the engines that are other implementations of π0, installed or not.

    A plug-in that cannot be imported is left out with a warning.
    """
    peers = []
    for name in engine_names():
        try:
            if find_engine(name).capabilities.peer:
                peers.append(name)
        except EngineError as error:
            warnings.warn(str(error), stacklevel=2)
    return peers
