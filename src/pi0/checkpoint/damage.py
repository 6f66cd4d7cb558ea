"""What a file is that was taken for weights or JSON and is neither, and how to mend it.

Knows nothing of π0.
"""

from __future__ import annotations

from pathlib import Path

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"
LFS_HINT = "a Git LFS pointer. Fetch the file that it stands for: git lfs pull."
# The first bytes of other kinds of files, and what to say of them.
STARTS = {
    LFS_POINTER: LFS_HINT,
    b"PK\x03\x04": "a pickle of PyTorch or another zip archive. Save it as safetensors first.",
    b"\x80\x02": "a pickle of PyTorch. Save it as safetensors first.",
    b"\x80\x04": "a pickle of PyTorch. Save it as safetensors first.",
    b"GGUF": "a GGUF file. Such weights are not read: name those that it was made from.",
    b"\x89HDF": "an HDF5 file. Such weights are not read: save them as safetensors first.",
    b"\x1f\x8b": "a compressed file. Unpack it first.",
}


def describe_safetensors(file: Path, error: Exception) -> str:
    """What was expected, what was found and the remedy, of a file that is no safetensors file."""
    start = _start(file)
    expected = "expected a complete safetensors file"
    if not start:
        return f"{expected}, found an empty file. Copy or download it again."
    if start.lstrip().startswith(b"<"):
        return f"{expected}, found a web page. Download the file itself."
    for begin, found in STARTS.items():
        if start.startswith(begin):
            return f"{expected}, found {found}"
    if start[8:9] not in b"{":  # after the length of the header
        return f"{expected}, found another kind of file. Name a checkpoint's folder or weights."
    found = f"found {file.stat().st_size} bytes of a truncated or damaged one ({error})"
    return f"{expected}, {found}. Copy or download it again."


def describe_json(file: Path, error: Exception) -> str:
    """What was found and the remedy, of a file that is no JSON."""
    if _start(file) == LFS_POINTER:
        return LFS_HINT
    return f"{error}. Mend it, or copy or download it again."


def _start(file: Path) -> bytes:
    with open(file, "rb") as handle:
        return handle.read(len(LFS_POINTER))
