"""The forms in which lists are handed over: from the bytes of a file to its entries, each with the place where it stands.

The form of the whole file is recognised before any line is read, so that a file of another kind gives one line of error and not
one for each of its lines. What the entries mean is the business of `guards.removal_list`.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from guards.errors import InvalidForgetSet, InvalidJson
from guards.strict_json import parse_documents, parse_object, shorten

RIGHT_LINE = '{"phrase": "Maria Kowalczyk"}'
BOM = "\ufeff"
LINE_END = re.compile(r"\r\n|\n|\r")
_BOM_AT_START = re.compile(f"(?:\\A|(?<=[\r\n])){BOM}+")
"""Byte order marks at the start of the file, or of a line, where a second file was appended."""
_DELIMITERS = (",", ";", "\t")
_ARRAY_START = re.compile(r"\[\s*($|[\[{\"\]\d-])")
_JSON_RULE = re.compile(r"\A.* (?=is not|must|contains)|\d+", re.DOTALL)
"""Removed from an error message, this leaves the rule: it matches the value at the start, and numbers (places in the value)."""
_FILE_KINDS = (
    (b"PK\x03\x04", "a ZIP archive, perhaps a spreadsheet (.xlsx) or a document (.docx)"),
    (b"\xd0\xcf\x11\xe0", "an Excel or Word file of the old kind (.xls, .doc)"),
    (b"%PDF", "a PDF document"),
    (b"{\\rtf", "an RTF document"),
    (b"\x1f\x8b", "compressed with gzip"),
    (b"PAR1", "a Parquet file"),
    (b"SQLite format 3\x00", "an SQLite database"),
)
_ENCODINGS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@dataclass(frozen=True)
class Unreadable:
    """In the place of an entry: why it cannot be read. ``rule`` is the same for all entries that break the same rule."""

    rule: str
    message: str


def decode(content: bytes) -> str:
    """The text of a file, without byte order marks. Bytes that are not UTF-8 are surrogates, for `check_encoding` to report.

    Raises:
        InvalidForgetSet: with one problem, if it is no text.
    """
    for start, kind in _FILE_KINDS:
        if content.startswith(start):
            raise InvalidForgetSet([f"the file is {kind}; save it as CSV in UTF-8, or write lines such as {RIGHT_LINE}"])
    encoding = next((name for bom, name in _ENCODINGS if content.startswith(bom)), None) or _encoding_by_nulls(content)
    if encoding is None:
        return _BOM_AT_START.sub("", content.decode("utf-8", "surrogateescape"))
    try:
        return _BOM_AT_START.sub("", content.decode(encoding))
    except UnicodeDecodeError as error:
        rule = f"byte {error.start + 1:,} cannot be read as such ({error.reason})"
        raise InvalidForgetSet([f"the file begins as {encoding.upper()}, and {rule}; save it as UTF-8"]) from None


def _encoding_by_nulls(content: bytes) -> str | None:
    """Of text without a byte order mark: where its null bytes stand shows how wide its characters are."""
    sample = content[:4096]
    if b"\x00" not in sample:
        return None
    nulls = [sample[i::4].count(0) / max(1, len(sample) / 4) for i in range(4)]  # the share at each of four places
    few, many = 0.02, 0.1
    if nulls[0] < few < many < min(nulls[2], nulls[3]) and nulls[2] + nulls[3] > 1.9:
        return "utf-32-le"
    if nulls[3] < few < many < min(nulls[0], nulls[1]) and nulls[0] + nulls[1] > 1.9:
        return "utf-32-be"
    if max(nulls[0], nulls[2]) < few and min(nulls[1], nulls[3]) > many:
        return "utf-16-le"
    if max(nulls[1], nulls[3]) < few and min(nulls[0], nulls[2]) > many:
        return "utf-16-be"
    return None


def check_encoding(text: str) -> None:
    """Raises InvalidForgetSet with one problem that names the first byte that is not UTF-8."""
    for number, line in enumerate(LINE_END.split(text), start=1):
        if problem := _undecodable(line):
            raise InvalidForgetSet([f"line {number}: {problem}"])


def _undecodable(line: str) -> str | None:
    """What to say of a line with bytes that are not UTF-8."""
    if line.isascii() or not any("\udc80" <= character <= "\udcff" for character in line):
        return None
    start = next(i for i, character in enumerate(line) if "\udc80" <= character <= "\udcff")
    raw = line.encode("utf-8", "surrogateescape")
    position = len(line[:start].encode("utf-8"))
    around = raw[max(0, position - 20) : position + 20]
    reads = f": the file seems to be Windows-1252 ({around.decode('cp1252', 'replace')!r})"
    return f"byte {position + 1:,} ({raw[position]:#04x}) is not UTF-8{reads}; save the file as UTF-8 (in Excel as 'CSV UTF-8')"


def json_entries(text: str) -> list[tuple[str, Any]] | None:
    """The entries of JSON lines or of JSON documents with their places, or None if the text is no JSON.

    An entry is what stands in an array or between arrays, or `Unreadable` for a bad line.

    Raises:
        InvalidForgetSet: with one problem, if the whole file cannot be read.
    """
    lines = [(number, line.strip()) for number, line in enumerate(LINE_END.split(text), start=1) if line.strip()]
    first = lines[0][1]
    if first[0] == "{" and _is_object(first):
        return _line_entries(lines)
    objects = sum(_is_object(line) for _, line in lines)
    if first[0] not in "{[" or (first[0] == "[" and not _ARRAY_START.match(first)):
        return _line_entries(lines) if objects else None
    try:
        return _document_entries(text)
    except (InvalidJson, UnicodeEncodeError) as error:
        if objects * 2 >= len(lines) and not (first[0] == "[" and lines[-1][1][-1] == "]"):
            return _line_entries(lines)  # its first line is bad, most others are not
        check_encoding(text)
        what = "an array" if first[0] == "[" else "an object"
        raise InvalidForgetSet([f"{error} (the file begins as JSON, with {what}; a right line is {RIGHT_LINE})"]) from None


def _is_object(line: str) -> bool:
    if line[0] != "{" or line[-1] != "}":
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _line_entries(lines: Sequence[tuple[int, str]]) -> list[tuple[str, Any]]:
    return [(f"line {number}", _line_entry(line)) for number, line in lines]


def _line_entry(line: str) -> dict[str, Any] | Unreadable:
    if problem := _undecodable(line):
        return Unreadable("encoding", problem)
    try:
        return parse_object(line.encode())
    except InvalidJson as error:
        if "Extra data" in str(error):
            rule = "goes on after a JSON value; put each object on a line of its own, with no comma after it"
            return Unreadable("extra data", f"{shorten(line.encode())} {rule}")
        return Unreadable(_JSON_RULE.sub("", str(error)), str(error))


def _document_entries(text: str) -> list[tuple[str, Any]]:
    """Raises InvalidJson, and UnicodeEncodeError where bytes are not UTF-8."""
    text.encode()
    entries: list[tuple[str, Any]] = []
    for start, value in parse_documents(text):
        if isinstance(value, list):
            entries += [(f"item {number}", item) for number, item in enumerate(value, start=len(entries) + 1)]
        else:
            entries.append((f"line {len(LINE_END.findall(text, 0, start)) + 1}", value))
    return entries


def describe_other_file(text: str, *, taken_for_list: bool) -> str:
    """One line on a file that is no JSON, and was perhaps ``taken_for_list`` by who handed it over."""
    table = table_without_doubt(text) or _sniff(text, _DELIMITERS)
    if table is not None:
        columns = [_clean(cell) for cell in table[1]]
        shown = ", ".join(columns[:20]) + (f" and {len(columns) - 20} more" if len(columns) > 20 else "")
        best = next((each for each in columns if "name" in each.casefold()), columns[0])
        rest = f"{'or' if taken_for_list else 'or, if it is a plain list, --as phrase; or'} write JSON lines such as {RIGHT_LINE}"
        how = f"say which to read: --column {json.dumps(best, ensure_ascii=False)}"
        return f"the file is a CSV with the columns {shown}; {how}, {rest}"
    first = shorten(next(line for _, line in plain_lines(text)))
    how = "--as phrase or --as alias reads each line as one"
    return f"the file is a plain list (it begins with {first}), not JSON lines; {how}, and a JSON line looks like {RIGHT_LINE}"


def plain_lines(text: str) -> Iterator[tuple[str, str]]:
    """The lines of a plain list that are not empty, with their places; without quotes around the whole line."""
    for number, line in enumerate(LINE_END.split(text), start=1):
        if value := line.strip():
            quoted = re.fullmatch(r'"((?:[^"]|"")+)"', value)
            yield f"line {number}", quoted[1].replace('""', '"') if quoted else value


def _clean(cell: str) -> str:
    return LINE_END.sub("\n", cell.strip(BOM + " \t\r\n"))


def _records(text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The records of a CSV file, each with the line at which it starts. Raises csv.Error."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    start = 1
    for record in reader:
        if any(cell.strip() for cell in record):
            yield start, record
        start = reader.line_num + 1


def _sniff(text: str, delimiters: Sequence[str]) -> tuple[str, list[str]] | None:
    """The delimiter with which the first records have the same number of cells, at least two, and the header."""
    best, most = None, 1
    for delimiter in delimiters:
        try:
            records = [record for _, record in islice(_records(text, delimiter), 50)]
        except csv.Error:
            continue
        same = sum(len(record) == len(records[0]) for record in records) if records else 0
        if len(records) > 1 and same >= 0.9 * len(records) and len(records[0]) > most:
            best, most = (delimiter, records[0]), len(records[0])
    return best


def table_without_doubt(text: str) -> tuple[str, list[str]] | None:
    """As `_sniff`, but not for lists of "Surname, Given": a comma alone makes no table."""
    return _sniff(text, (";", "\t"))


def column_cells(text: str, column: str) -> Iterator[tuple[str, str | Unreadable]]:
    """The cells of one column of a CSV file with their places, empty ones too.

    Raises:
        InvalidForgetSet: with one problem, if there is no such column or the file cannot be read to its end.
    """
    first_line, *rest = LINE_END.split(text, maxsplit=1)
    delimiters: Sequence[str] = _DELIMITERS
    if re.fullmatch("sep=.", first_line) and rest:  # Excel's own hint
        delimiters, text = (first_line[4],), rest[0]
    delimiter, position, header = _choose_delimiter(text, column, delimiters)
    try:
        for number, record in _records(text, delimiter):
            cells = [_clean(cell) for cell in record]
            if cells == header:
                continue  # also where a second file was joined to the first
            if any(cells[len(header) :]):
                rule = f"has {len(cells)} cells, the header {len(header)}; put quotes around a cell that contains {delimiter!r}"
                yield f"line {number}", Unreadable("cells", f"{shorten(cells)} {rule}")
            else:
                yield f"line {number}", cells[position] if position < len(cells) else ""
    except csv.Error as error:
        raise InvalidForgetSet([f'the CSV cannot be read to its end ({error}); look for a quote (") without its partner']) from None


def _choose_delimiter(text: str, column: str, delimiters: Sequence[str]) -> tuple[str, int, list[str]]:
    """Delimiter, the column's position, the header. Raises InvalidForgetSet."""
    headers: dict[str, list[str]] = {}
    for delimiter in delimiters:
        try:
            headers[delimiter] = [_clean(cell) for cell in next(_records(text, delimiter))[1]]
        except (csv.Error, StopIteration):
            continue
    folds: tuple[Callable[[str], str], ...] = (str, str.casefold)
    for fold in folds:
        for delimiter, header in sorted(headers.items(), key=lambda each: -len(each[1])):
            positions = [i for i, cell in enumerate(header) if fold(cell) == fold(_clean(column))]
            if len(positions) > 1:
                raise InvalidForgetSet([f"the CSV has {len(positions)} columns {column!r}; give each its own header"])
            if positions:
                # With one column, nothing separates cells: a comma belongs to the name.
                return (delimiter if len(header) > 1 else "\x1f"), positions[0], header
    if not headers:
        raise InvalidForgetSet(['the CSV cannot be read: a quote (") in its first line has no partner'])
    longest = max(headers.values(), key=len)
    raise InvalidForgetSet([f"the CSV has no column {column!r}; it has {', '.join(longest)}"])
