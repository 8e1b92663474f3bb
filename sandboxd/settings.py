"""The daemon's limits as one value, which :mod:`sandboxd.options` makes and the other packages read."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1024 * 1024


@dataclass(frozen=True)
class Settings:
    """
    The daemon's limits. Each is an option of ``twistd sandboxd`` and a variable of its environment.

    :ivar max_executions: commands that may run at a time.
    :ivar max_streams: event streams that may be open at a time.
    :ivar max_body: bytes of a request's body.
    :ivar max_upload: bytes of a body that is read as it arrives; None for any number.
    :ivar max_header: bytes of a request's headers.
    :ivar request_timeout: seconds in which a request must have arrived; for a body that is read as it arrives, seconds
        in which some more must have.
    :ivar keep_alive: seconds that an HTTP connection stays open between two requests; more than common load balancers
        keep theirs, lest one sends a request on a connection that is just being closed.
    :ivar drain: seconds in which foreground commands may end by themselves when the daemon stops.
    :ivar heartbeat: seconds of silence after which an event stream gets a comment.
    :ivar keep_finished: how many executions are remembered after their end (background processes and others each),
        and how many more that have left processes behind which run.
    :ivar keep_seconds: for how long.
    :ivar max_watches: directories or trees that may be watched at a time.
    :ivar watch_linger: seconds for which a watch stays open without a client, so that one cut off can continue.
    """

    max_executions: int = 4096
    max_streams: int = 1024
    max_body: int = 128 * MIB
    max_upload: int | None = None
    max_header: int = 16 * 1024
    request_timeout: int = 300
    keep_alive: int = 620
    drain: int = 2
    heartbeat: int = 15
    keep_finished: int = 1000
    keep_seconds: int = 24 * 3600
    max_watches: int = 64
    watch_linger: int = 60
