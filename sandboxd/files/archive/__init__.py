"""Tar archives of directory trees, packed and unpacked as streams."""
