"""New folders and files, whole or not at all: checked before the work, locked while it lasts, named when they are complete."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import filelock


def check_output(path: str | Path, needed: int = 0) -> Path:
    """The path of a new folder or file, which can be made; asked before any long work.

    needed: bytes that will be written. Raises FileExistsError for a path that exists, ValueError below a file, PermissionError
    where nothing can be written, OSError where too little space is free.
    """
    path = Path(path).expanduser()
    if path.exists() or path.is_symlink():
        raise FileExistsError(f"{path} exists: choose another output, or remove this one first")
    place = next(parent for parent in path.absolute().parents if parent.exists())
    if not place.is_dir():
        raise ValueError(f"{path} cannot be made, because {place} is a file and not a folder: choose another output")
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be made, because nothing can be written in {place}: choose another output")
    free = shutil.disk_usage(place).free
    if needed > free:
        raise OSError(f"{path} needs {_megabytes(needed)}, but {_megabytes(free)} are free in {place}")
    return path


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


@contextlib.contextmanager
def reserved(path: Path, needed: int = 0) -> Iterator[Path]:
    """The path of a new folder or file, for this process alone within the `with`, which may be entered again inside.

    Raises as `check_output`, and FileExistsError while another process writes the same output.
    """
    check_output(path, needed)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_name(f".{path.name}.lock")
    lock = filelock.FileLock(file, timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise FileExistsError(f"another run is writing {path}: wait for it, or choose another output") from error
    try:
        check_output(path)  # another run may have finished it between the first check and the lock
        yield path
    finally:
        if lock.lock_counter == 1:
            file.unlink(missing_ok=True)  # while it is held, so that nobody holds a file without a name
        lock.release()


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path beside `path` to write a folder or file to; renamed to `path` at the end, or removed if anything fails.

    What a killed process has left there is removed first. Whoever the user's umask permits may read the result.
    """
    with reserved(path):
        partial = partial_of(path)
        remove(partial)
        try:
            yield partial
            readable(partial)
            partial.rename(path)
        except Exception as error:
            if disk_is_full(error):
                raise no_space(path) from error
            raise
        finally:
            remove(partial)  # does nothing if it was renamed


def partial_of(path: Path) -> Path:
    """Where an output is written until it is complete."""
    return path.with_name(f".{path.name}.partial")


def remove(path: Path) -> None:
    """Remove a file or a folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def readable(path: Path) -> None:
    """Give all files of an output the permissions that the user's umask says: safetensors makes files for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for file in [path, *path.rglob("*")]:
        if file.is_file():
            file.chmod(0o666 & ~mask)


def disk_is_full(error: BaseException) -> bool:
    """Whether an error comes from a full disk; safetensors raises one of its own, which is no OSError."""
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)


def no_space(path: Path, left: str = "nothing is left of it") -> OSError:
    """The error for a full disk. left: what is on the disk now."""
    return OSError(f"No space is left for {path}, and {left}: free some, or choose another output")
