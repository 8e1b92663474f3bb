"""The Model Context Protocol: tools for agents, built on the same code as the routes."""
