"""The HTTP API: one Klein app, one file for each family of routes."""
