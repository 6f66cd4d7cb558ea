"""Engine `cpu`: the fast network in native code, float32 or eight bits."""
