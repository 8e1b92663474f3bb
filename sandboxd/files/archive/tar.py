"""
The tar format, POSIX.1-2001 (pax), written and read piece by piece; GNU's long names are read too.

The standard library's reader cannot be used for what others send: it waits for more in the middle of its work, which
would hold a thread for as long as a client is slow, and takes an extended header of any claimed size into memory.
"""

from __future__ import annotations

import struct
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Generator
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from enum import Enum
from functools import cache

BLOCK = 512

#: Two blocks of zeros end an archive.
END = bytes(2 * BLOCK)

#: Bytes that an extended header, or a long name, may have.
MAX_EXTENDED = 64 * 1024

#: The records of extended headers that matter here.
_KEYS = (b"path", b"linkpath", b"size", b"mtime", b"uid", b"gid")

#: The range of times that a file system accepts, in seconds: 34 bits, ext4's.
_MAX_TIME = 1 << 34

#: The first number that is no user's; the kernel keeps it for none.
_MAX_ID = (1 << 32) - 1

#: The first numbers that have no room in a header block: of seven octal digits, and of eleven.
_MAX_NUMBER = 8**7
_MAX_SIZE = 8**11

#: name, numbers with a blank checksum, type, target, magic, user, group, device numbers, and no prefix.
_USTAR = struct.Struct("100s56sc100s8s32s32s16s167x")

_ENCODING = ("utf-8", "surrogateescape")


class TarError(ValueError):
    """An error in a tar archive, or a feature of the format that is not supported."""


class MemberType(Enum):
    """The type of a member."""

    FILE = "file"
    DIRECTORY = "directory"
    SYMLINK = "symbolic link"
    HARD_LINK = "hard link"
    OTHER = "other"


@dataclass
class Member:
    """
    A member of an archive.

    :ivar name: its path, as :func:`os.fsdecode` makes it.
    :ivar target: what a link leads to.
    :ivar mtime: nanoseconds since the epoch.
    """

    name: str
    kind: MemberType
    mode: int
    mtime: int
    size: int = 0
    target: str = ""
    uid: int = 0
    gid: int = 0
    user: str = ""
    group: str = ""


_TYPES = {
    MemberType.FILE: tarfile.REGTYPE,
    MemberType.DIRECTORY: tarfile.DIRTYPE,
    MemberType.SYMLINK: tarfile.SYMTYPE,
    MemberType.HARD_LINK: tarfile.LNKTYPE,
}
_KINDS = {type: kind for kind, type in _TYPES.items()} | {
    tarfile.AREGTYPE: MemberType.FILE,
    tarfile.CONTTYPE: MemberType.FILE,
}

#: Types of members without data, whatever their size says.
_WITHOUT_DATA = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)


def header(member: Member) -> bytes:
    """Return the blocks before a member's data: its header, after an extended header with what does not fit there."""
    name, target = member.name, member.target
    if member.kind is MemberType.DIRECTORY:
        name += "/"
    seconds, fraction = divmod(member.mtime, 10**9)
    records = []
    if fraction:
        sign, whole = ("", member.mtime) if member.mtime >= 0 else ("-", -member.mtime)
        records.append(("mtime", f"{sign}{whole // 10**9}.{whole % 10**9:09}"))
    if not 0 <= seconds < _MAX_SIZE:
        records = records or [("mtime", str(seconds))]
        seconds = 0
    if len(name) > 100 or not name.isascii():
        records.append(("path", name))
    if len(target) > 100 or not target.isascii():
        records.append(("linkpath", target))
    if len(member.user) > 32 or not member.user.isascii():
        records.append(("uname", member.user))
    if len(member.group) > 32 or not member.group.isascii():
        records.append(("gname", member.group))
    if member.uid >= _MAX_NUMBER:
        records.append(("uid", str(member.uid)))
    if member.gid >= _MAX_NUMBER:
        records.append(("gid", str(member.gid)))
    if member.size >= _MAX_SIZE:
        records.append(("size", str(member.size)))
    block = _block(
        name,
        _TYPES[member.kind],
        member.mode & 0o7777,
        member.uid % _MAX_NUMBER,
        member.gid % _MAX_NUMBER,
        member.size % _MAX_SIZE,
        seconds,
        target,
        member.user,
        member.group,
    )
    if not records:
        return block
    data = _written(records)
    return _extended_block(len(data)) + data + bytes(-len(data) % BLOCK) + block


def _block(
    name: str,
    type: bytes,
    mode: int = 0,
    uid: int = 0,
    gid: int = 0,
    size: int = 0,
    seconds: int = 0,
    target: str = "",
    user: str = "",
    group: str = "",
) -> bytes:
    """Return a ustar header block (POSIX.1-1988); texts are cut to the length of their fields."""
    blank = b"%07o\0%07o\0%07o\0%011o\0%011o\0        " % (mode, uid, gid, size, seconds)
    block = _USTAR.pack(
        name.encode("ascii", "replace"),
        blank,
        type,
        target.encode("ascii", "replace"),
        b"ustar\x0000",
        user.encode("ascii", "replace"),
        group.encode("ascii", "replace"),
        b"0000000\x000000000\0",
    )
    return b"%b%06o\0%b" % (block[:148], sum(block), block[155:])


@cache
def _extended_block(size: int) -> bytes:
    """Return the header block that precedes the records of an extended header."""
    return _block("././@PaxHeader", tarfile.XHDTYPE, size=size)


def _written(records: list[tuple[str, str]]) -> bytes:
    """Return the records of an extended header, each with its length in bytes at the front."""
    encoded = [(keyword.encode("ascii"), text.encode(*_ENCODING)) for keyword, text in records]
    lines = []
    for _, value in encoded:
        if not (value.isascii() or _is_utf8(value)):
            encoded.insert(0, (b"hdrcharset", b"BINARY"))
            break
    for keyword, value in encoded:
        bare = len(keyword) + len(value) + 3  # a space, "=" and a newline
        length = bare + len(str(bare))
        length = bare + len(str(length))
        lines.append(b"%d %b=%b\n" % (length, keyword, value))
    return b"".join(lines)


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def padding(size: int) -> bytes:
    """Return the zeros that fill a member's data up to a whole block."""
    return bytes(-size % BLOCK)


class Receiver(ABC):
    """The interface of a receiver of an archive's members, one after another."""

    @abstractmethod
    def begin(self, member: Member) -> None:
        """Take the header of the next member."""

    @abstractmethod
    def data(self, data: bytes) -> None:
        """Take some of the member's data."""

    @abstractmethod
    def end(self) -> None:
        """Take the end of the member's data."""


class Reader:
    """
    A parser of an archive that arrives in pieces; it calls a :class:`Receiver`.

    :ivar ended: whether its end has been read. What comes after it is of no interest.
    """

    def __init__(self, receiver: Receiver) -> None:
        self.ended = False
        self._receiver = receiver
        self._buffer = b""
        self._position = 0
        self._any = False
        self._globals: dict[str, str] = {}
        self._reading = self._read()
        next(self._reading)

    def feed(self, data: bytes) -> None:
        """
        Parse more of the archive.

        :raise TarError: if it is malformed.
        """
        if not self.ended and data:
            self._buffer = self._buffer[self._position :] + data
            self._position = 0
            self._reading.send(None)

    def finish(self) -> None:
        """
        Check that the archive is complete.

        :raise TarError: if there should be.
        """
        if not self.ended:
            raise TarError(
                "the archive breaks off" if self._any else "there is no archive; even one of nothing has an end"
            )

    def _read(self) -> Generator[None, None, None]:
        extended: dict[str, str] = {}
        while True:
            block = yield from self._take(BLOCK)
            self._any = True
            if not any(block):
                self.ended = True
                yield
                return
            try:
                info = tarfile.TarInfo.frombuf(block, *_ENCODING)
            except (tarfile.HeaderError, ValueError) as error:
                raise TarError(f"this is no tar archive, or a damaged one: {error}") from None
            if info.size < 0:
                raise TarError(f"{info.name}: its size is negative")
            if info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                extended.update(_records((yield from self._extended(info.size))))
            elif info.type == tarfile.XGLTYPE:
                self._globals.update(_records((yield from self._extended(info.size))))
            elif info.type == tarfile.GNUTYPE_LONGNAME:
                extended["path"] = _text((yield from self._extended(info.size)).partition(b"\0")[0])
            elif info.type == tarfile.GNUTYPE_LONGLINK:
                extended["linkpath"] = _text((yield from self._extended(info.size)).partition(b"\0")[0])
            else:
                yield from self._member(info, {**self._globals, **extended})
                extended = {}

    def _member(self, info: tarfile.TarInfo, extended: dict[str, str]) -> Generator[None, None, None]:
        if info.type == tarfile.GNUTYPE_SPARSE or "sparse" in extended:
            raise TarError(f"{info.name}: sparse members are not read; make the archive without --sparse")
        member = _member(info, extended)
        self._receiver.begin(member)
        if info.type not in _WITHOUT_DATA:
            left = member.size
            while left:
                if self._position == len(self._buffer):
                    yield
                piece = self._buffer[self._position : self._position + left]
                self._position += len(piece)
                left -= len(piece)
                self._receiver.data(piece)
            self._receiver.end()
            yield from self._take(-member.size % BLOCK)
        else:
            self._receiver.end()

    def _extended(self, size: int) -> Generator[None, None, bytes]:
        if size > MAX_EXTENDED:
            raise TarError(f"an extended header has {size} bytes; the limit is {MAX_EXTENDED}")
        data = yield from self._take(size)
        yield from self._take(-size % BLOCK)
        return data

    def _take(self, size: int) -> Generator[None, None, bytes]:
        while len(self._buffer) - self._position < size:
            yield
        self._position += size
        return self._buffer[self._position - size : self._position]


def _member(info: tarfile.TarInfo, extended: dict[str, str]) -> Member:
    name = extended.get("path", info.name)
    kind = _KINDS.get(info.type, MemberType.OTHER)
    if kind is MemberType.FILE and name.endswith("/"):
        kind = MemberType.DIRECTORY  # as it was before POSIX
    uid, gid = _number("uid", extended.get("uid"), info.uid), _number("gid", extended.get("gid"), info.gid)
    if not (0 <= uid < _MAX_ID and 0 <= gid < _MAX_ID):
        raise TarError(f"{name!r}: no user can have the ids {uid} and {gid}")
    return Member(
        name,
        kind,
        info.mode,
        _nanoseconds(extended.get("mtime"), int(info.mtime)),
        _number("size", extended.get("size"), info.size),
        extended.get("linkpath", info.linkname),
        uid,
        gid,
    )


def _records(data: bytes) -> dict[str, str]:
    """Return the records of an extended header; each is ``<length> <key>=<value>\\n``."""
    found = {}
    position = 0
    while position < len(data) and data[position]:
        digits, space, _ = data[position : position + 20].partition(b" ")
        end = position + int(digits) if space and digits.isdigit() else -1
        record = data[position + len(digits) + 1 : end]
        key, equals, value = record[:-1].partition(b"=")
        if end > len(data) or not record.endswith(b"\n") or not key or not equals or b"\0" in value:
            raise TarError("an extended header is malformed")
        if key in _KEYS:
            found[_text(key)] = _text(value)
        elif key.startswith(b"GNU.sparse."):
            found["sparse"] = ""
        position = end
    return found


def _text(data: bytes) -> str:
    return data.decode(*_ENCODING)


def _number(key: str, text: str | None, otherwise: int) -> int:
    if text is None:
        return otherwise
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise TarError(f"an extended header has a {key} of {text[:40]!r}")
    return int(text)


def _nanoseconds(text: str | None, otherwise: int) -> int:
    try:
        time = Decimal(otherwise if text is None else text[:40])
    except InvalidOperation:
        raise TarError("an extended header has an mtime that is no number") from None
    if not time.is_finite() or not -_MAX_TIME < time < _MAX_TIME:
        return 0
    return int(time.scaleb(9))
