"""Which engines there are, by name: those of this package, and plug-ins (group `pi0.engines`).

Names are listed without importing an engine, or torch.
"""

from __future__ import annotations

import importlib
import warnings
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
    return engine


def plugin_origin(name: str) -> str | None:
    """The distribution that an engine comes from; None for a built-in one."""
    entry = find_plugins(ENGINES, frozenset(BUILT_IN)).get(name)
    return None if entry is None else describe(entry)


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
