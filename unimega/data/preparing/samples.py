"""Samples of webdataset tar files: members of one name with different endings, one after another."""

import io
import json
import pickle
import tarfile
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np
from typing_extensions import override

from unimega.data.preparing.files import Compression, Raw, decompressed, too_long
from unimega.data.records.row import BadRow
from unimega.errors import DataError

_PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "img")
_HEADER_ERROR = tarfile.HeaderError
_HEADER_BYTES = 1 << 20
"""Longest extended header; tarfile would hold one of any length."""


def samples(file: BinaryIO, compression: Compression, shown: str, *, limit: int) -> Iterator[Raw]:
    """The samples of a tar file in order; each content is a row's fields, or why it is none.

    Raises:
        DataError: the archive is damaged, or it ends without its mark.
    """
    stream = _Forward(decompressed(file, compression, shown), limit=limit)
    number, key, size, start = 0, None, 0, 0
    members: dict[str, bytes | None] = {}
    with _open(stream, shown) as archive:
        for member in _members(archive, shown):
            folder, slash, name = member.name.rpartition("/")
            base, _, ending = name.partition(".")
            if not member.isreg() or not base or not ending:
                continue
            if folder + slash + base != key:
                if key is not None:
                    number += 1
                    yield _sample(number, start, size, members, limit)
                key, size, start, members = folder + slash + base, 0, member.offset, {}
            size += member.size
            if size <= limit:
                is_first = ending.lower() not in members
                members[ending.lower()] = _content(archive, member, shown) if is_first else None
            else:
                members = {}
        if key is not None:
            yield _sample(number + 1, start, size, members, limit)
    while rest := stream.read(_HEADER_BYTES):  # to the end: what follows, and the sum of a compressed file
        if rest.strip(b"\0"):
            raise DataError(f"{shown}: there is more behind the archive's end. Joined archives? Name each by itself.")


def _sample(number: int, start: int, size: int, members: Mapping[str, bytes | None], limit: int) -> Raw:
    """A row; None for a member that is there more than once."""
    if size > limit:
        return Raw(number, start, size, too_long(size, limit))
    known = {ending: data for ending, data in members.items() if data is not None}
    try:
        if twice := members.keys() - known.keys():
            raise BadRow(f"more than one member of one name that ends in .{min(twice)}", reason="ambiguous kind")
        return Raw(number, start, size, _fields(known))
    except BadRow as error:
        return Raw(number, start, size, error)


def _fields(members: Mapping[str, bytes]) -> dict[str, Any]:
    """The fields of a row: those of .json or .pkl, then the picture, codes (.npy), caption (.txt) beside it."""
    fields: dict[str, Any] = {}
    for ending, data in members.items():
        if ending in ("json", "pkl", "pickle", "pyd"):
            found = _json(data) if ending == "json" else _pickle(data)
            if not isinstance(found, dict):
                raise BadRow(f".{ending} holds a {type(found).__name__}, an object is needed", reason="not an object")
            fields |= found
    for ending, data in members.items():
        last = ending.rpartition(".")[2]
        if last in _PICTURES:
            if "image" in fields and isinstance(fields["image"], bytes):
                raise BadRow("more than one picture of one name", reason="ambiguous kind")
            fields["image"] = data
        elif last == "npy":
            name = ending.removesuffix(".npy") if "." in ending else "codes"
            fields[name] = _array(data)
        elif last in ("txt", "caption"):
            fields["caption"] = _decode(data, ending)
    pictured = any(name.startswith(("codes", "vqcode_", "image")) for name in fields)
    if not pictured and "txt" in members and "text" not in fields:
        fields["text"] = fields.pop("caption")
    return fields


def _json(data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow(f"not UTF-8 (byte {error.start} of the .json)", reason="not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise BadRow(f".json is not JSON ({error})", reason="not JSON") from error


class _Plain(pickle.Unpickler):
    """Lists, dicts, strings, bytes and numbers need no import: everything that does is refused."""

    @override
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _pickle(data: bytes) -> Any:
    try:
        return _Plain(io.BytesIO(data)).load()
    except Exception as error:  # the machine of a pickle fails in any way on damaged bytes
        raise BadRow(
            f"a pickle that is not read ({error}): plain lists, dicts and strings are", reason="pickle"
        ) from error


def _array(data: bytes) -> np.ndarray[Any, Any]:
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError, SyntaxError, MemoryError) as error:
        raise BadRow(f".npy is not an array ({error})", reason="wrong type") from error
    if not isinstance(array, np.ndarray):
        raise BadRow(".npy is an archive of arrays", reason="wrong type")
    return array.reshape(-1) if array.ndim == 2 and array.dtype.kind in "iu" else array


def _decode(data: bytes, ending: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow(f"not UTF-8 (byte {error.start} of the .{ending})", reason="not UTF-8") from error


class _Forward:
    """What tarfile needs of a file, over a stream that only goes forward; longer reads than allowed are refused."""

    def __init__(self, stream: Any, *, limit: int) -> None:
        self._stream, self._at, self._limit = stream, 0, max(limit, _HEADER_BYTES)

    def read(self, size: int) -> bytes:
        if size > self._limit:
            raise tarfile.ReadError(f"a header of {size} bytes")
        parts, wanted = [], size
        while wanted and (part := self._stream.read(wanted)):
            parts.append(part)
            wanted -= len(part)
        data = b"".join(parts)
        self._at += len(data)
        return data

    def seek(self, place: int) -> None:
        if place < self._at:
            raise tarfile.ReadError("it points backwards")
        while self._at < place and self.read(min(place - self._at, 1 << 20)):
            pass

    def tell(self) -> int:
        return self._at

    def close(self) -> None:
        """The stream is the caller's."""


class _Header(tarfile.TarInfo):
    """Tells a damaged header from the end: tarfile takes both for the end."""

    @override
    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> "_Header":
        try:
            return super().fromtarfile(tarfile)
        except _HEADER_ERROR as error:
            if type(error).__name__ == "EOFHeaderError":  # two blocks of zeros: the end, as it should be
                raise
            raise _Damaged(f"header at byte {tarfile.offset}: {error}") from error


class _Damaged(Exception):
    pass


def _open(stream: _Forward, shown: str) -> tarfile.TarFile:
    try:
        return tarfile.TarFile(fileobj=stream, mode="r", tarinfo=_Header)  # type: ignore[arg-type]
    except (tarfile.TarError, _Damaged) as error:
        raise _not_whole(shown, error) from error


def _members(archive: tarfile.TarFile, shown: str) -> Iterator[tarfile.TarInfo]:
    while True:
        archive.members = []  # type: ignore[attr-defined]  # tarfile keeps all headers otherwise
        try:
            member = archive.next()
        except (tarfile.TarError, _Damaged) as error:
            raise _not_whole(shown, error) from error
        if member is None:
            return
        yield member


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo, shown: str) -> bytes:
    try:
        opened = archive.extractfile(member)
        assert opened is not None
        return opened.read()
    except (tarfile.TarError, _Damaged) as error:
        raise _not_whole(shown, error) from error


def _not_whole(shown: str, error: Exception) -> DataError:
    return DataError(f"{shown}: the archive is damaged or cut ({error}). Write it again.")
