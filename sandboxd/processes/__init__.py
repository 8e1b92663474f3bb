"""The operating system's side of a command: starting it, its pipes, its process tree, its limits. Knows no HTTP."""
