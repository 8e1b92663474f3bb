"""The TCP proxy."""
