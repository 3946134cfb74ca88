"""Where a path that somebody wrote into a YAML leads, with the habits of exporters and of other machines understood."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from sp_yolo.errors import UserError

_ELSEWHERE = re.compile(r"[A-Za-z]:[\\/]|\\\\")  # C:\..., \\server\...


def as_path(text: str, where: str) -> Path:
    """``text`` as a path, ``~`` expanded.

    Raises:
        UserError: the system takes it for no path, or may not look at it.
    """
    try:
        path = Path(text).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{where}: {repr(text)[:80]} cannot be used as a path: {reason}") from None
    return path


def find_place(text: str, where: str, bases: Sequence[Path]) -> tuple[Path, str] | None:
    """(an existing file or folder, in words which one where it is not below the first of ``bases`` as it stands).

    Tried in turn below each base: the path as written, with / for \\, and without leading ``../``: Roboflow's YAML lies
    in the folder that it speaks of from one level below. Of an absolute path, which may be of another machine, its end,
    as much of it as leads somewhere, two names at least.

    Raises:
        UserError: it is no path at all.
    """
    slashed = text.replace("\\", "/")
    forms = dict.fromkeys((text, slashed, re.sub(r"^(?:\.\.?/)+", "", slashed), slashed.strip(), *_ends(slashed)))
    for form in filter(None, forms):
        for base in bases:
            path = Path(os.path.normpath(base / as_path(form, where))) if ".." in form else base / as_path(form, where)
            if path.exists():
                first = form == text and base == bases[0]
                return path, "" if first or as_path(form, where).is_absolute() else f"{text} taken as {path}"
    return None


def _ends(slashed: str) -> list[str]:
    """The ends of an absolute path, longest first: /content/drive/x/train/images -> drive/x/train/images, ..."""
    if not slashed.startswith("/") and not _ELSEWHERE.match(slashed):
        return []
    parts = [part for part in slashed.split("/") if part]
    return ["/".join(parts[start:]) for start in range(1, len(parts) - 1)] if ".." not in parts else []


def missing_words(text: str, bases: Sequence[Path]) -> str:
    """The paths that were looked for, and what may be meant."""
    tried = list(dict.fromkeys(str(base / Path(text).expanduser()) for base in bases))
    words = " or ".join(tried)
    if _ELSEWHERE.match(text):
        return f"{text} (a path of a Windows machine)"
    if "\\" in text:
        words += " (nor with / for the backslashes)"
    if re.search(r"[*?]", text):
        return f"{words} (patterns are not followed: name the folder or a list file)"
    wanted = Path(tried[0])
    there = sorted(os.listdir(wanted.parent)) if os.access(wanted.parent, os.R_OK) and wanted.parent.is_dir() else []
    near = difflib.get_close_matches(wanted.name, there, n=1)
    return f"{words} (there is {near[0]})" if near else words
