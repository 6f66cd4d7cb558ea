"""Other implementations of π0 as engines, for `pi0 verify` and `pi0 bench` to compare with.

Each runs in a process of its own (`worker.py`), in the interpreter that has it, on weights that our
reader reads. `engine.py` is the engine in our process; `lerobot.py` and `transformers.py` are the
only files that know their code.
"""
