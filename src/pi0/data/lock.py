"""A folder that one process at a time writes into."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from pi0.errors import Pi0Error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes that ask, too, out of a folder while the block runs. The folder is made
    if it is not there, and removed if the block leaves it empty.

    The lock is the kernel's: it leaves no file, and ends with the process however that ends. Where
    a file system has no locks there is none.

    Raises:
        Pi0Error: another process has it, or the folder cannot be made.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise Pi0Error(
            f"{folder}: expected a folder, or a place where one can be made, found: "
            f"{error.strerror or error}. Name another place."
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Pi0Error(
                f"{folder}: expected a folder that no other process is writing into, found that "
                "one is. Wait until it is done, or name another folder."
            ) from error
        except OSError:
            pass
        try:
            yield
        finally:
            for place in made:  # before another process can have it
                with contextlib.suppress(OSError):  # it is not empty, or gone already
                    place.rmdir()
    finally:
        os.close(descriptor)
