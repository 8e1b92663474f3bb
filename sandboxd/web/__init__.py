"""The HTTP server under the routes. Knows neither files nor executions."""
