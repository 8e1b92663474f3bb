"""Routes of ``/ports``: list the listening TCP ports of the sandbox, and wait for one."""

from __future__ import annotations

from sandboxd.api.probe import HttpProbe
from sandboxd.api.routing import Routes, changing_nothing
from sandboxd.execution.table import ProcessTable
from sandboxd.messages.listeners import ListeningPort, ListeningPorts, PortWaited, PortWaitRequest
from sandboxd.processes.listeners import Listener, ListenerPoll, listeners, owners
from sandboxd.processes.marks import mark_of
from sandboxd.proxy.portforward import PortForward
from sandboxd.reactor.interfaces import Reactor
from sandboxd.reactor.threads import ThreadPool
from sandboxd.reactor.timeout import within
from sandboxd.web.request import Request


def _held() -> dict[Listener, tuple[int, int] | None]:
    """
    Return the listening sockets, each with the lowest pid that holds it and that process's mark, if they can be seen.
    Blocks.
    """
    found = listeners()
    pids = owners({each.inode for each in found})
    lowest = {each: min(pids[each.inode]) for each in found if each.inode in pids}
    return {each: (lowest[each], mark_of(lowest[each])) if each in lowest else None for each in found}


async def when_listening(poll: ListenerPoll, port: int) -> None:
    """Wait until a process listens on a port."""
    while all(each.port != port for each in await poll.when_looked()):
        pass


def add_listener_routes(
    routes: Routes,
    reactor: Reactor,
    table: ProcessTable,
    forward: PortForward,
    poll: ListenerPoll,
    probe: HttpProbe,
    blocking: ThreadPool,
    own_ports: frozenset[int],
) -> None:
    """
    Add ``GET /ports`` and ``POST /ports/wait`` to the API.

    :param blocking: runs a blocking function off the reactor's thread.
    :param own_ports: the ports that the daemon listens on.
    """

    @routes.get("/ports", reply=ListeningPorts)
    async def ports(request: Request) -> ListeningPorts:
        """List the TCP ports that processes of the sandbox listen on, sorted, without the daemon's own."""
        executions = table.by_mark()
        found: dict[int, ListeningPort] = {}
        for listener, holder in sorted((await blocking(_held)).items()):
            if listener.port in own_ports:
                continue
            bound = listener.port == forward.port
            port = found.setdefault(listener.port, ListeningPort(listener.port, [], None, None, bound))
            port.addresses = sorted({*port.addresses, listener.address})
            if holder is not None and port.execution is None:
                execution = executions.get(holder[1])
                if execution is not None or port.pid is None:
                    port.pid = holder[0]
                    port.execution = None if execution is None else execution.id
        return ListeningPorts(list(found.values()))

    @routes.post("/ports/wait", PortWaitRequest, reply=PortWaited)
    async def wait(request: Request, body: PortWaitRequest) -> PortWaited:
        """
        Wait until a process listens on a port or, with `http`, answers a `GET` of that path with 2xx or 3xx.

        Also answers, with `"ready": false`, when `timeout` seconds have passed.
        """
        ready = when_listening(poll, body.port) if body.http is None else probe.when_answered(body.port, body.http)
        with changing_nothing():
            if not await within(reactor, body.timeout, ready):
                return PortWaited(False, "timeout")
        return PortWaited(True, "port" if body.http is None else "http")
