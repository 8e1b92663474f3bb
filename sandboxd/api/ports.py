"""Routes ``/bind_port``, ``/unbind_port`` and ``/port_status``: the port that the TCP proxy forwards to."""

from __future__ import annotations

from collections.abc import Sequence

from sandboxd.api.routing import ApiError, Routes
from sandboxd.messages.daemon import BindPortRequest, Bound, PortStatus, UnbindPortRequest
from sandboxd.messages.decoding import BadRequest, DoneWithMessage
from sandboxd.proxy.portforward import PortForward
from sandboxd.web.request import Request


def add_port_routes(routes: Routes, forward: PortForward, proxy_ports: Sequence[int]) -> None:
    """
    Add the routes that set and show the target of the proxy to the API.

    :param proxy_ports: where the proxy listens; empty if only on Unix sockets. The first is the one that is shown.
    """

    @routes.post("/bind_port", BindPortRequest, success=True, reply=Bound, errors=(409,))
    async def bind_port(request: Request, body: BindPortRequest) -> Bound:
        """Forward new connections of the proxy to a port. Answers 409 if one is bound."""
        port = body.number()
        if port in proxy_ports:
            raise BadRequest(f"port: {port} is the proxy's own; it would forward to itself for ever")
        if forward.port is not None:
            raise ApiError(409, "Port already bound", current_port=str(forward.port))
        forward.bind(port)
        return Bound(True, "Port binding configured", str(port))

    @routes.post("/unbind_port", UnbindPortRequest, success=True, reply=DoneWithMessage, errors=(409,))
    async def unbind_port(request: Request, body: UnbindPortRequest) -> DoneWithMessage:
        """
        Forward no new connections.

        A ``port`` that is not the one that is bound is answered with 409, and nothing is changed.
        """
        port = body.number()
        if port is not None and forward.port is not None and port != forward.port:
            raise ApiError(409, f"port: {port} is not the one that is bound", current_port=str(forward.port))
        forward.unbind()
        return DoneWithMessage(True, "Port binding removed")

    @routes.get("/port_status", reply=PortStatus)
    async def port_status(request: Request) -> PortStatus:
        """Return the port that the proxy forwards to, if any."""
        bound = "" if forward.port is None else str(forward.port)
        return PortStatus(True, bound, str(proxy_ports[0] if proxy_ports else 0))
