"""Tells ``twistd`` that there is a ``sandboxd`` command; :mod:`sandboxd.tap` is it."""

from twisted.application.service import ServiceMaker

sandboxd = ServiceMaker(
    "sandboxd",
    "sandboxd.tap",
    "An HTTP API to this machine for agents: commands, processes, files, a TCP proxy.",
    "sandboxd",
)
