"""MCP tools that read, write, edit and find files."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta
from twisted.internet.defer import CancelledError

from sandboxd.files.access import Files
from sandboxd.files.edit import Edit, NoMatch, edit
from sandboxd.files.grep_process import GrepProcess
from sandboxd.files.line_range import LineRange
from sandboxd.files.listing import ListFilter, listing
from sandboxd.files.operations import write
from sandboxd.files.patterns import PatternError
from sandboxd.files.renames import make_parents
from sandboxd.files.root import Root
from sandboxd.mcp.tool import Arguments, Progress, Tool, ToolError, as_json
from sandboxd.messages.file_operations import GlobRequest, GrepRequest
from sandboxd.reactor.threads import ThreadPool

#: Lines that one call reads unless it asks for less or more.
DEFAULT_LINES = 2000

#: Bytes of text that one call returns.
MAX_TEXT = 200_000

#: Entries, paths and matches that one call returns unless it asks for less or more.
DEFAULT_ENTRIES = 500
DEFAULT_MATCHES = 100

#: Directories that searches leave out.
EXCLUDED = [".git", "node_modules", "__pycache__"]

Path = Annotated[str, Meta(min_length=1, description="Absolute, or relative to the sandbox's working directory.")]
Limit = Annotated[int, Meta(ge=1, le=10_000)]


class ReadFile(Arguments):
    """Arguments of ``read_file``."""

    path: Path
    offset: Annotated[int, Meta(ge=1, description="Number of the first line, from 1.")] = 1
    limit: Annotated[int, Meta(ge=1, le=100_000, description="How many lines.")] = DEFAULT_LINES


class FileText(msgspec.Struct, omit_defaults=True):
    """Lines of a file."""

    content: str
    offset: int
    lines: int
    total_lines: int
    cut: Annotated[bool, Meta(description="Whether the last line was cut off; read it with a smaller limit.")] = False


class WriteFile(Arguments):
    """Arguments of ``write_file``."""

    path: Path
    content: str


class WriteFileResult(msgspec.Struct):
    """A file that was written."""

    path: str
    bytes: int


class EditFile(Arguments):
    """Arguments of ``edit_file``."""

    path: Path
    old_text: Annotated[str, Meta(min_length=1, description="Exactly as it is in the file, white space included.")]
    new_text: str
    replace_all: Annotated[bool, Meta(description="Whether it may be there more than once.")] = False


class EditFileResult(msgspec.Struct):
    """The result of an edit."""

    replaced: int
    lines: Annotated[list[int], Meta(description="Lines where the new text begins, the first 20.")]


class ListDirectory(Arguments):
    """Arguments of ``list_directory``."""

    path: Path
    depth: Annotated[int, Meta(ge=1, le=20, description="1 is the directory itself.")] = 1
    limit: Limit = DEFAULT_ENTRIES


class Entry(msgspec.Struct, omit_defaults=True):
    """An entry of a directory."""

    path: str
    type: str
    size: int | None = None


class EntryList(msgspec.Struct, omit_defaults=True):
    """Entries that were found, sorted."""

    entries: list[Entry]
    more: Annotated[bool, Meta(description="Whether there is more than was asked for.")] = False


class FindFiles(Arguments):
    """Arguments of ``find_files``."""

    pattern: Annotated[str, Meta(min_length=1, description="As src/**/*.py or **/*.{js,ts}; * matches no slash.")]
    path: Path = "."
    limit: Limit = DEFAULT_ENTRIES


class SearchFiles(Arguments):
    """Arguments of ``search_files``."""

    pattern: Annotated[str, Meta(min_length=1, description="A regular expression as in Python, found in one line.")]
    path: Path = "."
    glob: Annotated[list[str], Meta(description="Files to search, such as *.py; all by default.")] | None = None
    ignore_case: bool = False
    context: Annotated[int, Meta(ge=0, le=20, description="Lines before and after each match.")] = 0
    limit: Limit = DEFAULT_MATCHES


class FileMatch(msgspec.Struct, omit_defaults=True):
    """A line that matches."""

    path: str
    line: int
    text: str
    before: list[str] = []
    after: list[str] = []


class FileMatches(msgspec.Struct, omit_defaults=True):
    """Lines that match."""

    matches: list[FileMatch]
    more: bool = False
    timed_out: Annotated[bool, Meta(description="Whether the time was over before all was searched.")] = False


class FileTools:
    """
    The MCP tools for files.

    :param searches: threads for searches, which wait for processes of their own.
    """

    def __init__(self, files: Files, searches: ThreadPool) -> None:
        self._files = files
        self._searches = searches

    def tools(self) -> list[Tool]:
        """Return the tools."""
        return [
            Tool(
                "read_file",
                "Read a file",
                f"Read lines of a text file, {DEFAULT_LINES} from the beginning by default. Use offset and limit for "
                "other parts.",
                ReadFile,
                FileText,
                self._read,
                _file_text,
                read_only=True,
            ),
            Tool(
                "write_file",
                "Write a file",
                "Create a file, with the directories above it, or replace one.",
                WriteFile,
                WriteFileResult,
                self._write,
                as_json,
                destructive=True,
            ),
            Tool(
                "edit_file",
                "Edit a file",
                "Replace a text in a file by another. The old text must be there exactly once, unless replace_all.",
                EditFile,
                EditFileResult,
                self._edit,
                as_json,
                destructive=True,
            ),
            Tool(
                "list_directory",
                "List a directory",
                "List what is in a directory, and with depth what is below it.",
                ListDirectory,
                EntryList,
                self._list,
                _entries_text,
                read_only=True,
            ),
            Tool(
                "find_files",
                "Find files",
                f"Find files and directories by a glob pattern. {', '.join(EXCLUDED)} are left out.",
                FindFiles,
                EntryList,
                self._find,
                _entries_text,
                read_only=True,
            ),
            Tool(
                "search_files",
                "Search in files",
                f"Search the contents of files by a regular expression. {', '.join(EXCLUDED)} are left out.",
                SearchFiles,
                FileMatches,
                self._search,
                _matches_text,
                read_only=True,
            ),
        ]

    async def _read(self, arguments: ReadFile, progress: Progress | None) -> FileText:
        reading = LineRange(self._files.root, arguments.path, arguments.offset, arguments.limit)
        try:
            data, count, total = await self._files.threads(arguments.path, reading.read)
        except CancelledError:
            reading.stop()
            raise
        cut = len(data) > MAX_TEXT
        if cut:
            data = data[:MAX_TEXT]
            count = data.count(b"\n") + (not data.endswith(b"\n"))
        return FileText(data.decode("utf-8", "replace"), arguments.offset, count, total, cut)

    async def _write(self, arguments: WriteFile, progress: Progress | None) -> WriteFileResult:
        await self._files.call(_write_with_parents, arguments.path, arguments.content)
        return WriteFileResult(arguments.path, len(arguments.content.encode("utf-8", "surrogateescape")))

    async def _edit(self, arguments: EditFile, progress: Progress | None) -> EditFileResult:
        one = Edit(arguments.old_text, arguments.new_text, arguments.replace_all)
        try:
            edited = await self._files.call(edit, arguments.path, [one], lambda info: None)
        except NoMatch as error:
            if not error.count:
                raise ToolError("old_text: it is not in the file; read the file, and give it exactly") from None
            lines = ", ".join(map(str, error.lines))
            raise ToolError(
                f"old_text: it is in the file {error.count} times, in lines {lines}; give more of its surroundings, "
                "or replace_all"
            ) from None
        return EditFileResult(edited.replaced[0], edited.lines[0])

    async def _list(self, arguments: ListDirectory, progress: Progress | None) -> EntryList:
        choice = ListFilter(depth=arguments.depth)
        page = await self._files.call(listing, arguments.path, choice, arguments.limit)
        return _entries(page.entries, page.next is not None)

    async def _find(self, arguments: FindFiles, progress: Progress | None) -> EntryList:
        request = GlobRequest(path=arguments.path, pattern=arguments.pattern, exclude=EXCLUDED, hidden=True)

        def find(root: Root, path: str) -> Any:
            return listing(root, path, request.choice(), arguments.limit, brief=True)

        page = await self._files.call(find, arguments.path)
        return _entries(page.entries, page.next is not None)

    async def _search(self, arguments: SearchFiles, progress: Progress | None) -> FileMatches:
        request = GrepRequest(
            path=arguments.path,
            pattern=arguments.pattern,
            glob=arguments.glob or [],
            ignore_case=arguments.ignore_case,
            context=arguments.context,
            max_matches=arguments.limit,
            exclude=EXCLUDED,
            hidden=True,
        )
        searching = GrepProcess(self._files.root, arguments.path, request.search())

        def work() -> dict[str, Any]:
            request.check_patterns()
            return searching.run()

        try:
            found = await self._searches(work)
        except CancelledError:
            searching.stop()
            raise
        except PatternError as error:
            raise ToolError(f"pattern: {error}") from None
        matches: list[FileMatch] = []
        size = 0
        for match in found["matches"]:
            size += len(match["text"]) + sum(map(len, [*match.get("before", ()), *match.get("after", ())]))
            if size > MAX_TEXT:
                return FileMatches(matches, True, found["timed_out"])
            matches.append(
                FileMatch(match["path"], match["line"], match["text"], match.get("before", []), match.get("after", []))
            )
        return FileMatches(matches, found["truncated"], found["timed_out"])


def _write_with_parents(root: Root, path: str, content: str) -> None:
    make_parents(root, path)
    write(root, path, content)


def _entries(found: list[dict[str, Any]], more: bool) -> EntryList:
    return EntryList([Entry(entry["path"], entry["type"], entry.get("size")) for entry in found], more)


def _file_text(result: FileText) -> str:
    last = result.offset + result.lines - 1
    whole = result.offset == 1 and last >= result.total_lines and not result.cut
    note = "" if whole else f"[lines {result.offset} to {last} of {result.total_lines}]\n"
    return note + result.content


def _entries_text(result: EntryList) -> str:
    lines = [f"{entry.path}/" if entry.type == "dir" else entry.path for entry in result.entries]
    return "\n".join([*lines, *(["[there are more]"] if result.more else [])]) or "[nothing]"


def _matches_text(result: FileMatches) -> str:
    lines: list[str] = []
    for match in result.matches:
        first = match.line - len(match.before)
        lines += [f"{match.path}-{first + index}-{text}" for index, text in enumerate(match.before)]
        lines.append(f"{match.path}:{match.line}:{match.text}")
        lines += [f"{match.path}-{match.line + 1 + index}-{text}" for index, text in enumerate(match.after)]
    notes = [*(["[there are more]"] if result.more else []), *(["[the time was over]"] if result.timed_out else [])]
    return "\n".join([*lines, *notes]) or "[nothing]"
