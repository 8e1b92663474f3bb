"""sandboxd: an HTTP API to a sandbox, for agents and automation."""

__version__ = "0.2.0"
