"""
The Model Context Protocol as its own clients speak it, and the conformance suite of its organisation.

Not part of the default suite; ``tox run -e mcp`` runs it.
"""
