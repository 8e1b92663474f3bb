"""
Adapters of the client library to frameworks for agents, a module for each.

A module needs the extra of its name, and is imported only by who uses that framework.
"""
