"""The tabletop: a robot arm, cubes, a bowl and a plate, and sentences that say what to do.

Importing this registers the Gymnasium environment `pi0/Tabletop-v0`; MuJoCo is loaded when one is
made. Needs the extra `[sim]`.
"""

from pi0.errors import Pi0Error, install_hint

try:
    import gymnasium
except ImportError as error:
    raise Pi0Error(
        f"simulator: expected the package gymnasium, found none. {install_hint('sim')}"
    ) from error

ENV_ID = "pi0/Tabletop-v0"
MAX_STEPS = 80

if ENV_ID not in gymnasium.registry:
    gymnasium.register(ENV_ID, entry_point="pi0.sim.env:TabletopEnv", max_episode_steps=MAX_STEPS)
