"""How fast engines are, and how exact, in one run on one machine.

`run.py` sends every engine, in turn, into processes of its own (`worker.py`); `job.py` is what the
two tell each other. `count.py` says how much arithmetic there is to do, `rates.py` how fast this
machine does plain arithmetic, `report.py` puts times beside both. Knows no engine's inside.
"""
