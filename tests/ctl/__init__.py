"""Tests of sandboxctl: the real program, in a real pseudo-terminal where it matters, against the real daemon."""
