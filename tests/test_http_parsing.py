"""Where a request ends, and what is none: one table of verdicts."""

from __future__ import annotations

import pytest

from tests.daemon import Daemon
from tests.http_cases import CASES, SENTINEL, SENTINEL_ID, Case
from tests.http_client import exchange


def test_the_names_of_the_cases_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


def verdict(daemon: Daemon, *pieces: bytes, head: bool = False) -> str:
    """The verdict on a message that is sent in pieces, with the sentinel behind it."""
    answers = exchange(daemon.port, *pieces, until=SENTINEL_ID, head=head)
    found = [answer for answer in answers if answer.id == SENTINEL_ID]
    assert all(answer.headers.get("content-type") == "application/json" for answer in answers if answer.status != 100)
    statuses = [str(answer.status) for answer in answers if answer not in found]
    return " ".join([*statuses, "open" if found else "closed"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_message_gets_its_verdict(daemon: Daemon, case: Case) -> None:
    assert verdict(daemon, case.data + SENTINEL, head=case.data.startswith(b"HEAD")) == case.verdict
