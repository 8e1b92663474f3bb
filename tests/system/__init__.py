"""
The daemon as it is shipped: in an image that is built and run, and as a unit under a real systemd.

These need root and some Debian packages, and minutes; so they are no part of the default run:
``tox run -e system``, or ``pytest tests/system``. What is missing is named in the skip; in CI nothing may be missing.
"""
