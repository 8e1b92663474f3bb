"""The operating system's side of a command: its start, pipes, process tree and limits. Knows no HTTP."""
