"""Watches: what changes in a directory, as it happens. Knows no HTTP."""
