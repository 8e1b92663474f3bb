"""Tests of the client library: the blocking and the asyncio client, against the real daemon over real sockets."""
