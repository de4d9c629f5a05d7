"""Where shards are read from: a folder on this machine, or any URL that fsspec knows (s3://, gs://, hf://, memory://).

Both answer the same four questions about a file: its bytes, its size, a range of its bytes, its sha256.
"""

import hashlib
import os
import time
from pathlib import Path
from typing import Any, Protocol

import fsspec

_TRIES = 4
"""Attempts at a remote read; the waits between them are 0.5, 1 and 2 seconds."""
_BLOCK = 2**24


class Storage(Protocol):
    """Files of one data set. Every method raises FileNotFoundError or another OSError."""

    def where(self, name: str) -> str:
        """What to call the file in messages."""

    def read(self, name: str) -> bytes:
        """All of a file."""

    def size(self, name: str) -> int:
        """A file's size in bytes."""

    def read_at(self, name: str, offset: int, size: int) -> bytes:
        """A file's bytes from `offset` on; fewer than `size` where it ends."""

    def sha256(self, name: str) -> str:
        """The hash of all of a file."""


def open_storage(root: str | Path) -> Storage:
    """The storage at a folder or URL. ValueError if no installed package reads that kind of URL."""
    if "://" not in str(root):
        return LocalFolder(Path(root))
    if str(root).startswith(("file://", "local://")):
        return LocalFolder(Path(str(root).split("://", 1)[1]))
    return RemoteFolder(str(root))


class LocalFolder:
    """A folder. Files stay open once they were read from, in each process by itself."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._files: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            os.close(file)

    def where(self, name: str) -> str:
        return str(self._root / name)

    def read(self, name: str) -> bytes:
        return (self._root / name).read_bytes()

    def size(self, name: str) -> int:
        return (self._root / name).stat().st_size

    def read_at(self, name: str, offset: int, size: int) -> bytes:
        # pread has no position, so forked workers may share a file that their parent opened.
        if name not in self._files:
            self._files[name] = os.open(self._root / name, os.O_RDONLY)
        return os.pread(self._files[name], size, offset)

    def sha256(self, name: str) -> str:
        with (self._root / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


class RemoteFolder:
    """What lies behind a URL. Reads that fail are tried again: networks have moments."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._made: tuple[int, Any, str] | None = None
        self._fs()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": None}

    def _fs(self) -> tuple[Any, str]:
        # fsspec's asynchronous file systems do not survive a fork: each process makes its own.
        if self._made is None or self._made[0] != os.getpid():
            try:
                fs, path = fsspec.url_to_fs(self._url)
            except (ImportError, ValueError) as error:
                raise ValueError(f"{self._url} cannot be opened: {error}") from None
            self._made = (os.getpid(), fs, path)
        return self._made[1], self._made[2]

    def where(self, name: str) -> str:
        return f"{self._url}/{name}"

    def read(self, name: str) -> bytes:
        return self._try(name, lambda fs, path: fs.cat_file(path))

    def size(self, name: str) -> int:
        return int(self._try(name, lambda fs, path: fs.size(path)))

    def read_at(self, name: str, offset: int, size: int) -> bytes:
        return self._try(name, lambda fs, path: fs.cat_file(path, start=offset, end=offset + size))

    def sha256(self, name: str) -> str:
        digest, size = hashlib.sha256(), self.size(name)
        for offset in range(0, size, _BLOCK):
            digest.update(self.read_at(name, offset, min(_BLOCK, size - offset)))
        return digest.hexdigest()

    def _try(self, name: str, ask: Any) -> Any:
        fs, root = self._fs()
        for attempt in range(_TRIES):
            try:
                return ask(fs, f"{root}/{name}")
            except FileNotFoundError:
                raise
            # Each cloud's package has errors of its own, which share no base but this one.
            except Exception as error:
                if attempt == _TRIES - 1:
                    message = f"{type(error).__name__}: {str(error)[:150]} (tried {_TRIES} times)"
                    raise OSError(None, message) from None
                time.sleep(0.5 * 2**attempt)
        raise AssertionError
