"""Executions: a command that runs, its processes and its output. Knows no HTTP.

Arrows inside run downwards only::

    table -> execution -> protocol -> log -> lines
                       -> spawn -> pipes, marks, limits, cgroup, command
                       -> tree -> marks
"""
