"""
A sandbox as the backend of an agent of LangChain's Deep Agents.

It needs the extra ``deepagents``, and Python 3.11. Five lines::

    from deepagents import create_deep_agent
    from sandboxd.client import Sandbox
    from sandboxd.integrations.deepagents import SandboxdBackend

    sandbox = Sandbox("http://localhost:3030", "your-secret")
    agent = create_deep_agent(model, backend=SandboxdBackend(sandbox, cwd="/tmp"))

The agent's tools are requests to the daemon then; but for ``execute``, nothing runs in the sandbox.
"""

from __future__ import annotations

import base64
import codecs
import posixpath

from deepagents.backends.protocol import (
    BackendProtocol,
    DeleteResult,
    EditResult,
    ExecuteResponse,
    FileDownloadResponse,
    FileInfo,
    FileUploadResponse,
    GlobResult,
    GlobTruncationReason,
    GrepMatch,
    GrepResult,
    LsResult,
    ReadResult,
    WriteResult,
)
from deepagents.backends.sandbox import BaseSandbox
from deepagents.backends.utils import compile_grep_include_glob

from sandboxd.client import CommandTimeout, Conflict, Forbidden, NotFound, PreconditionFailed, Sandbox, SandboxError
from sandboxd.client.replies import FileInfo as RemoteFile
from sandboxd.integrations.exit_code import TIMED_OUT, exit_code

#: Most bytes that one read returns, as the framework's own backends have it.
MAX_READ = 500 * 1024

#: Bytes by which a file is taken for text or not.
PREFIX = 8192

#: Most paths or lines that one search returns.
MAX_FOUND = 10_000

#: Directories that hold no files of the user's, and no end of others.
PSEUDO = ("/proc", "/sys", "/dev")


class SandboxdBackend(BaseSandbox):
    """
    A sandbox for ``create_deep_agent(backend=...)``.

    :param sandbox: a client of the daemon; whoever made it closes it. Several backends and threads may share it.
    :param cwd: where commands run, and searches without a path begin; by default where the daemon was started, and
        ``/``.
    :param timeout: seconds for commands that are given none; 0 for ever.
    :param max_output: bytes of a command's output to keep, half of the beginning and half of the end.
    :param legacy: behave as was agreed before deepagents 0.7: :meth:`write` refuses to replace a file, :meth:`glob`
        does not look below directories unless told to by ``**``, and returns relative paths, and directories.
    """

    def __init__(
        self,
        sandbox: Sandbox,
        *,
        cwd: str | None = None,
        timeout: float = 1800,
        max_output: int = 1024 * 1024,
        legacy: bool = False,
    ) -> None:
        self.sandbox = sandbox
        self.cwd = cwd
        self.timeout = timeout
        self.max_output = max_output
        self.legacy = legacy

    @property
    def id(self) -> str:
        """The URL of the sandbox."""
        return self.sandbox.url

    def execute(self, command: str, *, timeout: int | None = None) -> ExecuteResponse:
        """
        Run a command of a shell.

        :param timeout: seconds; 0 for ever. Then all that it has started is killed, and the exit code is 124.
        """
        seconds = self.timeout if timeout is None else timeout
        try:
            result = self.sandbox.run(
                command, cwd=self.cwd, merge_stderr=True, timeout=seconds, max_output=self.max_output
            )
        except CommandTimeout as error:
            output = f"{error.result.stdout}\n[killed: it has run for {seconds:g} seconds]"
            return ExecuteResponse(output, TIMED_OUT, error.result.stdout_dropped > 0)
        except SandboxError as error:
            return ExecuteResponse(f"Error: {error}", 1)
        return ExecuteResponse(result.stdout, exit_code(result), result.stdout_dropped > 0)

    def ls(self, path: str) -> LsResult:
        """List what is in a directory."""
        try:
            found = self.sandbox.list_files(_absolute(path))
        except (SandboxError, ValueError) as error:
            return LsResult(error=f"Path '{path}': {_code(error)}")
        return LsResult(entries=[_file_info(path, file) for file in found])

    def read(self, file_path: str, offset: int = 0, limit: int = 2000) -> ReadResult:
        """
        Read some lines of a text file, or all of another one, in base64.

        :param offset: lines to pass over.
        """
        try:
            return self._read(_absolute(file_path), max(offset, 0), limit)
        except (SandboxError, ValueError) as error:
            return ReadResult(error=f"File '{file_path}': {_code(error)}")

    def _read(self, path: str, offset: int, limit: int) -> ReadResult:
        info = self.sandbox.stat(path, follow=True)
        if info.type != "file":
            raise ValueError("is_directory" if info.type == "dir" else "not_a_file")
        # Files of the kernel have the size 0, whatever is in them.
        prefix = self.sandbox.read(path, size=PREFIX) if info.size else self.sandbox.read(path)
        if not _is_text(prefix):
            if info.size > MAX_READ:
                raise ValueError(f"Binary file exceeds maximum preview size of {MAX_READ} bytes")
            data = self.sandbox.read(path)
            return ReadResult(file_data={"content": base64.b64encode(data).decode("ascii"), "encoding": "base64"})
        if not prefix or limit <= 0:
            return ReadResult(file_data={"content": "", "encoding": "utf-8"}, no_lines_requested=limit <= 0)
        found = self.sandbox.read_lines(path, offset + 1, limit)
        if not found.lines:
            raise ValueError(f"Line offset {offset} exceeds file length ({found.total_lines} lines)")
        lines = found.content.removesuffix("\n").replace("\r\n", "\n").removesuffix("\r").split("\n")
        content, number = _bounded(lines)
        end = offset + number
        return ReadResult(
            file_data={"content": content, "encoding": "utf-8"},
            start_line=offset + 1,
            end_line=end,
            total_lines=found.total_lines,
            next_offset=end if end < found.total_lines else None,
        )

    def write(self, file_path: str, content: str) -> WriteResult:
        """Make a text file, or replace one, and make the directories above it."""
        try:
            self.sandbox.write(_absolute(file_path), content, parents=True, exclusive=self.legacy)
        except PreconditionFailed:
            return WriteResult(error=f"Error: File '{file_path}' already exists")
        except (SandboxError, ValueError) as error:
            return WriteResult(error=f"Failed to write file '{file_path}': {_code(error)}")
        return WriteResult(path=file_path)

    def edit(self, file_path: str, old_string: str, new_string: str, replace_all: bool = False) -> EditResult:
        """Replace a text in a file, in one step. It must be there once, unless ``replace_all``."""
        if not old_string:
            return EditResult(error="Error: old_string cannot be empty. Provide the exact text to replace.")
        try:
            edited = self.sandbox.edit(_absolute(file_path), (old_string, new_string), replace_all=replace_all)
        except Conflict as error:
            # The daemon counts where the text is; other conflicts have no count.
            count = error.fields.get("count")
            if count == 0:
                return EditResult(error=f"Error: String not found in file: '{old_string}'")
            if count is not None:
                return EditResult(
                    error=f"Error: String '{old_string}' appears multiple times ({count}). "
                    "Use replace_all=True, or give more of what is around it."
                )
            return EditResult(error=f"Error editing file '{file_path}': {_code(error)}")
        except NotFound:
            return EditResult(error=f"Error: File '{file_path}' not found")
        except (SandboxError, ValueError) as error:
            return EditResult(error=f"Error editing file '{file_path}': {_code(error)}")
        return EditResult(path=file_path, occurrences=edited.edits[0].replaced)

    def delete(self, file_path: str) -> DeleteResult:
        """Remove a file, or a directory with all that is in it."""
        try:
            self.sandbox.stat(_absolute(file_path))
            self.sandbox.delete_tree(file_path)
        except NotFound:
            return DeleteResult(error=f"Error: '{file_path}' not found")
        except (SandboxError, ValueError) as error:
            return DeleteResult(error=f"Error deleting file '{file_path}': {_code(error)}")
        return DeleteResult(path=file_path)

    def grep(
        self, pattern: str, path: str | None = None, glob: str | None = None, *, max_count: int | None = None
    ) -> GrepResult:
        """
        Find a text, which is no expression, in a file or in all files below a directory.

        :param glob: which files: what their names match, or with a slash what their paths do.
        :param max_count: lines to return, at most 10,000 in any case.
        """
        limit = MAX_FOUND if max_count is None else min(max_count, MAX_FOUND)
        if limit <= 0:
            return GrepResult(matches=[], truncated=True)
        path = path or self.cwd or "/"
        excluded = [name for name in self.grep_exclude_dirs if name != posixpath.basename(path.rstrip("/"))]
        try:
            chosen = compile_grep_include_glob(glob) if glob is not None and "/" in glob else None
            is_file = self.sandbox.stat(_absolute(path), follow=True).type == "file"
            found = self.sandbox.grep(
                path,
                pattern,
                literal=True,
                glob=[] if glob is None else [glob],
                exclude=[*excluded, *(PSEUDO if path == "/" else ())],
                hidden=True,
                max_matches=limit,
            )
        except (SandboxError, ValueError) as error:
            return GrepResult(error=f"Path '{path}': {_code(error)}")
        matches = [
            GrepMatch(path=path if is_file else posixpath.join(path, match.path), line=match.line, text=match.text)
            for match in found.matches
            # Wildcards of paths do not match a dot at the beginning of a name; those of names do.
            if chosen is None or is_file or chosen(match.path)
        ]
        return GrepResult(matches=matches, truncated=found.truncated or found.timed_out)

    def glob(self, pattern: str, path: str | None = None) -> GlobResult:
        """
        Find files by a pattern: of their names, or with a slash of their paths from the directory.

        Wildcards do not match a dot at the beginning of a name.
        """
        path = path or self.cwd or "/"
        by_name = "/" not in pattern and not self.legacy
        try:
            chosen = compile_grep_include_glob(pattern)
            page = self.sandbox.list_page(
                _absolute(path),
                depth=1 if self.legacy and "**" not in pattern else MAX_FOUND,
                glob=pattern,
                exclude=PSEUDO if path == "/" else (),
                type=None if self.legacy else "file",
                # A pattern of names is tried in hidden directories too.
                hidden=by_name,
                limit=MAX_FOUND,
            )
        except (SandboxError, ValueError) as error:
            return GlobResult(error=f"Path '{path}': {_code(error)}")
        found = [file for file in page.entries if self.legacy or chosen(file.path)]
        reason: GlobTruncationReason | None = None
        if page.next is not None or page.unreadable:
            reason = "budget" if page.next is not None else "unreadable"
        return GlobResult(
            matches=[_file_info("" if self.legacy else path, file) for file in found],
            truncated=reason is not None,
            truncation_reason=reason,
        )

    def upload_files(self, files: list[tuple[str, bytes]]) -> list[FileUploadResponse]:
        """Write files, and make the directories above them; the responses are in the same order."""
        responses = []
        for path, content in files:
            error = None
            try:
                self.sandbox.write(_absolute(path), content, parents=True)
            except (SandboxError, ValueError) as failure:
                error = _code(failure)
            responses.append(FileUploadResponse(path=path, error=error))
        return responses

    def download_files(self, paths: list[str]) -> list[FileDownloadResponse]:
        """Read files; the responses are in the same order."""
        responses = []
        for path in paths:
            try:
                response = FileDownloadResponse(path=path, content=self.sandbox.read(_absolute(path)))
            except (SandboxError, ValueError) as failure:
                response = FileDownloadResponse(path=path, error=_code(failure))
            responses.append(response)
        return responses

    # The asynchronous methods of BaseSandbox run scripts in the sandbox; these call the methods above, in a thread.
    als = BackendProtocol.als
    aread = BackendProtocol.aread
    awrite = BackendProtocol.awrite
    aedit = BackendProtocol.aedit
    agrep = BackendProtocol.agrep
    aglob = BackendProtocol.aglob


def _absolute(path: str) -> str:
    """
    Return a path.

    :raise ValueError: if it is not absolute.
    """
    if not path.startswith("/"):
        raise ValueError("invalid_path")
    return path


def _code(error: Exception) -> str:
    """Return the framework's code for an error, or else its message."""
    if isinstance(error, NotFound):
        return "file_not_found"
    if isinstance(error, Forbidden):
        return "permission_denied"
    if isinstance(error, Conflict) and "directory" in str(error):
        return "is_directory"
    return str(error)


def _is_text(prefix: bytes) -> bool:
    """Return whether the beginning of a file is UTF-8; its last character may be cut."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(prefix)
    except UnicodeDecodeError:
        return False
    return True


def _bounded(lines: list[str]) -> tuple[str, int]:
    """Return as many lines as :data:`MAX_READ` has room for, but one at least, cut if need be, and their number."""
    size = 0
    for number, line in enumerate(lines):
        size += len(line.encode("utf-8", "surrogatepass")) + 1
        if size > MAX_READ:
            if number == 0:
                return line.encode("utf-8", "surrogatepass")[:MAX_READ].decode("utf-8", "ignore"), 1
            return "\n".join(lines[:number]), number
    return "\n".join(lines), len(lines)


def _file_info(top: str, file: RemoteFile) -> FileInfo:
    return FileInfo(
        path=posixpath.join(top, file.path), is_dir=file.type == "dir", size=file.size, modified_at=file.mtime
    )
