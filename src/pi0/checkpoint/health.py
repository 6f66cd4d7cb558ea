"""What is wrong with a checkpoint's weights, as findings; no model is made."""

from __future__ import annotations

from collections.abc import Sequence

from pi0.checkpoint.contents import read_contents
from pi0.checkpoint.load import Checkpoint, Progress, check
from pi0.errors import CheckpointError
from pi0.findings import Finding, error, warning

NAMED = 3  # tensors that a finding names
# Of a weight: trained ones stay below a few hundred, a flipped bit of an exponent gives up to 3e38.
LARGEST = 1e4
TOWERS = ("vision_tower", "vlm", "expert")


def header_findings(checkpoint: Checkpoint) -> list[Finding]:
    """What names, shapes and dtypes tell."""
    found = []
    try:
        check(checkpoint)
    except CheckpointError as misfit:
        found.append(error("weights-unfit", str(misfit)))
    for tower in TOWERS:
        dtypes = _matrix_dtypes(checkpoint, tower)
        if len(dtypes) > 1:
            found.append(
                warning(
                    "dtype-mixed",
                    f"{tower}: expected its matrices in one dtype, found {' and '.join(dtypes)}. "
                    "Was a conversion stopped half-way, or were two files mixed? Copy the files of "
                    "one checkpoint.",
                )
            )
    return found


def weight_findings(checkpoint: Checkpoint, progress: Progress = lambda _: None) -> list[Finding]:
    """What the values tell; reads all that the model reads.

    Raises:
        CheckpointError: a file is damaged.
    """
    contents = read_contents(checkpoint, progress, check_finite=False)
    found = []
    if bad := [f"{name} ({c.not_finite} values)" for name, c in contents.items() if c.not_finite]:
        found.append(
            error(
                "weights-not-finite",
                f"weights: expected finite values, found NaN or infinite ones in {_some(bad)}. The "
                "file is damaged or its training diverged: copy it again, or take an earlier step.",
            )
        )
    # No action depends on these, so that training leaves them as they began.
    unread = "vlm.norm.weight", f"vlm.blocks.{checkpoint.config.vlm.depth - 1}.norm2.weight"
    constant = [
        name
        for name, c in contents.items()
        if c.constant and c.shape != (1,) and name not in unread
    ]
    if constant:
        named = [f"{name} (all {contents[name].mean:g})" for name in constant]
        found.append(
            warning(
                "weights-constant",
                f"weights: expected values that differ within a tensor, found one value only in "
                f"{_some(named)}. They were not trained, or not loaded before they were saved: "
                "compare with the checkpoint that was trained from (pi0 diff).",
            )
        )
    huge = [f"{n} (up to {c.max_abs:.1e})" for n, c in contents.items() if c.max_abs > LARGEST]
    if huge:
        found.append(
            warning(
                "weights-huge",
                f"weights: expected magnitudes up to {LARGEST:g}, as of trained weights, found "
                f"larger ones in {_some(huge)}. Bits of the file may have changed, which it has no "
                "checksum for: compare it with its origin (gcloud storage hash, sha256sum).",
            )
        )
    return found + _adapter_findings(checkpoint)


def _adapter_findings(checkpoint: Checkpoint) -> list[Finding]:
    adapter = checkpoint.adapter
    if adapter is None or adapter.replaced:
        return []
    if any(pair.b.any() for pair in adapter.read(adapter.pairs).values()):
        return []
    return [
        warning(
            "adapter-untrained",
            f"{adapter.folder}: expected an adapter that changes its base, found lora_B zero "
            "throughout, as before training. Name the folder of a later step.",
        )
    ]


def _matrix_dtypes(checkpoint: Checkpoint, tower: str) -> list[str]:
    """Dtypes of the stored matrices of a tower's blocks, but for what an adapter replaces."""
    replaced = checkpoint.adapter.replaced if checkpoint.adapter else {}
    dtypes = {
        checkpoint.tensors[theirs].dtype
        for theirs, ours in checkpoint.names.ours.items()
        if ours.startswith(f"{tower}.blocks.") and "norm" not in ours and ours not in replaced
        if len(checkpoint.tensors[theirs].shape) > 1
    }
    return sorted(dtypes)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
