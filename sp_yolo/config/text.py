"""The one place that reads people's text files: byte-order marks, UTF-16, every kind of line end."""

from __future__ import annotations

import os
from pathlib import Path

# UTF-32 first: its mark begins with that of UTF-16.
_MARKS = (
    (b"\xef\xbb\xbf", "utf-8"),
    (b"\xff\xfe\0\0", "utf-32-le"),
    (b"\0\0\xfe\xff", "utf-32-be"),
    (b"\xff\xfe", "utf-16-le"),
    (b"\xfe\xff", "utf-16-be"),
)
_LF = b"\n"
LABEL_BYTES = 64 * 2**20  # no label file of one image is that large: a disk image or a log named .txt is not read in


class NotText(ValueError):
    """This file is no text in an encoding that can be told; the message says where, and leaves out the path."""


def read_text(path: str | os.PathLike[str], most: int | None = None) -> str:
    """The text of a file as ``decode`` gives it; a file of more than ``most`` bytes is not read.

    Raises:
        NotText: another encoding, or too large. OSError: it cannot be read.
    """
    if most is not None and (size := os.stat(path).st_size) > most:
        raise NotText(f"{size} bytes, at most {most} are read")
    return decode(Path(path).read_bytes())


def encoding_of(data: bytes) -> tuple[bytes, str]:
    """(the byte-order mark that ``data`` begin with, b"" for none, the encoding that it stands for)."""
    return next((pair for pair in _MARKS if data.startswith(pair[0])), (b"", "utf-8"))


def decode(data: bytes) -> str:
    """Text without byte-order marks (Windows editors write one, files put together have several), lines ending in LF.

    Raises:
        NotText: neither UTF-8 nor marked as UTF-16 or UTF-32.
    """
    mark, encoding = encoding_of(data)
    body = data[len(mark) :]
    try:
        text = body.decode(encoding)
    except UnicodeDecodeError as error:
        shown = f"byte 0x{body[error.start]:02x} in line {body.count(_LF, 0, error.start) + 1}"
        raise NotText(f"not {encoding.upper()} text ({shown}): save it as UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\n\ufeff", "\n")
