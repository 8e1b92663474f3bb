"""The header ``Prefer``, RFC 7240."""

from __future__ import annotations


def prefers_strict(header: str | None) -> bool:
    """
    Return whether a client prefers ``handling=strict``. If it states a preference twice, the first counts.

    :param header: all values of ``Prefer``, joined by commas; or None.
    """
    if header is None:
        return False
    for preference in header.split(","):
        name, _, value = preference.partition(";")[0].partition("=")
        if name.strip().lower() == "handling":
            return value.strip().strip('"').lower() == "strict"
    return False
