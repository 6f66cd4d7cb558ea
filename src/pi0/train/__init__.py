"""Training π0 and π0.5: from recorded episodes and a preset or checkpoint to a checkpoint.

Reading order: `loop.py` (the whole), `loss.py` (what is minimised), `samples.py` (frames to
batches), `start.py` (the model at step 0), `save.py` (what is written).
"""
