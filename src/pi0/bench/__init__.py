"""How fast engines are, and how accurate, in one run on one machine.

`run.py` measures every engine in turn, in processes of its own (`worker.py`); `task.py` has the
messages between them. `flops.py` counts the arithmetic, `roofline.py` measures how fast this
machine does plain arithmetic, and `report.py` relates times to both. Knows no engine's internals.
"""
