"""Zip files whose entries are stored as they are, checked against every copy of every fact in them.

A zip tells most things twice: before an entry, and in the directory at its end. zipfile believes
the directory; here both must agree and the entries must fill the file, so that damage to either is
an error and never another entry's bytes.
"""

import struct
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_DESCRIPTORS = (struct.Struct("<4s3I"), struct.Struct("<4sI2Q"))  # sizes of 4 bytes, or of 8
_FULL = 2**32 - 1  # a number that stands in the zip64 field instead
_LATE, _UTF8 = 0x8, 0x800  # flags: sizes follow the data; the name is UTF-8
_MAX_DIRECTORY = 2**22  # bytes; an entry takes under 100, and a tensor is one entry


class Entry(NamedTuple):
    """Where an entry's bytes lie in the file, and their CRC32 as recorded."""

    name: str
    start: int
    length: int
    crc: int


class _Listed(NamedTuple):
    """An entry as the directory lists it."""

    name: bytes
    flags: int
    crc: int
    length: int
    offset: int


class Archive:
    """The entries of a zip file by name.

    checked: whether CRCs were recorded; torch can be told to leave them all 0. Raises ValueError
    where two places in the file disagree, or entries are packed, overlap or leave gaps.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        with file.open("rb") as stream:
            start, listed = _directory(stream)
            self.entries = _entries(stream, listed, start)
        self.checked = any(entry.crc for entry in self.entries.values())

    def map(self, name: str) -> np.ndarray:
        """Bytes of an entry, still on disk: uint8 [length]."""
        entry = self.entries[name]
        if not entry.length:
            return np.empty(0, np.uint8)
        return np.memmap(self.file, np.uint8, "r", offset=entry.start, shape=(entry.length,))

    def verify(self, name: str) -> None:
        """Read an entry through; ValueError if its bytes are not those that were written."""
        if self.checked and zlib.crc32(self.map(name).data) != self.entries[name].crc:
            raise ValueError(f"{name} is damaged: its bytes do not have the recorded checksum")

    def read(self, name: str, *, most: int) -> bytes:
        """All bytes of an entry, verified; ValueError if there are more than `most`."""
        if self.entries[name].length > most:
            raise ValueError(f"{name} has {self.entries[name].length} bytes, at most {most} do")
        self.verify(name)
        return self.map(name).tobytes()


def is_zip(stream: BinaryIO) -> bool:
    """Whether the file begins as a zip does."""
    stream.seek(0)
    found = stream.read(4) == b"PK\x03\x04"
    stream.seek(0)
    return found


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _unpack(stream: BinaryIO, form: struct.Struct, offset: int, mark: bytes) -> tuple[int, ...]:
    """The numbers of a record at this place of the file, without its mark."""
    _require(offset >= 0, "it is truncated")
    stream.seek(offset)
    data = stream.read(form.size)
    _require(len(data) == form.size and data[:4] == mark, "it is truncated, or damaged, as a zip")
    return form.unpack(data)[1:]


def _directory(stream: BinaryIO) -> tuple[int, list[_Listed]]:
    """Where the directory begins, and its entries."""
    end = stream.seek(0, 2) - _END.size
    _, _, _, count, size, start, comment = _unpack(stream, _END, end, b"PK\x05\x06")
    _require(comment == 0, "it ends with a comment")
    stream.seek(max(0, end - _LOCATOR.size))
    if end >= _LOCATOR.size and stream.read(4) == b"PK\x06\x07":
        short = (count, size, start)
        _, place, _ = _unpack(stream, _LOCATOR, end - _LOCATOR.size, b"PK\x06\x07")
        end = end - _LOCATOR.size - _END64.size
        _require(place == end, "the two ends of its directory disagree")
        *_, count, size, start = _unpack(stream, _END64, end, b"PK\x06\x06")
        for value, copy, full in zip((count, size, start), short, (2**16 - 1, _FULL, _FULL)):
            _require(copy in (value, full), "the two ends of its directory disagree")
    _require(start + size == end, "its directory does not end where it should")
    _require(size <= _MAX_DIRECTORY, f"its directory has {size} bytes")
    stream.seek(start)
    data = stream.read(size)
    listed = []
    offset = 0
    while offset < size:
        entry, offset = _central(data, offset)
        listed.append(entry)
    _require(len(listed) == count, f"its directory lists {len(listed)} entries in place of {count}")
    return start, listed


def _central(data: bytes, offset: int) -> tuple[_Listed, int]:
    """The directory's entry at this place, and where the next begins."""
    _require(offset + _CENTRAL.size <= len(data), "its directory is cut off")
    mark, _, _, flags, method, _, _, crc, packed, length, *rest = _CENTRAL.unpack_from(data, offset)
    names, extras, comments, _, _, _, place = rest
    begin = offset + _CENTRAL.size
    after = begin + names + extras + comments
    _require(mark == b"PK\x01\x02" and after <= len(data), "its directory is damaged")
    name = data[begin : begin + names]
    extra = data[begin + names : begin + names + extras]
    length, packed, place = _wide(extra, (length, packed, place))
    shown = name[:100].decode("ascii", "replace")
    _require(method == 0 and packed == length, f"{shown!r} is compressed")
    _require(not flags & ~(_LATE | _UTF8), f"{shown!r} is encrypted or of an unknown kind")
    return _Listed(name, flags, crc, length, place), after


def _wide(extra: bytes, values: tuple[int, ...]) -> tuple[int, ...]:
    """The values, those that are full read from the zip64 field among the extra ones."""
    wide = b""
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<2H", extra)
        if kind == 1:
            wide = extra[4 : 4 + size]
        extra = extra[4 + size :]
    needed = [value == _FULL for value in values]
    _require(len(wide) >= 8 * sum(needed), "a size is missing in its directory")
    numbers = iter(struct.unpack_from(f"<{sum(needed)}Q", wide))
    return tuple(next(numbers) if full else v for v, full in zip(values, needed, strict=True))


def _entries(stream: BinaryIO, listed: list[_Listed], end: int) -> dict[str, Entry]:
    """Entries by name; they must fill the file from its start to the directory."""
    entries: dict[str, Entry] = {}
    place = 0
    for item in sorted(listed, key=lambda item: item.offset):
        name = item.name.decode("utf-8")
        _require(name.isprintable() and name not in entries, f"{name!r} is no name, or there twice")
        _require(item.offset == place, f"{name} overlaps another entry or leaves a gap")
        start, place = _bounds(stream, item)
        _require(place <= end, f"{name} reaches beyond its end")
        entries[name] = Entry(name, start, item.length, item.crc)
    _require(place == end, "its entries leave a gap")
    return entries


def _bounds(stream: BinaryIO, item: _Listed) -> tuple[int, int]:
    """Where an entry's bytes begin, and where the entry ends; its own header must agree."""
    header = _unpack(stream, _LOCAL, item.offset, b"PK\x03\x04")
    _, flags, method, _, _, crc, packed, length, names, extras = header
    name, extra = stream.read(names), stream.read(extras)
    what = name[:100].decode("ascii", "replace")
    agreed = name == item.name and flags == item.flags and method == 0 and len(extra) == extras
    start = item.offset + _LOCAL.size + names + extras
    if not flags & _LATE:
        length, packed = _wide(extra, (length, packed))
        agreed &= (crc, packed, length) == (item.crc, item.length, item.length)
        _require(agreed, f"{what!r} has two headers that disagree")
        return start, start + item.length
    # Where they follow the data, they are 0 here; some writers put them here as well.
    agreed &= crc in (0, item.crc) and {packed, length} <= {0, _FULL, item.length}
    _require(agreed, f"{what!r} has two headers that disagree")
    for form in _DESCRIPTORS:
        stream.seek(start + item.length)
        data = stream.read(form.size)
        facts = (b"PK\x07\x08", item.crc, item.length, item.length)
        if len(data) == form.size and form.unpack(data) == facts:
            return start, start + item.length + form.size
    raise ValueError(f"{what!r} does not end where its header says")
