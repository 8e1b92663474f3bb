"""Bearer tokens (RFC 6750): check a request's, claim the daemon with one, reload them."""

from __future__ import annotations

import binascii
import hmac
from base64 import urlsafe_b64decode
from collections.abc import Iterable, Sequence
from hashlib import sha256
from urllib.parse import urlsplit

from twisted.internet.defer import DeferredLock
from twisted.logger import Logger

from sandboxd.reactor.threads import ThreadPool
from sandboxd.web.tokens import MAX_TOKEN, Credentials, read_tokens, store_token, stored_tokens

#: Characters below which the log says that a token is short.
SHORT = 16


def bearer_token(header: bytes | None) -> bytes | None:
    """
    Return the token of an ``Authorization`` header, or None.

    :param header: its value, or None if there is none.
    """
    scheme, _, token = (header or b"").strip().partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else None


#: In place of ``Authorization``, where a reverse proxy on the way keeps that for itself. A page of another host cannot
#: set it either without a CORS preflight, which is not answered. (``X-Sandbox-*`` are the agent-sandbox router's.)
OWN_AUTHORIZATION = b"X-Sandboxd-Authorization"

#: Kubernetes' subprotocol by which a browser, that cannot set ``Authorization``, sends a token to a WebSocket: followed
#: by the token in base64url without padding.
BEARER_PROTOCOL = "base64url.bearer.authorization.k8s.io."


def subprotocol_authorization(values: Sequence[bytes]) -> bytes | None:
    """
    Return the ``Authorization`` that a WebSocket's subprotocol carries, or None.

    :param values: the values of the header ``Sec-WebSocket-Protocol``.
    """
    for name in b",".join(values).decode("latin-1").split(","):
        name = name.strip()
        if name.startswith(BEARER_PROTOCOL):
            encoded = name.removeprefix(BEARER_PROTOCOL)
            try:
                token = urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))
            except (binascii.Error, ValueError):
                return b""
            return b"Bearer " + token
    return None


def same_origin(origin: bytes, host: bytes) -> bool:
    """
    Return whether an ``Origin`` (RFC 6454) names the host and port of a ``Host`` header.

    :param origin: such as ``https://example.org``; ``null`` is no host's.
    """
    try:
        page = urlsplit(origin.decode("ascii").lower())
        here = urlsplit(f"{page.scheme}://{host.decode('ascii').lower()}")
        default = {"http": 80, "https": 443}.get(page.scheme)
        return bool(page.hostname) and (page.hostname, page.port or default) == (here.hostname, here.port or default)
    except ValueError:
        return False


class BearerAuth:
    """
    A check of ``Authorization`` headers against a set of tokens.

    :param tokens: the accepted tokens. Only their digests are kept.
    """

    def __init__(self, *tokens: str) -> None:
        self.replace(tokens)

    def replace(self, tokens: Iterable[str]) -> None:
        """Accept these tokens from now on, and no others."""
        self._digests = [sha256(token.encode("utf-8")).digest() for token in tokens]

    def allows(self, header: bytes | None) -> bool:
        """
        Return whether a header has one of the tokens, in a time that depends neither on which nor on how much is right.

        :param header: the value of ``Authorization``, or None if there is none.
        """
        digest = sha256(bearer_token(header) or b"").digest()
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(digest, known)
        return found


class DaemonAuth(BearerAuth):
    """
    The check of the daemon's tokens, which a claim or a reload can replace while it runs.

    :param credentials: the tokens at the start, and where they come from.
    :param threads: calls a blocking function in a thread.
    :ivar unclaimed: whether the first token that is sent claims the daemon.
    """

    _log = Logger()

    def __init__(self, credentials: Credentials, threads: ThreadPool) -> None:
        super().__init__(*credentials.tokens)
        self._path = credentials.path
        self._threads = threads
        self._claiming = DeferredLock()
        self.unclaimed = credentials.pool and not credentials.tokens

    def may_claim(self, header: bytes | None) -> bool:
        """Return whether a header has a token that can claim the daemon: visible ASCII, at most 4096 characters."""
        token = (bearer_token(header) if self.unclaimed else None) or b""
        return 0 < len(token) <= MAX_TOKEN and all(0x21 <= byte <= 0x7E for byte in token)

    async def claim(self, header: bytes | None) -> bool:
        """
        Store the token of a header and accept it from now on, unless another was accepted before.

        :return: whether it is accepted.
        :raise OSError: if it could not be stored; then nothing was claimed.
        :raise BadTokens: if the file that it is stored in appeared meanwhile and holds no valid token.
        """
        assert self._path is not None
        await self._claiming.acquire()
        try:
            if self.unclaimed:
                token = (bearer_token(header) or b"").decode("ascii")
                if await self._threads(store_token, self._path, token):
                    self.replace([token])
                    self._log.info("claimed; the token is stored in {path}", path=self._path)
                    if len(token) < SHORT:
                        self._log.warn("the token that claimed the daemon is short and could be guessed")
                else:
                    self.replace(await self._threads(read_tokens, self._path))
                    self._log.info("claimed by the token that was put into {path}", path=self._path)
                self.unclaimed = False
        finally:
            self._claiming.release()
        return self.allows(header)

    async def reload(self) -> None:
        """
        Read the tokens again if they come from a file.

        :raise BadTokens: if it cannot be read, holds no token, or holds an invalid one; then none is replaced.
        """
        if self._path is None:
            return
        await self._claiming.acquire()
        try:
            tokens = await self._threads(stored_tokens if self.unclaimed else read_tokens, self._path)
            if tokens:
                self.replace(tokens)
                self.unclaimed = False
        finally:
            self._claiming.release()
