"""``Content-Digest`` and ``Want-Content-Digest`` (RFC 9530): digests of a body, checked or reported."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re

#: The algorithms that the RFC's registry has as active, and their names in :mod:`hashlib`.
_ALGORITHMS = {"sha-256": "sha256", "sha-512": "sha512"}

_MEMBER = re.compile(r"[ \t]*([a-z][a-z0-9_.*-]*)=:([A-Za-z0-9+/=]*):[ \t]*")
_WANTED = re.compile(r"(sha-256|sha-512)[ \t]*=[ \t]*([1-9]|10)\b")


class Digests:
    """
    The digests of a body, computed as it arrives.

    :param given: the value of ``Content-Digest``, or None.
    :param wanted: the value of ``Want-Content-Digest``, or None.
    :raise ValueError: if ``given`` is no list of digests, or has no supported algorithm.
    """

    def __init__(self, given: str | None, wanted: str | None = None) -> None:
        self._expected: dict[str, bytes] = {}
        if given is not None:
            self._expected = _parse(given)
        names = {*self._expected, *(name for name, _ in _WANTED.findall(wanted or ""))}
        self._sums = {name: hashlib.new(_ALGORITHMS[name]) for name in sorted(names)}

    @property
    def any(self) -> bool:
        """Whether there is one to be made."""
        return bool(self._sums)

    def update(self, data: bytes) -> None:
        """Add more of the body."""
        for digest in self._sums.values():
            digest.update(data)

    def mismatch(self) -> str | None:
        """Return which digest differs from the expected one, once the whole body was added; None if none does."""
        for name, expected in self._expected.items():
            if self._sums[name].digest() != expected:
                return (
                    f"Content-Digest: the {name} of what has arrived is another: {_member(self._sums[name].digest())}"
                )
        return None

    def header(self) -> str | None:
        """Return all digests as the value of ``Content-Digest``; None if there are none."""
        return ", ".join(f"{name}={_member(digest.digest())}" for name, digest in self._sums.items()) or None


def _member(digest: bytes) -> str:
    return f":{base64.b64encode(digest).decode('ascii')}:"


def _parse(text: str) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for member in text.split(","):
        parsed = _MEMBER.fullmatch(member)
        if parsed is None:
            raise ValueError(f"Content-Digest: {text!r} is not as in sha-256=:<base64>:")
        if parsed[1] not in _ALGORITHMS:
            continue
        try:
            found[parsed[1]] = base64.b64decode(parsed[2], validate=True)
        except binascii.Error:
            raise ValueError(f"Content-Digest: {parsed[2]!r} is not base64") from None
    if not found:
        raise ValueError("Content-Digest: give sha-256 or sha-512; no others are known here")
    return found
