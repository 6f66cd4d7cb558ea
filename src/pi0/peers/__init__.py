"""Other people's π0 as engines: the judges of `pi0 verify`, the peers of the benchmarks.

Each runs in a process of its own (`worker.py`), in the interpreter that has it, on weights that it
gets from our reader. `engine.py` is its side here; `lerobot.py` and `transformers.py` are the only
files that know their code.
"""
