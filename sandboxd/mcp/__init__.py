"""The Model Context Protocol: tools for agents, over the code that the routes call."""
