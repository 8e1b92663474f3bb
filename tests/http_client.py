"""Sends bytes that may be no HTTP, and reads the answers."""

from __future__ import annotations

import socket
from typing import NamedTuple


class Answer(NamedTuple):
    """A response. Names of headers are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def id(self) -> bytes:
        """The id of the request that it answers, if that had one."""
        return self.headers.get("x-request-id", "").encode()


class Responses:
    """
    Reads the responses on a socket.

    :param heads: whether the first request is a HEAD.
    """

    def __init__(self, sock: socket.socket, head: bool = False) -> None:
        self._sock = sock
        self._head = head
        self._data = b""

    def next(self) -> Answer | None:
        """
        Read a response.

        :return: None if the connection has ended.
        :raise AssertionError: if it ends within one, or if a response is malformed.
        """
        while b"\r\n\r\n" not in self._data:
            if not self._receive():
                assert not self._data, self._data
                return None
        head, _, self._data = self._data.partition(b"\r\n\r\n")
        line, *fields = head.decode("ascii").split("\r\n")
        assert line.startswith(("HTTP/1.1 ", "HTTP/1.0 ")), line
        status = int(line.split(" ")[1])
        headers = {name.lower(): value for name, _, value in (each.partition(": ") for each in fields)}
        assert len(headers) == len(fields), fields
        if status == 100:
            return Answer(status, headers, b"")
        size = int(headers["content-length"])
        if self._head:
            self._head = False
            return Answer(status, headers, b"")
        while len(self._data) < size:
            assert self._receive(), self._data
        body, self._data = self._data[:size], self._data[size:]
        return Answer(status, headers, body)

    def _receive(self) -> bool:
        try:
            data = self._sock.recv(65536)
        except ConnectionResetError:
            data = b""
        self._data += data
        return bool(data)


def exchange(port: int, *pieces: bytes, until: bytes = b"", head: bool = False) -> list[Answer]:
    """
    Send pieces on a connection of their own, each in a packet of its own, and read the answers.

    :param until: the id of the request whose answer is the last one that is read; else all are, until the end.
    :param head: whether the first request is a HEAD.
    """
    answers = []
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            sock.sendall(piece)
        responses = Responses(sock, head)
        while (answer := responses.next()) is not None:
            answers.append(answer)
            if answer.id == until != b"":
                break
    return answers
