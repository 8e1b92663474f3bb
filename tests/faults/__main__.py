"""The command line: probe a server for all faults, and print a table."""

from __future__ import annotations

import argparse
import http.client
import os
import queue
import sys
import threading
import time
from typing import NamedTuple

from tests.faults.probes import FAULTS, Fault
from tests.faults.server import Failed, NotApplicable, Server

#: Seconds that a server gets to come back after a fault has ended it.
RESTART = 10


class Result(NamedTuple):
    """What a probe has found."""

    verdict: str
    reason: str


def probe(fault: Fault, server: Server) -> Result:
    """Probe for one fault, in bounded time."""
    found: queue.Queue[Result] = queue.Queue()

    def work() -> None:
        try:
            folder = server.run("mktemp -d")["stdout"].strip()
            try:
                found.put(Result("pass", fault.probe(server, folder) or ""))
            finally:
                server.run(f"rm -rf {folder}")
        except Failed as error:
            found.put(Result("FAIL", str(error)))
        except NotApplicable as error:
            found.put(Result("n-a", str(error)))
        except TimeoutError:
            found.put(Result("FAIL", "no answer"))
        except (OSError, http.client.HTTPException) as error:
            found.put(Result("FAIL", f"the connection broke: {error!r}"))
        except Exception as error:
            found.put(Result("FAIL", f"not what the contract says: {error!r}"))

    threading.Thread(target=work, daemon=True).start()
    try:
        result = found.get(timeout=fault.limit)
    except queue.Empty:
        result = Result("FAIL", f"no answer within {fault.limit:.0f} s")
    if not server.healthy():
        result = Result("FAIL", f"the server is gone ({result.reason})")
    return result


def comes_back(server: Server) -> bool:
    """Whether the server answers, at once or after its supervisor has started it again."""
    deadline = time.monotonic() + RESTART
    while not server.healthy():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def main() -> int:
    """Probe for all faults; return 1 if the server has any."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:3030", help="of the server (default: %(default)s)")
    parser.add_argument("--secret", default=os.environ.get("SANDBOX_SECRET"), help="default: $SANDBOX_SECRET")
    parser.add_argument("--proxy-port", type=int, help="where the server's proxy listens; its binding is changed")
    parser.add_argument("--full-disk", metavar="DIR", help="a directory of the server's, its file system almost full")
    parser.add_argument("--only", action="append", metavar="NAME", help="probe for this fault; may be repeated")
    parser.add_argument("--list", action="store_true", help="list the faults, and what users complain about")
    options = parser.parse_args()
    names = [fault.name for fault in FAULTS]
    width = max(map(len, names))
    if options.list:
        for fault in FAULTS:
            write(f"{fault.name:{width}}  {fault.complaint}")
        return 0
    if not options.secret:
        parser.error("--secret is missing, and SANDBOX_SECRET is not set")
    if unknown := set(options.only or ()) - set(names):
        parser.error(f"no such fault: {', '.join(sorted(unknown))}")
    try:
        server = Server(options.url, options.secret, options.proxy_port, options.full_disk)
    except ValueError as error:
        parser.error(str(error))
    if not server.healthy():
        write(f"{options.url} does not answer GET /health")
        return 2
    results: dict[str, Result] = {}
    for fault in FAULTS:
        if options.only and fault.name not in options.only:
            continue
        there = comes_back(server)
        results[fault.name] = probe(fault, server) if there else Result("n-a", "the server is gone")
        write(f"... {fault.name}", sys.stderr)
    write(f"{'fault':{width}}  result  reason")
    for name, result in results.items():
        reason = " ".join(result.reason.split())
        write(f"{name:{width}}  {result.verdict:6}  {reason[:150]}".rstrip())
    verdicts = [result.verdict for result in results.values()]
    write(", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in ("pass", "FAIL", "n-a")))
    return int("FAIL" in verdicts)


def write(line: str, to: object = None) -> None:
    """Print a line."""
    file = sys.stdout if to is None else sys.stderr
    file.write(f"{line}\n")
    file.flush()


if __name__ == "__main__":
    sys.exit(main())
