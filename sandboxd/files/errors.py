"""
Errors of the file system, with texts for the client and statuses for HTTP.

Errors have the form of Go's ``PathError``, ``<op> <path>: <strerror in lower case>``. The clients
match that text.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

#: Errors for lack of resources, of this process or the system: not the client's fault, and the next try may succeed.
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)

#: The HTTP status of what the file system has refused. The contract's routes have no use for it: they answer 200.
_STATUS = {
    **dict.fromkeys((errno.EINVAL, errno.ELOOP, errno.ENAMETOOLONG), 400),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS, errno.EXDEV), 403),
    errno.ENOENT: 404,
    **dict.fromkeys((errno.EBUSY, errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY, errno.ETXTBSY), 409),
    errno.ENXIO: 409,
    errno.EFBIG: 413,
    **dict.fromkeys(EXHAUSTED, 503),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), 507),
}


class FileError(Exception):
    """
    An error that the operating system has answered a file operation with.

    :ivar errno: its error number; 0 if it is our own refusal.
    """

    def __init__(self, op: str, path: str, why: str, errno: int = 0) -> None:
        super().__init__(f"{op} {path}: {why}")
        self.errno = errno

    @property
    def status(self) -> int:
        """The HTTP status for this error."""
        return _STATUS.get(self.errno, 500)


class OutsideRoot(OSError):
    """A path, or a link on its way, leads out of the root."""

    def __init__(self, directory: str) -> None:
        super().__init__(errno.EXDEV, f"is outside of the root {directory}")


class RootItself(OSError):
    """A path leads to the root directory itself, which cannot be renamed or removed."""

    def __init__(self) -> None:
        super().__init__(errno.EBUSY, "is the root directory")


@contextmanager
def os_errors(op: str, path: str) -> Iterator[None]:
    """Turn an :class:`OSError` raised inside into a :class:`FileError`."""
    try:
        yield
    except OutsideRoot as error:
        raise FileError(op, path, error.strerror or "", error.errno or 0) from None
    except OSError as error:
        raise FileError(op, path, (error.strerror or str(error)).lower(), error.errno or 0) from None
