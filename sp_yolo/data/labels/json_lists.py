"""A large JSON object read entry by entry: what is kept of it is the caller's choice, never the whole document."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from sp_yolo.config.text import encoding_of
from sp_yolo.errors import UserError

_CHUNK = 2**20  # bytes read at a time
MOST_TEXT = 64 * 2**20  # characters of one entry of a list, or of a value that is no list
_BLANK = " \t\r\n"
_DELIMITERS = frozenset(",:]}" + _BLANK)
_NEAR_END = 16  # characters: a fault so close to the end of what was read may be a word that is cut there

Take = Callable[[int, Any], None]


def read_lists(path: Path, takers: Mapping[str, Take], what: str) -> dict[str, Any]:
    """Call ``takers[key](position, entry)`` for every entry of the list under each key of the object in ``path``, which
    should be ``what``.

    Entries are parsed one at a time and nothing of them is kept here. Returns the values of the other keys that are no
    lists, and of those of ``takers`` that are none; a list that was read is there as the range of its positions.

    Raises:
        UserError: no JSON, no object, a key twice, or an entry of more than ``MOST_TEXT`` characters.
    """
    found: dict[str, Any] = {}
    try:
        with open(path, "rb") as file:
            text = _Text(file)
            if text.peek() != "{":
                raise text.fault(f"expected {what}")
            text.at += 1
            if text.peek() != "}":
                while True:
                    key = text.value()
                    if not isinstance(key, str):
                        raise text.fault("Expecting property name enclosed in double quotes")
                    if key in found:
                        raise text.fault(f"key {key[:40]!r} appears twice")
                    text.expect(":", "Expecting ':' delimiter")
                    found[key] = _entries(text, takers.get(key)) if text.peek() == "[" else text.value()
                    if text.peek() != ",":
                        break
                    text.at += 1
            text.expect("}", "Expecting ',' delimiter")
            if text.peek():
                raise text.fault("Extra data")
    except _Fault as fault:
        raise UserError(f"{path}:{fault.line}: {fault}") from None
    except (OSError, ValueError, RecursionError) as error:  # a decoding error, a number of thousands of digits
        told = error.strerror if isinstance(error, OSError) else str(error)
        words = (told or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: cannot be read as JSON: {words}") from None
    return found


def _entries(text: _Text, take: Take | None) -> range:
    """Read the list that begins here; the positions of its entries."""
    text.at += 1
    count = 0
    if text.peek() != "]":
        while True:
            entry = text.value()
            if take:
                take(count, entry)
            count += 1
            if text.peek() != ",":
                break
            text.at += 1
    text.expect("]", "Expecting ',' delimiter")
    return range(count)


class _Fault(Exception):
    def __init__(self, line: int, words: str) -> None:
        super().__init__(words)
        self.line = line


class _Text:
    """A window on the text of a file, moved forward: ``text`` from position ``at`` on is still to be read."""

    def __init__(self, file: BinaryIO) -> None:
        head = file.read(4)
        mark, encoding = encoding_of(head)
        file.seek(len(mark))
        self._file, self._decoder = file, codecs.getincrementaldecoder(encoding)()
        self._decode_value = json.JSONDecoder().raw_decode
        self._ended, self._line = False, 1
        self.text, self.at = "", 0

    def fault(self, words: str) -> _Fault:
        return _Fault(self._line + self.text.count("\n", 0, self.at), words)

    def peek(self) -> str:
        """The next character that is not blank, not consumed; '' at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in _BLANK:
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if self._ended:
                return ""
            self._more()

    def expect(self, character: str, otherwise: str) -> None:
        if self.peek() != character:
            raise self.fault(f"not valid JSON: {otherwise}")
        self.at += 1

    def value(self) -> Any:
        """The value that begins here, whole."""
        self.peek()
        while True:
            try:
                value, end = self._decode_value(self.text, self.at)
                # else a number may go on: 1 of 1.5e-3
                if self._ended or end + _NEAR_END < len(self.text) or self.text[end : end + 1] in _DELIMITERS:
                    self.at = end
                    return value
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos >= len(self.text) - _NEAR_END
                if self._ended or not cut:
                    line = self._line + self.text.count("\n", 0, error.pos)
                    raise _Fault(line, f"not valid JSON: {error.msg}") from None
            self._more()

    def _more(self) -> None:
        """Read on, forgetting what was consumed: as much again as is waiting, so that an entry that is long is not
        looked at again and again."""
        self._line += self.text.count("\n", 0, self.at)
        waiting = self.text[self.at :]
        if len(waiting) > MOST_TEXT:
            raise self.fault(f"an entry of more than {MOST_TEXT} characters is not read")
        data = self._file.read(max(_CHUNK, len(waiting)))
        self._ended = not data
        self.text, self.at = waiting + self._decoder.decode(data, final=self._ended), 0
