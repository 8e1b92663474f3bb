"""
File operations. All of them block: call them in a thread, by :mod:`sandboxd.files.filesystem_threads`.

Paths are text as :func:`os.fsdecode` makes it: a byte that is not UTF-8 is a lone surrogate, U+DC80 to U+DCFF.
"""
