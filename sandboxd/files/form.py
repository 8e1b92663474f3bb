"""Uploads of several files in one form (multipart/form-data, RFC 7578), written as they arrive. All of it blocks."""

from __future__ import annotations

import os
from collections.abc import Callable

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from sandboxd.files.transfer import Transfer
from sandboxd.files.upload import Upload, UploadResult

#: Files of one form, at most.
MAX_FILES = 10_000


class FormError(Exception):
    """An error in a form; its text says what is malformed."""


def boundary(content_type: str | None) -> bytes:
    """
    Return the boundary between a form's parts, from its ``Content-Type``.

    :param content_type: the value of ``Content-Type``.
    :raise FormError: if it is no form with files.
    """
    media_type, options = parse_options_header(content_type)
    if media_type != b"multipart/form-data" or not options.get(b"boundary"):
        raise FormError("Content-Type: must be multipart/form-data with a boundary, as curl -F sends it")
    return options[b"boundary"]


class Form(Transfer):
    """
    The upload of one form. Each of its files is replaced atomically once it has arrived.

    :param boundary: the boundary between its parts.
    :param upload: makes an upload from a file's name.
    :param nested: whether a name may be a path, with slashes in it.
    :ivar written: the results of its files so far, with their names.
    :ivar over: whether nothing is left to be discarded.
    """

    def __init__(self, boundary: bytes, upload: Callable[[str], Upload], nested: bool = False) -> None:
        super().__init__()
        self._nested = nested
        self.written: list[tuple[str, UploadResult]] = []
        self._upload = upload
        self._current: Upload | None = None
        self._name = ""
        self._headers: dict[bytes, bytes] = {}
        self._field = b""
        self._value = b""
        self._ended = False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._headers.clear,
                    "on_header_field": self._on_field,
                    "on_header_value": self._on_value,
                    "on_header_end": self._on_header,
                    "on_headers_finished": self._on_headers,
                    "on_part_data": self._on_data,
                    "on_part_end": self._on_part_end,
                    "on_end": self._on_end,
                },
            )
        except FormParserError as error:
            raise FormError(f"Content-Type: {error}") from None

    def feed(self, data: bytes) -> None:
        """
        Parse more of the form, and write its files.

        :raise FormError: if it is malformed.
        :raise FileError: if a file cannot be written.
        """
        with self._step():
            try:
                self._parser.write(data)
            except FormParserError as error:
                raise FormError(f"the form is malformed: {error}") from None

    def end(self) -> None:
        """
        Check that the form is complete.

        :raise FormError: if that is not a whole form.
        """
        if not self._ended:
            raise FormError("the form has no end")
        self.over = True

    def _close(self) -> None:
        if self._current is not None:
            self._current.close()

    def _on_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header(self) -> None:
        self._headers[self._field.lower()] = self._value
        self._field = self._value = b""

    def _on_headers(self) -> None:
        # The library takes bytes for Latin-1; this is the way back.
        value = self._headers.get(b"content-disposition", b"").decode("latin-1")
        options = parse_options_header(value)[1]
        field = os.fsdecode(options.get(b"name", b""))
        if b"filename" not in options:
            raise FormError(f"the part {field!r} has no filename; only files are taken")
        name = os.fsdecode(options[b"filename"].replace(b"%22", b'"').replace(b"%0D", b"\r").replace(b"%0A", b"\n"))
        if name in ("", ".", "..") or ("/" in name and not self._nested) or "\0" in name:
            raise FormError(f"the part {field!r} has the filename {name!r}, which must be a name in the directory")
        if len(self.written) >= MAX_FILES:
            raise FormError(f"the form has more than {MAX_FILES} files; send an archive")
        self._name = name
        self._current = self._upload(name)
        self._current.open(None)

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        if self._current is not None:
            self._current.write(data[start:end])

    def _on_part_end(self) -> None:
        if self._current is not None:
            self.written.append((self._name, self._current.commit()))
            self._current = None

    def _on_end(self) -> None:
        self._ended = True
