"""The routes of the HTTP API, a file for each family; one Klein app serves them all."""
