"""The bodies, queries and replies of the API as types, a file for each family of routes."""
