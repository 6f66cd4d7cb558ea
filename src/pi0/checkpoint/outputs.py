"""Where output goes: places are tried before the work, and files and folders are written under a
temporary name, which becomes theirs once they are complete.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from pi0.errors import Pi0Error, human_bytes

TEMPORARY = re.compile(r"\..+\.\d+\.part")  # what `_temporary` makes
# What checkpoints consist of; other files in their folders may be results of before.
PART = re.compile(
    r".*\.(safetensors|model|pi0|toml)|(.*config|.*index|.*tokenizer.*|policy_(pre|post)processor"
    r"|norm_stats)\.json|_(CHECKPOINT_)?METADATA|_sharding|manifest\.ocdbt"
)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, None)  # numpy raises without a number


@contextlib.contextmanager
def replacing(path: Path, size: int | None = None) -> Iterator[Path]:
    """A temporary name beside `path` that takes its place if the block succeeds; if it fails,
    nothing remains. A device or a pipe is written to directly. `size` is for the message.

    Raises:
        Pi0Error: the path is a folder, or it cannot be written.
    """
    with _translate_write_errors(path, size):
        refuse_folder(path)
        if _is_device(path):
            yield expand_user(path)
            return
        target = _target(path)
        made = [folder for folder in target.parents if not folder.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(target)
        try:
            yield temporary
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # somebody else has put something there
                for folder in made:
                    folder.rmdir()
            raise


@contextlib.contextmanager
def new_folder(path: Path, size: int) -> Iterator[Path]:
    """A temporary folder beside `path`, to be filled with `size` bytes, that takes its place if the
    block succeeds; if it fails, nothing remains.

    Raises:
        Pi0Error: something is there already, or it cannot be written.
    """
    with _translate_write_errors(path, size):
        target = _target(path)
        _refuse_full(path, target)
        made = [folder for folder in target.parents if not folder.exists()]
        _require_room(target, size)
        temporary = _temporary(target)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            _refuse_full(path, target)  # by another process meanwhile
            temporary.replace(target)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            with contextlib.suppress(OSError):  # somebody else has put something there
                for folder in made:
                    folder.rmdir()
            if isinstance(error, Pi0Error):  # of a file inside, whose name users never see
                error.args = (str(error).replace(str(temporary), str(path)),)
            raise


def _refuse_full(path: Path, target: Path) -> None:
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise Pi0Error(f"{path}: expected a new or empty folder, found a full one or a file.")
    if os.path.ismount(target):  # a volume, say: it cannot be replaced
        found = "a mount point. Name a folder inside it"
        raise Pi0Error(f"{path}: expected a new or empty folder, found {found}.")


def require_writable(
    *paths: Path | None, size: int = 0, reads: Iterable[Path | str | None] = ()
) -> None:
    """Tries the places of files of `size` bytes to be written: before the work, not after it.

    Args:
        reads: files that are read, which stay, and folders of checkpoints, whose parts stay.

    Raises:
        Pi0Error: one is a folder, lies under a file, is read-only or full, or it would replace what
            is read or another of them.
    """
    kept = [_target(Path(path)) for path in reads if path is not None]
    written: list[Path] = []
    for path in paths:
        if path is None:
            continue
        with _translate_write_errors(path, size):
            refuse_folder(path)
            if _is_device(path):
                continue
            target = _target(path)
            _refuse_replacing(path, target, kept, written)
            written.append(target)
            temporary = _temporary(_require_room(target, size) / target.name)
            try:
                temporary.write_bytes(b"\0")
            finally:
                temporary.unlink(missing_ok=True)


def _refuse_replacing(path: Path, target: Path, kept: list[Path], written: list[Path]) -> None:
    if target in written:
        raise Pi0Error(f"{path}: expected different files to write, found the same one twice.")
    part = target.is_file() and PART.fullmatch(target.name)
    if any(target == read or (part and read in target.parents) for read in kept):
        raise Pi0Error(
            f"{path}: expected a file that is not read, found one of the inputs. Name another file "
            "to write."
        )


def _require_room(target: Path, size: int) -> Path:
    """The innermost folder above that exists, if the bytes fit there."""
    folder = next(parent for parent in target.parents if parent.exists())
    if not folder.is_dir():
        raise Pi0Error(f"{target}: expected {folder} to be a folder, found a file.")
    usage = shutil.disk_usage(folder)
    if usage.free < size and usage.total:  # /proc and some mounts report no size at all
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return folder


def expand_user(path: Path | str) -> Path:
    """The path with a leading `~` replaced by the home directory."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # no such user: a file may well be called that
        return Path(path)


def refuse_folder(path: Path) -> None:
    """Raises Pi0Error if something to be written is a folder."""
    if expand_user(path).is_dir() or not path.name:
        raise Pi0Error(f"{path}: expected the name of a file to write, found a folder.")


def _is_device(path: Path) -> bool:
    """Whether it is a device or a pipe, which a file must not replace."""
    path = expand_user(path)
    return path.exists() and not path.is_file()


def _target(path: Path) -> Path:
    """Where a file is written: through a link, so that the link stays and its target changes."""
    return Path(os.path.realpath(expand_user(path)))


def _temporary(path: Path) -> Path:
    """Not by the process's number, which others in containers have, too."""
    return path.with_name(f".{path.name[:40]}.{secrets.randbits(40)}.part")


def remove_temporaries(folder: Path) -> None:
    """Removes what killed processes left half-written under a folder, where nobody writes now."""
    for path in [p for p in folder.rglob(".*.part") if TEMPORARY.fullmatch(p.name)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)  # it may lie in one that is gone


@contextlib.contextmanager
def _translate_write_errors(path: Path, size: int | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        expected, remedy = "a place where a file can be written", "Name another place."
        if error.errno in FULL:
            expected = f"room for {human_bytes(size) if size else 'the file'}"
            remedy = "Make room, or name another place."
        raise Pi0Error(
            f"{path}: expected {expected}, found: {error.strerror or error}. {remedy}"
        ) from error
