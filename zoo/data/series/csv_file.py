"""CSV files as people have them: their encoding, separator, decimal mark, header and cells.

What can be told from the file is told from it; what is ambiguous is asked for. A file is read in
pieces, so that beside the numbers themselves only a few thousand rows are held at a time.
"""

import codecs
import csv
import gzip
import io
import itertools
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DELIMITERS = ",;\t|"
MISSING = {"", "na", "n/a", "nan", "null", "none", "-", "--", "?", "#n/a", "inf", "-inf", "missing"}
"""Cells, in small letters and without spaces around them, that hold no number."""

PIECE = 4096  # rows that are held as text


class CsvFile:
    """The header of a CSV file (also .gz, or the one in a .zip), and its rows in pieces.

    Attributes:
      path: the file.
      delimiter: between cells; told from the first lines where it is None.
      decimal: mark of fractions, `.` or `,`; told from the first rows where it is None.
      encoding: None: UTF-16 or UTF-8 by what the file begins with, else UTF-8 or, where it is not
        that, Windows' cp1252, in which every byte is a letter.
    """

    def __init__(
        self,
        path: str | Path,
        delimiter: str | None = None,
        decimal: str | None = None,
        encoding: str | None = None,
    ) -> None:
        """Look at the first lines.

        Raises:
          FileNotFoundError: if there is no such file.
          ValueError: if it is empty, is no text, or its decimal mark cannot be told.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"There is no file {str(path)!r} to read a series from.")
        if self._is_of_a_program():
            raise ValueError(f"{str(path)!r} is no CSV file; save it as CSV first.")
        if delimiter is not None and len(delimiter) != 1:
            raise ValueError(f"delimiter={delimiter!r} is not one character.")
        self.encoding = encoding or self._encoding()
        try:
            codecs.lookup(self.encoding)
        except LookupError:
            raise ValueError(f"encoding={encoding!r} is none that Python knows.") from None
        with self._open() as file:
            lines = list(itertools.islice((line for line in file if line.strip()), 50))
        if not lines:
            raise ValueError(f"{str(path)!r} is empty.")
        if "\0" in lines[0]:
            raise ValueError(f"{str(path)!r} is no text; a CSV file was expected.")
        named = re.fullmatch(r'"?sep=(.)"?', lines[0].strip("\ufeff\r\n"))  # as Excel reads it
        delimiter = delimiter or (named and named[1])
        self._above = 0 if named is None else 1  # lines above the header
        first = next((i for i, line in enumerate(lines) if line[0] != "#"), 0)
        told = lines[first if named is None else 1]
        self.delimiter = delimiter or max(DELIMITERS, key=lambda d: (told.count(d), -ord(d)))
        cells = told.count(self.delimiter)
        while lines[self._above][0] == "#" and lines[self._above].count(self.delimiter) < cells:
            self._above += 1  # a remark; the header itself may begin with the sign
        del lines[: self._above]
        rows = list(csv.reader(lines, delimiter=self.delimiter))
        self.header = [name.strip() for name in rows[0]]
        self.decimal = decimal or self._decimal(rows[1:])

    def _encoding(self) -> str:
        with self._bytes() as file:
            start = file.read(1 << 16)
            if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
                return "utf-16"
            decoder = codecs.getincrementaldecoder("utf-8")()
            try:
                while start:
                    decoder.decode(start)
                    start = file.read(1 << 20)
                decoder.decode(b"", final=True)
            except UnicodeDecodeError:
                return "cp1252"
        return "utf-8-sig"

    def _decimal(self, rows: list[list[str]]) -> str:
        if self.delimiter == ",":
            return "."
        cells = [cell.strip() for row in rows for cell in row]
        commas = [c for c in cells if re.fullmatch(r"[+-]?\d*,\d+(e[+-]?\d+)?", c, re.I)]
        points = [c for c in cells if re.fullmatch(r"[+-]?\d*\.\d+(e[+-]?\d+)?", c, re.I)]
        if not commas:
            return "."
        if points or all(re.fullmatch(r"[+-]?\d{1,3},\d{3}", c) for c in commas):
            raise ValueError(
                f"{str(self.path)!r} has cells such as {commas[0]!r}, whose comma may part "
                "thousands or decimals; give decimal=',' or take commas of thousands out."
            )
        return ","

    def _is_of_a_program(self) -> bool:
        """Whether it is a table of another format, by its ending or its first bytes."""
        suffix = self.path.suffix.lower()
        if suffix in (".xlsx", ".xls", ".ods", ".parquet", ".feather"):
            return True
        with open(self.path, "rb") as file:
            start = file.read(4)
        return start == b"PAR1" or (start == b"PK\3\4" and suffix != ".zip")

    @contextmanager
    def _bytes(self) -> Iterator[Any]:
        suffix = self.path.suffix.lower()
        try:
            if suffix == ".zip":
                with (
                    zipfile.ZipFile(self.path) as archive,
                    archive.open(self._member(archive)) as f,
                ):
                    yield f
            elif suffix == ".gz":
                with gzip.open(self.path) as f:
                    yield f
            else:
                with open(self.path, "rb") as f:
                    yield f
        except (zipfile.BadZipFile, gzip.BadGzipFile, EOFError, zlib.error, RuntimeError) as error:
            reason = str(error).rstrip(".") or type(error).__name__
            raise ValueError(f"{str(self.path)!r} cannot be unpacked: {reason}.") from None

    def _member(self, archive: zipfile.ZipFile) -> str:
        """The one table in an archive: the file there is, or the one that ends in .csv."""
        names = [n for n in archive.namelist() if not n.endswith("/") and "__MACOSX" not in n]
        tables = [n for n in names if n.lower().endswith((".csv", ".tsv", ".txt"))]
        for found in (names, tables, [n for n in tables if n.lower().endswith(".csv")]):
            if len(found) == 1:
                return found[0]
        raise ValueError(
            f"{str(self.path)!r} holds {', '.join(names[:5]) or 'no file'}; one table was expected."
        )

    @contextmanager
    def _open(self) -> Iterator[Any]:
        with self._bytes() as file:
            text = io.TextIOWrapper(file, self.encoding, newline="")
            try:
                yield text
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{str(self.path)!r} is not {self.encoding} ({error.reason}); give encoding=."
                ) from None
            except csv.Error as error:
                raise ValueError(
                    f"{str(self.path)!r} cannot be taken apart into cells ({error}); a quotation "
                    "mark that is never closed does this."
                ) from None
            finally:
                text.detach()

    def pieces(self) -> Iterator[list[tuple[int, list[str]]]]:
        """Rows with the numbers of their lines, without the header and empty lines.

        Raises:
          ValueError: for a row with more cells than the header, or fewer.
        """
        with self._open() as file:
            reader = csv.reader(file, delimiter=self.delimiter)
            rows = ((reader.line_num, row) for row in reader if any(cell.strip() for cell in row))
            next(itertools.islice(rows, self._above, None), None)
            while piece := list(itertools.islice(rows, PIECE)):
                for number, row in piece:
                    extra = [cell for cell in row[len(self.header) :] if cell.strip()]
                    if extra or len(row) < len(self.header):
                        hint = ""
                        if self.delimiter == "," and extra:
                            hint = " (a decimal comma between cells parted by commas?)"
                        raise ValueError(
                            f"Line {number} of {str(self.path)!r} has {len(row)} cells, and the "
                            f"header names {len(self.header)}{hint}; delimiter={self.delimiter!r}."
                        )
                yield piece

    def number(self, cell: str) -> float:
        """A cell as a number, NaN where there is none.

        Raises:
          ValueError: for other text.
        """
        cell = cell.strip()
        if cell.lower() in MISSING:
            return float("nan")
        plain = cell.replace("\u2212", "-")  # the minus sign of typesetters
        try:
            if "_" in plain:  # which Python takes for a mark of thousands
                raise ValueError
            return float(plain.replace(",", ".") if self.decimal == "," else plain)
        except ValueError:
            raise ValueError(f"{cell!r}") from None
