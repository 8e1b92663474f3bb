"""A file that is downloaded, step by step. It blocks: call it in a thread."""

from __future__ import annotations

import errno
import os
import select
import stat as modes

from sandboxd.files.errors import os_errors
from sandboxd.files.etag import entity_tag
from sandboxd.files.root import Root
from sandboxd.files.transfer import BriefWait, Transfer

#: Bytes that are read at a time.
CHUNK = 512 * 1024

#: Bytes that are sent by one call of :meth:`Download.send`, at most.
STEP = 8 * 1024 * 1024

#: A file of no more than these is read when it is opened.
SMALL = 64 * 1024


class Download(Transfer):
    """
    A regular file that is read to be sent. Its attributes are known once it is open.

    :ivar name: the last component of its path.
    :ivar size: its bytes; None if stat reports none, as for many files of /proc and /sys.
    :ivar tag: its entity tag; empty if stat does not report its size.
    :ivar modified: when it was, in seconds since 1970.
    :ivar over: whether it is no longer open: it was closed, or is small and was read.
    """

    def __init__(self, root: Root, path: str) -> None:
        super().__init__()
        self.name = os.path.basename(path.rstrip("/"))
        self.size: int | None = None
        self.tag = ""
        self.modified = 0.0
        self._root = root
        self._path = path
        self._head = b""
        self._fd = -1

    def open(self) -> None:
        """
        Open it, and read it if it is small.

        :raise FileError: if it cannot be read, or is no regular file.
        """
        with os_errors("open", self._path), self._step():
            # O_NONBLOCK, or opening a FIFO would wait for a writer that may never come.
            self._fd = self._root.open(self._path, os.O_RDONLY | os.O_NONBLOCK)
            info = os.fstat(self._fd)
            if modes.S_ISDIR(info.st_mode):
                raise OSError(errno.EISDIR, "is a directory")
            if not modes.S_ISREG(info.st_mode):
                raise OSError(errno.EEXIST, "not a regular file")
            self.modified, self.size, self.tag = info.st_mtime, info.st_size, entity_tag(info)
            if info.st_size > SMALL:
                return
            self._head = os.pread(self._fd, SMALL + 1, 0)
            if len(self._head) != info.st_size:
                self.size = len(self._head) if len(self._head) <= SMALL else None
                self.tag = ""
            if self.size is not None:
                self.over = True
                self._close()

    def known(self, start: int, end: int) -> bytes:
        """Return the bytes between two offsets that were read at the opening. Does not block."""
        return self._head[start:end]

    def read(self, start: int, end: int) -> bytes:
        """
        Read bytes between two offsets, at most :data:`CHUNK`; nothing at the end of the file.

        :raise FileError: if it cannot be read.
        """
        with os_errors("read", self._path), self._step():
            return os.pread(self._fd, min(CHUNK, end - start), start)

    def send(self, socket: int, start: int, end: int) -> int:
        """
        Send bytes between two offsets to a socket with sendfile(2), as many as it takes with hardly a pause.

        :param socket: a non-blocking socket's descriptor, which is closed.
        :return: how many bytes, at most :data:`STEP`; 0 if none can be sent so, whatever the reason.
        :raise FileError: if it was closed.
        """
        try:
            with os_errors("read", self._path), self._step():
                return self._send(socket, start, min(end, start + STEP))
        finally:
            os.close(socket)

    def _send(self, socket: int, start: int, end: int) -> int:
        position = start
        wait = BriefWait(socket, select.POLLOUT)
        while position < end:
            try:
                count = os.sendfile(socket, self._fd, position, end - position)
            except BlockingIOError:
                if not wait.ready():
                    break
                continue
            except OSError:  # such a file cannot be sent so, or the client is gone: others meet the error again
                break
            if count == 0:
                break
            position += count
        return position - start

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
