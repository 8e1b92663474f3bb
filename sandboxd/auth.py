"""Who may call: whoever has the secret, as a bearer token (RFC 6750)."""

from __future__ import annotations

import hmac


class BearerAuth:
    """
    Checks ``Authorization`` headers.

    :param secret: the token that is accepted.
    """

    def __init__(self, secret: str) -> None:
        self._secret = secret.encode("utf-8")

    def allows(self, header: bytes | None) -> bool:
        """
        Whether a header's value has the token. Takes the same time however much of it is right.

        :param header: the value of ``Authorization``, or None if there is none.
        """
        scheme, _, token = (header or b"").strip().partition(b" ")
        return hmac.compare_digest(token.strip(), self._secret) and scheme.lower() == b"bearer"
