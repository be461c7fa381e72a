"""Checkpoint files that are never half written, and that show whether they are damaged."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from errno import EBADF, EINVAL
from hashlib import blake2b
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["load", "remove_unfinished", "save"]

# Note [Checksum]
# A file of torch.save() is a zip archive: it ends with a record of 22 bytes, the last two of which
# are the length of a comment, and the comment. torch.save() writes no comment. The one that save()
# writes holds the checksum of the file as it was without; torch.load() ignores it.
_RECORD_SIZE = 22
_NO_COMMENT = b"\0\0"
_MARK = b"sgdr_fused checksum (blake2b-128) "
_UNFINISHED = ".writing-"


def save(obj: object, path: str | os.PathLike[str]) -> None:
    """:func:`torch.save` for checkpoints: a crash never leaves a damaged file.

    Until the new file is complete and on the disk, ``path`` is the previous one. So a process that
    is killed while it saves, a full disk or a power cut leaves one or the other. The file has a
    checksum, which :func:`load` verifies, and :func:`torch.load` can read it too.

    Args:
        obj: A state_dict, or lists, tuples and dicts of tensors, numbers and strings.
        path: The file. A file of that name is replaced.

    Raises:
        TypeError: ``obj`` contains what :func:`load` would refuse to read.
        OSError: The file cannot be written. After an error the previous file is as it was.

    Example:
        >>> state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        >>> sgdr_fused.save(state, "checkpoint.pt")
        >>> optimizer.load_state_dict(sgdr_fused.load("checkpoint.pt")["optimizer"])
    """
    final = Path(os.path.realpath(path))  # a link stays a link
    remove_unfinished(final.parent, final.name)
    file = _new_unfinished_file(final)
    unfinished = Path(file.name)
    try:
        # The file stays open, and so locked, until it has its name.
        with file:
            _write(obj, file)
            _refuse_unreadable(unfinished, path)
            os.fsync(file.fileno())
            if fcntl is None:
                file.close()  # Windows renames closed files only
            os.replace(unfinished, final)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    _sync_folder(final.parent)


def load(
    path: str | os.PathLike[str],
    map_location: str | torch.device | dict[str, str] | Callable[..., Any] | None = None,
) -> Any:
    """:func:`torch.load` for checkpoints: verifies the checksum, and never runs code of the file.

    A file that :func:`torch.save` has written has no checksum, and loads without that check.

    Args:
        path: A file that :func:`save` or :func:`torch.save` has written.
        map_location: Where to put the tensors, as for :func:`torch.load`; None: where they were.

    Raises:
        ValueError: The file is damaged, or cannot be loaded with ``weights_only=True``; the message
            names it.
        OSError: The file cannot be read.
    """
    has_checksum = _verify_checksum(Path(path))
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except (OSError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        doubt = "" if has_checksum else "; the file may be damaged"
        raise ValueError(
            f"cannot load {os.fspath(path)!r}: torch.load says: {_reason(error)}{doubt}"
        ) from error


def remove_unfinished(folder: Path, name: str = "") -> None:
    """Removes the files that killed processes have left unfinished.

    Files that a living process is writing stay, also a process on another host.

    Args:
        folder: Where the files are.
        name: The name that the unfinished file was to get; empty: any.
    """
    if fcntl is None:
        return
    prefix = f"{_UNFINISHED}{name}-" if name else _UNFINISHED
    # A file that cannot be removed stays: it is in nobody's way.
    with suppress(OSError):
        for path in [path for path in folder.iterdir() if path.name.startswith(prefix)]:
            with suppress(OSError), path.open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # an error if it is being written
                path.unlink()


def _new_unfinished_file(final: Path) -> BinaryIO:
    """A new file beside the final one, locked until it is closed."""
    while True:
        name = f"{_UNFINISHED}{final.name}-{secrets.token_hex(4)}"
        file = final.with_name(name).open("xb")  # its mode follows the umask
        if _lock(file):
            return file
        file.close()


def _lock(file: BinaryIO) -> bool:
    """Locks a new file; False if another process took it for a left one before that."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks, where remove_unfinished() removes nothing
    return os.fstat(file.fileno()).st_nlink > 0


class _Hashed:
    """A file that hashes what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.hash = blake2b(digest_size=16)

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def _write(obj: object, file: BinaryIO) -> None:
    """Writes the object and the checksum, as Note [Checksum] says."""
    hashed = _Hashed(file)
    torch.save(obj, hashed)  # type: ignore[arg-type]  # torch needs no more of a file
    file.seek(-len(_NO_COMMENT), os.SEEK_END)
    file.write(_comment(hashed.hash.hexdigest()))
    file.flush()


def _comment(checksum: str) -> bytes:
    """The end of a file: the length of the comment, and the comment."""
    comment = _MARK + checksum.encode()
    return len(comment).to_bytes(2, "little") + comment


def _verify_checksum(path: Path) -> bool:
    """Raises if the checksum is wrong; False if there is none."""
    hash = blake2b(digest_size=16)
    expected = _comment(hash.hexdigest())
    with path.open("rb") as file:
        left = max(0, file.seek(0, os.SEEK_END) - len(expected))
        # One of them is there even if the other one is damaged or cut off.
        file.seek(max(0, left - _RECORD_SIZE))
        end = file.read()
        record = end.rfind(b"PK\5\6")
        length = end[record + _RECORD_SIZE - 2 : record + _RECORD_SIZE] if record >= 0 else b""
        if length != expected[:2] and _MARK not in end:
            return False
        file.seek(0)
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            hash.update(block)
            left -= len(block)
        found = file.read()
    hash.update(_NO_COMMENT)
    if found != _comment(hash.hexdigest()):
        raise ValueError(
            f"{os.fspath(path)!r} is damaged: its checksum is wrong; use an earlier file"
        )
    return True


def _refuse_unreadable(written: Path, path: str | os.PathLike[str]) -> None:
    try:
        # With mmap only the structure is read, not the tensors.
        torch.load(written, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise TypeError(
            f"cannot save to {os.fspath(path)!r}, because load() could not read it; save tensors, "
            f"numbers and strings, in dicts, lists and tuples; torch.load says: {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    """The first sentence of what went wrong."""
    # torch.load() wraps the reason in advice to trust the file.
    reason = error.__context__ if isinstance(error, UnpicklingError) else error
    text = str(reason or error).strip() or type(error).__name__
    return text.splitlines()[0].partition(". ")[0]


def _sync_folder(folder: Path) -> None:
    """Writes the folder's list of names to the disk."""
    if not hasattr(os, "O_DIRECTORY"):
        return  # Windows
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (EBADF, EINVAL):  # the file system syncs no folders
            raise
    finally:
        os.close(descriptor)
