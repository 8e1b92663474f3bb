"""
Route ``POST /mcp``: the streamable HTTP transport of the Model Context Protocol, without sessions.

The rules are those of https://modelcontextprotocol.io/specification/2025-11-25/basic/transports.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Sequence
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

import msgspec
from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger

from sandboxd import __version__
from sandboxd.api.routing import ApiError, Reply, Routes, exhausted
from sandboxd.files.errors import EXHAUSTED, FileError
from sandboxd.mcp.protocol import (
    INTERNAL_ERROR,
    INVALID_PARAMS,
    INVALID_REQUEST,
    METHOD_NOT_FOUND,
    UNNAMED_VERSION,
    VERSIONS,
    Message,
    RpcError,
    RpcNotification,
    RpcReply,
    RpcRequest,
    decode,
    negotiated,
    notification,
    result,
)
from sandboxd.mcp.tool import Progress, Tool, ToolError
from sandboxd.messages.decoding import BadRequest
from sandboxd.web.ascii_json import dumps
from sandboxd.web.auth import same_origin
from sandboxd.web.request import Request
from sandboxd.web.sse import EventStream, Streams

_log = Logger()

#: Bytes of a message: more would take the reactor too long to decode.
MAX_MESSAGE = 16 * 1024 * 1024

#: Sent to the model at the beginning.
INSTRUCTIONS = (
    "A Linux sandbox. Commands run as in a shell; files and processes persist between calls until the sandbox ends."
)


class McpServer:
    """
    The server of MCP messages.

    :param tools: what is offered.
    """

    def __init__(self, tools: Sequence[Tool]) -> None:
        self._tools = {tool.name: tool for tool in tools}
        self._in_flight: dict[str | int, list[Deferred[Any]]] = {}
        self._cancelled: set[Deferred[Any]] = set()

    @cached_property
    def _listed(self) -> list[dict[str, object]]:
        """The reply to ``tools/list``; not made before it is asked for, as that is a twentieth of a start."""
        return [tool.listed() for tool in self._tools.values()]

    async def answer(self, request: RpcRequest, progress: Progress | None) -> dict[str, object]:
        """Answer a request; errors of any kind are answers too."""
        try:
            return result(request.id, await self._dispatch(request, progress))
        except RpcError as error:
            return error.reply(request.id)
        except CancelledError:
            raise
        except Exception:
            _log.failure("MCP request {method} failed", method=request.method[:100])
            return RpcError(INTERNAL_ERROR, "internal error; the daemon's log has the details").reply(request.id)

    def notified(self, message: RpcNotification) -> None:
        """Handle a notification. A cancelled request ends, if only one has that id."""
        if message.method == "notifications/cancelled":
            id = message.params.get("requestId")
            calls = self._in_flight.get(id, []) if isinstance(id, (str, int)) and id is not True else []
            if len(calls) == 1:
                self._cancelled.add(calls[0])
                calls[0].cancel()

    async def _dispatch(self, request: RpcRequest, progress: Progress | None) -> object:
        params = request.params
        if request.method == "initialize":
            return {
                "protocolVersion": negotiated(params.get("protocolVersion")),
                "capabilities": {"tools": {"listChanged": False}},
                "serverInfo": {"name": "sandboxd", "title": "sandboxd", "version": __version__},
                "instructions": INSTRUCTIONS,
            }
        if request.method == "ping":
            return {}
        if request.method == "tools/list":
            return {"tools": self._listed}
        if request.method == "tools/call":
            return await self._call(request.id, params, progress)
        raise RpcError(METHOD_NOT_FOUND, f"there is no method {request.method!r}")

    async def _call(self, id: str | int, params: dict[str, Any], progress: Progress | None) -> object:
        name = params.get("name")
        tool = self._tools.get(name) if isinstance(name, str) else None
        if tool is None:
            raise RpcError(INVALID_PARAMS, f"name: there is no tool {name!r}; tools/list has those that there are")
        try:
            arguments = msgspec.convert(params.get("arguments") or {}, tool.arguments)
        except msgspec.ValidationError as error:
            return _error(str(error).replace("$.", "").replace("`$`", "the arguments"))
        call: Deferred[msgspec.Struct] = Deferred.fromCoroutine(_awaited(tool.call(arguments, progress)))
        calls = self._in_flight.setdefault(id, [])
        calls.append(call)
        try:
            found = await call
        except (ToolError, BadRequest, FileError, ApiError) as error:
            return _error(str(error))
        except OSError as error:
            if error.errno not in EXHAUSTED:
                raise
            return _error(str(exhausted(error)))
        except CancelledError:
            if call in self._cancelled:  # by a notification: the client is still there, and its request has to end
                raise RpcError(INVALID_REQUEST, "the call was cancelled") from None
            raise
        finally:
            self._cancelled.discard(call)
            calls.remove(call)
            if not calls:
                self._in_flight.pop(id, None)
        return {
            "content": [{"type": "text", "text": tool.text(found)}],
            "structuredContent": msgspec.to_builtins(found),
            "isError": False,
        }


async def _awaited(awaitable: Awaitable[msgspec.Struct]) -> msgspec.Struct:
    return await awaitable


def _error(text: str) -> dict[str, object]:
    return {"content": [{"type": "text", "text": text}], "isError": True}


def is_own_origin(origin: str, host: str) -> bool:
    """
    Return whether a page's origin is the daemon's own, under a host name that no attacker can point at it.

    With DNS rebinding a page's own name leads to the daemon, so that ``Origin`` and ``Host`` agree; then only addresses
    and ``localhost`` can be trusted.
    """
    if not same_origin(origin.encode("utf-8"), host.encode("utf-8")):
        return False
    name = urlsplit(f"//{host}").hostname or ""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class _ProgressStream:
    """A response as an event stream: progress first, the result last."""

    def __init__(self, request: Request, streams: Streams, token: object) -> None:
        self._stream: EventStream = streams.open(request)
        self._token = token
        self._count = 0

    async def progress(self, text: str) -> None:
        """Send some output. Waits for the client to take it."""
        self._count += 1
        params = {"progressToken": self._token, "progress": self._count, "message": text}
        self._send(notification("notifications/progress", params))
        await self._stream.when_ready()

    def _send(self, message: dict[str, object]) -> None:
        self._stream.write(b"event: message\ndata: %s\n\n" % dumps(message))

    def finish(self, message: dict[str, object] | None) -> None:
        """Send the result, if there is one, and end."""
        if message is not None:
            self._send(message)
        self._stream.finish()


def _version(request: Request) -> str:
    """
    Return the revision of a request.

    :raise RpcError: if the revision is not supported.
    """
    version = request.text_header(b"MCP-Protocol-Version")
    if version is None:
        return UNNAMED_VERSION
    if version not in VERSIONS:
        raise RpcError(INVALID_REQUEST, f"MCP-Protocol-Version: {version!r} is not spoken, {', '.join(VERSIONS)} are")
    return version


def _progress_token(messages: Sequence[Message]) -> object:
    """Return the token with which a single call asks for its progress, or None."""
    if len(messages) != 1 or not isinstance(messages[0], RpcRequest) or messages[0].method != "tools/call":
        return None
    meta = messages[0].params.get("_meta")
    token = meta.get("progressToken") if isinstance(meta, dict) else None
    return token if isinstance(token, (str, int)) and not isinstance(token, bool) else None


def add_mcp_route(routes: Routes, server: McpServer, streams: Streams) -> None:
    """Add ``POST /mcp`` to the API."""

    @routes.post("/mcp", bytes, reply=RpcReply, errors=(400, 403, 406, 413))
    async def mcp(request: Request, body: bytes) -> Reply | None:
        """
        Serve the Model Context Protocol, for agents: JSON-RPC messages, answered as JSON or, with progress, as events.

        Tools run commands, keep background processes, and read, write, edit and search files.
        """
        origin = request.text_header(b"Origin")
        if origin is not None and not is_own_origin(origin, request.text_header(b"Host") or ""):
            raise ApiError(403, f"Origin: {origin} is not this daemon")
        accept = request.text_header(b"Accept") or "*/*"
        events = "text/event-stream" in accept or "*/*" in accept
        if not events and "application/json" not in accept:
            raise ApiError(406, "Accept: must have application/json and text/event-stream")
        if len(body) > MAX_MESSAGE:
            raise ApiError(413, f"the message is over the limit of {MAX_MESSAGE} bytes; send large files in parts")
        try:
            messages, batch = decode(body, _version(request))
        except RpcError as error:
            return Reply(error.reply(), 400)
        for message in messages:
            if isinstance(message, RpcNotification):
                server.notified(message)
        asked = [message for message in messages if isinstance(message, RpcRequest)]
        if not asked:
            request.setResponseCode(202)
            request.setHeader(b"Content-Length", b"0")
            return None
        token = _progress_token(messages)
        if token is not None and events and not streams.full:
            stream = _ProgressStream(request, streams, token)
            answer = None
            try:
                answer = await server.answer(asked[0], stream.progress)
            finally:
                stream.finish(answer)
            return None
        answers = [await server.answer(message, None) for message in asked]
        if not batch:
            return Reply(answers[0])
        body_of_batch = dumps(answers)
        request.setHeader(b"Content-Type", b"application/json")
        request.setHeader(b"Content-Length", b"%d" % len(body_of_batch))
        request.write(body_of_batch)
        return None
