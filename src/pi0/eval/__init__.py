"""Closed-loop evaluation: a policy in a Gymnasium environment, episode after episode.

    from pi0.eval import CheckpointPolicy, EvalPlan, evaluate
    results = evaluate(CheckpointPolicy("CKPT", PolicyOptions(robot="tabletop")), EvalPlan())
    print(results.total.success, "of", results.total.episodes)

Needs the package gymnasium, which the extra `[sim]` brings.
"""

from pi0.eval.plan import CheckpointPolicy, EnvOptions, EvalPlan, FilmOptions, ServedPolicy
from pi0.eval.results import Episode, Results, Summary, wilson_interval
from pi0.eval.run import evaluate

__all__ = [
    "CheckpointPolicy",
    "EnvOptions",
    "Episode",
    "EvalPlan",
    "FilmOptions",
    "Results",
    "ServedPolicy",
    "Summary",
    "evaluate",
    "wilson_interval",
]
