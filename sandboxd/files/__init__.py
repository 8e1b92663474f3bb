"""
Files. All that touches them blocks: it is called in a thread, by way of :mod:`sandboxd.files.filesystem_threads`.

Paths are text as :func:`os.fsdecode` makes it: a byte that is not UTF-8 is a lone surrogate, U+DC80 to U+DCFF.
"""
