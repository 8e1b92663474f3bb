"""A client of the API for tests: treq over real sockets, and a reader of Server-Sent Events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import treq
from twisted.internet import reactor
from twisted.internet.defer import Deferred, DeferredQueue
from twisted.internet.error import ConnectionDone
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from twisted.web.client import Agent, ResponseDone
from twisted.web.http import PotentialDataLoss
from twisted.web.http_headers import Headers


class Response(NamedTuple):
    """A response with its whole body."""

    status: int
    headers: Any
    body: bytes

    def json(self) -> Any:
        assert self.headers.getRawHeaders("Content-Type") == ["application/json"], self
        return json.loads(self.body)


class Event(NamedTuple):
    """A Server-Sent Event."""

    name: str
    data: Any
    id: str | None


class Body(Protocol):
    """A response's body, read as fast as it is asked for, and no faster once ``pause`` was called."""

    def __init__(self) -> None:
        self.chunks: DeferredQueue[bytes | BaseException] = DeferredQueue()

    def dataReceived(self, data: bytes) -> None:
        self.chunks.put(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        assert reason.value is not None
        self.chunks.put(reason.value)


class Events:
    """An open event stream. Iterate over it, or ``close`` it to hang up."""

    def __init__(self, response: Any) -> None:
        self.status = response.code
        self.headers = response.headers
        self.comments: list[str] = []
        self.raw = b""
        self._body = Body()
        response.deliverBody(self._body)

    def close(self) -> None:
        """Hang up at once."""
        self._body.transport.loseConnection()  # type: ignore[union-attr]

    def pause(self) -> None:
        """Stop reading from the socket."""
        self._body.transport.pauseProducing()  # type: ignore[union-attr]

    def resume(self) -> None:
        """Read on."""
        self._body.transport.resumeProducing()  # type: ignore[union-attr]

    async def chunks(self) -> AsyncIterator[bytes]:
        """The raw body. Raises if the connection breaks before its end."""
        while True:
            chunk = await self._body.chunks.get()
            if isinstance(chunk, (ResponseDone, PotentialDataLoss)):
                return
            if isinstance(chunk, BaseException):
                raise chunk
            self.raw += chunk if len(self.raw) < 1_000_000 else b""
            yield chunk

    async def __aiter__(self) -> AsyncIterator[Event]:
        pending = b""
        async for chunk in self.chunks():
            *blocks, pending = (pending + chunk).split(b"\n\n")
            for block in blocks:
                fields: dict[str, str] = {}
                for line in block.decode("ascii").split("\n"):
                    name, _, value = line.partition(":")
                    if name:
                        assert name not in fields, block
                        fields[name] = value.removeprefix(" ")
                    else:
                        self.comments.append(value)
                if fields:
                    yield Event(fields["event"], json.loads(fields["data"]), fields.get("id"))
        assert pending == b"", pending

    async def all(self) -> list[Event]:
        """Every event until the end."""
        return [event async for event in self]


class Api:
    """Calls the API at ``url`` with the bearer token ``secret``. Each call has a connection of its own."""

    def __init__(self, url: str, secret: str | None) -> None:
        self.url = url
        self.headers = {} if secret is None else {"Authorization": f"Bearer {secret}"}
        self._http = treq.client.HTTPClient(Agent(reactor))

    def request(self, method: str, path: str, data: Any = None, headers: dict[str, str] | None = None) -> Deferred[Any]:
        """A treq response, its body unread. ``data`` is sent as JSON unless it is bytes."""
        body = data if data is None or isinstance(data, bytes) else json.dumps(data).encode()
        all_headers = Headers({name: [value] for name, value in {**self.headers, **(headers or {})}.items()})
        return self._http.request(method, self.url + path, data=body, headers=all_headers, unbuffered=True)

    async def call(self, method: str, path: str, data: Any = None, headers: dict[str, str] | None = None) -> Response:
        """A response with its body."""
        response = await self.request(method, path, data, headers)
        return Response(response.code, response.headers, await response.content())

    async def post(self, path: str, data: Any = None, headers: dict[str, str] | None = None) -> Response:
        return await self.call("POST", path, {} if data is None else data, headers)

    async def get(self, path: str, headers: dict[str, str] | None = None) -> Response:
        return await self.call("GET", path, None, headers)

    async def run(self, cmd: str, **fields: Any) -> Any:
        """The JSON of a ``/run`` that was accepted."""
        response = await self.post("/run", {"cmd": cmd, **fields})
        assert response.status == 200, response
        return response.json()

    async def start(self, cmd: str, **fields: Any) -> str:
        """The id of a new background process."""
        response = await self.post("/start_process", {"cmd": cmd, **fields})
        assert response.status == 201, response
        return response.json()["id"]

    async def process(self, id: str) -> Any:
        """What ``/list_processes`` says of a process."""
        processes = (await self.get("/list_processes")).json()["processes"]
        (found,) = [process for process in processes if process["id"] == id]
        return found

    async def stream(self, cmd: str, **fields: Any) -> Events:
        """An open ``/run_streaming``."""
        return Events(await self.request("POST", "/run_streaming", {"cmd": cmd, **fields}))

    async def logs(self, id: str, query: str = "", headers: dict[str, str] | None = None) -> Events:
        """An open ``/process_logs_streaming``."""
        return Events(await self.request("GET", f"/process_logs_streaming?id={id}{query}", headers=headers))


__all__ = ["Api", "ConnectionDone", "Event", "Events", "Response"]
