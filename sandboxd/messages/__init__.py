"""Bodies, queries and replies of the API, a file for each family of routes."""
