"""The HTTP probe: asks a server in the sandbox whether it is ready."""

from __future__ import annotations

import httptools
from twisted.internet.defer import Deferred, TimeoutError
from twisted.internet.error import ConnectError
from twisted.internet.task import deferLater
from twisted.logger import Logger

from sandboxd.processes.listeners import INTERVAL
from sandboxd.proxy.socket_stream import connect
from sandboxd.reactor.interfaces import Reactor

#: Seconds that one answer may take.
PATIENCE = 5

#: Bytes that the head of an answer may have.
HEAD = 64 * 1024


class HttpProbe:
    """
    A client that sends GET requests to ports of the loopback interface. Redirects count as answers, and are not
    followed.
    """

    _log = Logger()

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor

    async def when_answered(self, port: int, path: str) -> None:
        """Probe every :data:`~sandboxd.processes.listeners.INTERVAL` seconds until the answer is 2xx or 3xx."""
        while True:
            asked = self._reactor.seconds()
            if await self.answers(port, path):
                return
            await deferLater(self._reactor, max(0.0, asked + INTERVAL - self._reactor.seconds()))

    async def answers(self, port: int, path: str) -> bool:
        """
        Return whether ``GET http://127.0.0.1:<port><path>`` is answered with 2xx or 3xx.

        :param path: with its query, as it stands in a request's first line.
        """
        try:
            status = await Deferred.fromCoroutine(self._status(port, path)).addTimeout(PATIENCE, self._reactor)
        except (ConnectError, TimeoutError, httptools.HttpParserError) as error:
            self._log.debug("port {port} does not answer: {error}", port=port, error=error)
            return False
        return 200 <= status < 400

    async def _status(self, port: int, path: str) -> int:
        """Return the status of the final response; 0 if the connection ends before it, or the head is too long."""
        connection = await connect(self._reactor, port)
        try:
            await connection.write(
                f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUser-Agent: sandboxd\r\n"
                "Accept: */*\r\nConnection: close\r\n\r\n".encode("ascii")
            )
            answer = _ProbeResponse()
            size = 0
            while not answer.status and size < HEAD and (data := await connection.read()):
                size += len(data)
                answer.parser.feed_data(data)
            return answer.status
        finally:
            connection.close()


class _ProbeResponse:
    """
    The response to a probe, as far as it has arrived.

    :ivar status: the status of the first complete head that is not interim (1xx); 0 until then.
    """

    def __init__(self) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.status = 0

    def on_headers_complete(self) -> None:
        """Take the status, as a head is complete."""
        code = self.parser.get_status_code()
        if code >= 200 and not self.status:
            self.status = code
