"""Object stores: addresses such as s3://bucket/folder/*.jsonl -> the objects there, and the bytes of one.

fsspec does the work, with one library per kind of store. These libraries find credentials and endpoints where the
store's own tools find them (AWS_PROFILE, AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN).
"""

from __future__ import annotations

import contextlib
import glob
import io
from collections.abc import Iterator
from typing import Any

VERSION_KEYS = ("ETag", "md5Hash", "etag", "blob_id", "xet_hash", "LastModified", "mtime", "updated", "created")
"""The stores' names for a hash of an object's content or the time of its last change, the best first."""

BUFFER_BYTES = 1 << 20
"""Read from a store at a time, so that not every line needs a call."""


def list_objects(address: str) -> list[tuple[str, int, str]]:
    """(address, bytes, version) of the object, of all objects in the folder, or of those that match the glob; sorted.

    The version changes when the content changes; it is "" if the store gives neither a hash nor a time.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the library for this kind of store is missing, or the store cannot be reached.
    """
    with _in_plain_words(address):
        system, path = _file_system(address)
        system.invalidate_cache()  # an earlier listing may be out of date
        if glob.has_magic(path):
            found = system.glob(path, detail=True)
        else:
            info = system.info(path)
            if info["type"] == "file":
                return [(address, int(info["size"] or 0), _version(info))]
            found = system.find(path, detail=True)
        files = [info for info in found.values() if info["type"] == "file"]
        objects = [(system.unstrip_protocol(info["name"]), int(info["size"] or 0), _version(info)) for info in files]
    if not objects:
        raise FileNotFoundError(_not_found(address))
    return sorted(objects)


def open_object(address: str) -> io.BufferedIOBase:
    """Open an object for reading. Every later error names the address."""
    return io.BufferedReader(_Object(address), BUFFER_BYTES)


class _Object(io.RawIOBase):
    """The bytes of an object."""

    def __init__(self, address: str) -> None:
        self.address = address
        with _in_plain_words(address):
            system, path = _file_system(address)
            self.handle = system.open(path, "rb")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self.handle.seekable())

    def tell(self) -> int:
        return int(self.handle.tell())

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self.handle.seek(offset, whence))

    def readinto(self, buffer: Any) -> int:
        try:
            with _in_plain_words(self.address):
                data = self.handle.read(len(buffer))
        except FileNotFoundError as error:  # it was deleted; an OSError would mean a damaged file
            raise ValueError(str(error)) from None
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed and hasattr(self, "handle"):
            self.handle.close()
        super().close()


def _file_system(address: str) -> tuple[Any, str]:
    """fsspec's file system for an address, and the path inside it."""
    kind = address.partition("://")[0]
    try:
        import fsspec

        system, path = fsspec.core.url_to_fs(address)
    except ImportError:
        raise _PlainError(
            f"{address}: the library for {kind}:// is not installed; expected fsspec and the store's own; "
            "pip install 'tinylm[cloud]'"
        ) from None
    except ValueError as error:
        if "Protocol not known" not in str(error):
            raise
        raise _PlainError(f"{address}: unknown kind of address; expected s3://, gs:// or hf://; correct it") from None
    return system, path


class _PlainError(ValueError):
    """An error whose message is ours already."""


@contextlib.contextmanager
def _in_plain_words(address: str) -> Iterator[None]:
    """Turn the exceptions of all these libraries, which have no common base class, into one line each."""
    try:
        yield
    except _PlainError:
        raise
    except FileNotFoundError:
        raise FileNotFoundError(_not_found(address)) from None
    except Exception as error:
        if isinstance(error, PermissionError):
            advice = "check the address, and whether these credentials may read it"
        elif "redential" in _first_line(error):
            advice = "set the credentials as the store's own tools expect them"
        else:
            advice = "check the network"
        raise ValueError(f"{address}: cannot be read ({_first_line(error)}); {advice}") from None


def _not_found(address: str) -> str:
    """Stores also answer "not found" for objects that are private."""
    return (
        f"{address}: no such object, folder or bucket; expected data files; check the address, and the credentials if "
        "it is private"
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _version(info: dict[str, Any]) -> str:
    return next((f"{key} {info[key]}" for key in VERSION_KEYS if info.get(key)), "")
