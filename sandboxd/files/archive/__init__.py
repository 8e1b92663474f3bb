"""Whole trees as tar archives, packed and unpacked as a stream."""
