"""A command that runs: its log, its lines, its life, and the table of all of them. Knows no HTTP."""
