"""``sandboxctl``: the API for people. The module of a command is imported when it is called, so that it starts fast."""
