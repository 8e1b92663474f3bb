"""Tests of the client library: both faces, against the real daemon over real sockets."""
