"""Executions: a running command, its output log, and the table of all of them. Knows no HTTP."""
