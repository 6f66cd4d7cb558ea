"""π0 and π0.5 on Tenstorrent, through TTNN: one network, on a card, a mock device or the host.

`network.py` is the model, written once in TTNN operations. Where they run is behind one seam,
`backend.Backend`: on a card (`device.py`), on a mock device that only checks them (`dryrun.py`), or
as TTNN's own golden functions on torch tensors rounded to the device's dtypes (`host.py`).
"""
