"""``python -m benchmarks``: the command line."""

from __future__ import annotations

import argparse
import json
import os
import resource
import secrets
import sys
import tempfile
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from benchmarks import chart, history, processes, table
from benchmarks import rows as _rows  # noqa: F401  # registers them
from benchmarks.client import Failed
from benchmarks.measure import BENCHES, FULL, QUICK
from benchmarks.runner import Result, run
from benchmarks.server import Target
from sandboxd import __version__


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure the daemon: it is started here for each measurement, or runs at --url.",
        epilog="A command gets SANDBOX_SECRET, PORT and PROXY_PORT in its environment; it is started for each row.",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--url", help="a server that runs on this machine, such as http://127.0.0.1:3030")
    where.add_argument("--command", help="what starts the server (default: twistd of this environment)")
    parser.add_argument("--secret", help="its bearer token (default: SANDBOX_SECRET, or a random one)")
    parser.add_argument("--proxy-port", type=int, default=3031, help="of the server at --url (default: %(default)s)")
    parser.add_argument("--pid", type=int, help="of the server at --url; without it, memory and cpu are not measured")
    peer = parser.add_mutually_exclusive_group()
    peer.add_argument("--peer-url", help="a second server of the same contract, measured in turn with the first")
    peer.add_argument("--peer-command", help="what starts it")
    parser.add_argument("--peer-secret", help="its bearer token (default: that of the first)")
    parser.add_argument("--peer-proxy-port", type=int, default=3031, help="of the server at --peer-url")
    parser.add_argument("--peer-pid", type=int, help="of the server at --peer-url")
    parser.add_argument("--names", nargs=2, default=["sandboxd", "peer"], help="what the table calls them")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="names or patterns of rows, such as 'run-*'")
    parser.add_argument("--list", action="store_true", help="list the names of all rows, and do nothing else")
    parser.add_argument("--quick", action="store_true", help="do little, once: to see that it works, not how fast")
    parser.add_argument("--repeat", type=int, help="measurements of each row (default: 5, with --quick 1)")
    parser.add_argument("--folder", type=Path, help="where to put files (default: that of tempfile)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured there")
    parser.add_argument("--chart", type=Path, metavar="FOLDER", help="draw the table's ratios there, as SVG")
    parser.add_argument(
        "--history", type=Path, metavar="FOLDER", help="keep a file of this version there, and name rows that got worse"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 0 if the server has failed no row and lost no line."""
    chosen = options(arguments)
    wanted = chosen.only or ["*"]
    benches = [
        bench for bench in BENCHES if any(fnmatchcase(row.name, pattern) for row in bench.rows for pattern in wanted)
    ]
    if chosen.list:
        print(*(f"{row.name:20} {row.title.strip()}, {row.unit}" for bench in benches for row in bench.rows), sep="\n")
        return 0
    unknown = [
        pattern for pattern in wanted if not any(fnmatchcase(row.name, pattern) for b in BENCHES for row in b.rows)
    ]
    if unknown:
        print(f"no such row: {', '.join(unknown)}; --list names them", file=sys.stderr)
        return 2
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    secret = chosen.secret or os.environ.get("SANDBOX_SECRET") or secrets.token_urlsafe(24)
    targets = [Target(chosen.names[0], chosen.url, chosen.command, secret, chosen.proxy_port, chosen.pid)]
    if chosen.peer_url or chosen.peer_command:
        peer_secret = chosen.peer_secret or secret
        targets.append(
            Target(
                chosen.names[1],
                chosen.peer_url,
                chosen.peer_command,
                peer_secret,
                chosen.peer_proxy_port,
                chosen.peer_pid,
            )
        )
    scale = QUICK if chosen.quick else FULL
    repeat = chosen.repeat or (1 if chosen.quick else 5)
    results: list[Result] = []
    others = processes.Others()
    with tempfile.TemporaryDirectory(prefix="benchmarks-", dir=chosen.folder) as folder:
        for target in targets:
            try:
                target.open(Path(folder)).stop()
            except (Failed, OSError) as error:
                print(f"{target.name}: {error}", file=sys.stderr)
                return 1
        for bench in benches:
            results += run(bench, targets, scale, repeat, Path(folder), say)
    say("")
    names = [target.name for target in targets]
    busy = others.cores()
    print(*table.lines(results, names), sep="\n")
    print(f"Other processes used {busy:.1f} of the machine's {os.cpu_count()} cores meanwhile.")
    document = table.document(results, names) | {"repeat": repeat, "quick": chosen.quick, "other_cpu": busy}
    if chosen.json:
        chosen.json.write_text(json.dumps(document, indent=2) + "\n")
    if chosen.chart:
        chart.write(document, chosen.chart)
    if chosen.history:
        print(*history.record(document, __version__, chosen.history), sep="\n")
    lost = [result for result in results if result.row.name.endswith("-lost") and any(result.values(0))]
    failed = [result for result in results if result.series[0].failed and not result.series[0].absent]
    return int(bool(lost or failed))


def say(text: str) -> None:
    """Show what is being measured, where somebody looks."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
