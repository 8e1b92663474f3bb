"""The rows. Importing them registers them, in the table's order."""

from benchmarks.rows import run, streaming, logs, files, raw, proxy, reach, server  # noqa: F401, I001
