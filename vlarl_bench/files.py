"""Files that are whole or not there, one writer to a folder, and what to say when the system refuses."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .errors import BenchError


@contextlib.contextmanager
def sole_writer(folder: Path, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """One process at a time in a folder, which is made if need be. Where another one is there, `on_wait` is called and
    its end waited for; without `on_wait` BenchError is raised. A file system without locks has none."""
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if on_wait is None:
                raise BenchError(f"{folder}: another process is writing here; wait, or use another folder") from None
            on_wait()
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            pass
        yield
    finally:
        os.close(handle)


def explain_oserror(error: OSError, path: str | os.PathLike[str]) -> BenchError:
    """One line that says what the operating system refused and what to do about it."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return BenchError(
            f"{path}: the disk is full; free some space and continue with --resume, or choose another folder with --out"
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return BenchError(f"{path}: permission denied or read-only; change its permissions or choose another place")
    if error.errno == errno.ENOENT:
        return BenchError(f"{path}: no such file or folder")
    if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        return BenchError(f"{path}: a file is where a folder should be or the reverse; choose another folder")
    return BenchError(f"{path}: {error.strerror or str(error).strip().partition(chr(10))[0]}")


@contextlib.contextmanager
def explained(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns an OSError inside the block into a BenchError about `path`."""
    try:
        yield
    except OSError as error:
        raise explain_oserror(error, path) from error


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path with the same suffix; when the block ends well it becomes `path`, else it is removed."""
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            fsync(temporary)
            os.replace(temporary, path)
            fsync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json_atomic(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a JSON document whole or not at all. NaN and infinities raise ValueError: JSON has none."""
    write_text_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """As `read_json`, for a document that must be an object."""
    data = read_json(path)
    if not isinstance(data, dict):
        raise BenchError(f"{path}: not a JSON object")
    return data


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads a JSON document; one that is missing or damaged raises BenchError with its name."""
    with explained(path):
        data = Path(path).read_bytes()
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BenchError(f"{path}: not valid JSON ({error}); restore it from a copy") from None
