"""
``sandboxctl``, the command line of the API. The module of a command is imported when it is called, for a fast start.
"""
