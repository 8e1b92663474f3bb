"""The environment that a child gets."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd.processes.command import Command, User
from sandboxd.processes.environment import PRIVATE, Environment

NAMES = ["PATH", "A", "LANG", "LC_ALL", "LC_CTYPE", *sorted(PRIVATE)]
VARIABLES = st.dictionaries(st.sampled_from(NAMES), st.text(st.characters(exclude_characters="\0", codec="utf-8")))


def merged(environ: dict[str, str], extra: dict[str, str], user: User | None = None) -> dict[str, str]:
    """The environment of a child whose caller gives ``extra``."""
    child = Environment(environ).merged(Command("", env=extra, user=user))
    return dict(os.fsdecode(entry).split("=", 1) for entry in child.split(b"\0"))


def messages_locale(environ: dict[str, str]) -> str:
    """The locale of messages, as POSIX has it: the first of these that is not empty."""
    return environ.get("LC_ALL") or environ.get("LC_MESSAGES") or environ.get("LANG") or "C"


def character_locale(environ: dict[str, str]) -> str:
    """The locale of the encoding, likewise."""
    return environ.get("LC_ALL") or environ.get("LC_CTYPE") or environ.get("LANG") or "C"


@given(VARIABLES)
def test_a_child_does_not_get_the_daemons_secrets(environ: dict[str, str]) -> None:
    assert PRIVATE.isdisjoint(merged(environ, {}))


def test_the_secret_is_private() -> None:
    assert "SANDBOX_SECRET" in PRIVATE


@given(VARIABLES, VARIABLES)
@pytest.mark.slow
def test_what_the_caller_gives_wins(environ: dict[str, str], extra: dict[str, str]) -> None:
    child = merged(environ, extra)
    assert {name: child[name] for name in extra} == extra


def test_the_daemons_own_is_the_base() -> None:
    child = merged({"PATH": "/bin", "A": "1"}, {"A": "2", "B": "3"})
    assert (child["PATH"], child["A"], child["B"]) == ("/bin", "2", "3")


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"LANG": "de_DE.UTF-8"},
        {"LC_ALL": "de_DE.UTF-8"},
        {"LC_MESSAGES": "de_DE.UTF-8", "LANG": "C.UTF-8"},
        {"LC_ALL": "de_DE.UTF-8", "LANG": "fr_FR.ISO-8859-1", "LC_CTYPE": "C"},
        {"LC_ALL": "", "LANG": "de_DE.UTF-8"},
        {"LC_ALL": "", "LC_CTYPE": "C.UTF-8"},
    ],
)
def test_messages_are_english_and_the_encoding_is_kept(environ: dict[str, str]) -> None:
    child = merged({**environ, "LANGUAGE": "de"}, {"A": "b"})
    assert messages_locale(child) == "C"
    assert "LANGUAGE" not in child
    assert character_locale(child) == character_locale(environ)


@pytest.mark.parametrize("name", ["LANG", "LANGUAGE", "LC_ALL", "LC_MESSAGES"])
def test_a_caller_that_sets_a_locale_gets_it(name: str) -> None:
    environ = {"LANG": "en_US.UTF-8", "LANGUAGE": "en"}
    assert merged(environ, {name: "de_DE.UTF-8"}) == {**environ, name: "de_DE.UTF-8"}


def test_a_variable_with_a_nul_is_refused() -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        merged({}, {"A": "1\0B=2"})


def test_a_command_of_another_user_gets_that_users_login_variables() -> None:
    user = User("agent", 1000, 1000, (1000,), "/home/agent")
    child = merged({"HOME": "/root", "USER": "root"}, {"USER": "given"}, user)
    assert (child["HOME"], child["LOGNAME"], child["USER"]) == ("/home/agent", "agent", "given")
