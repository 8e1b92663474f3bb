"""Watches: changes in directories, reported as they happen. Knows no HTTP."""
