"""What `predict --source` names: pictures, videos, streams, folders of them, globs, and text files that list such."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

import cv2

from sp_yolo.config.text import NotText, read_text
from sp_yolo.data.files import is_system_name, list_images
from sp_yolo.data.images import VIDEO_EXTENSIONS, is_image_name
from sp_yolo.errors import UserError


def find_sources(sources: Sequence[str]) -> tuple[list[Path], list[str]]:
    """(image files, video files and streams) of ``--source``; a text file lists further ones, a line each.

    Raises:
        UserError: there is nothing to detect on below one of them.
    """
    images: list[Path] = []
    videos: list[str] = []
    for source in sources:
        path = Path(source)
        if source.isdecimal() or "://" in source:
            videos.append(source)
        elif os.path.isfile(path) and path.suffix.lower() == ".txt":
            more_images, more_videos = find_sources(_listed(path))
            images += more_images
            videos += more_videos
        else:
            more_images, more_videos = _found(source)
            images += more_images
            videos += more_videos
    return images, videos


def _found(source: str) -> tuple[list[Path], list[str]]:
    """(image files, video files) of a file, a folder or a glob; hidden and system files are none unless they are named.

    Raises:
        UserError: there are none.
    """
    given = Path(source)
    matches = [given] if os.path.exists(given) else sorted(map(Path, glob.glob(source, recursive=True)))
    files: dict[str, Path] = {}  # by what links lead to: a glob follows them round and round
    listed: list[Path] = []
    for match in matches:
        if any(match.is_relative_to(folder) for folder in listed):
            continue  # a glob such as folder/** names all that is in a folder as well
        if any(is_system_name(part) and part not in given.parts for part in match.parts):
            continue
        if match.is_dir():
            listed.append(match)
            listing = list_images(match)
            print("".join(f"{note}\n" for note in listing.notes()), end="")
            inner = map(Path, sorted([*listing.images, *listing.others]))
        for file in inner if match.is_dir() else [match]:
            files.setdefault(os.path.realpath(file), file)
    moving = [str(file) for file in files.values() if file.suffix.lower() in VIDEO_EXTENSIONS]
    still = [file for file in files.values() if file.suffix.lower() not in VIDEO_EXTENSIONS and is_image_name(file)]
    if not still and not moving:
        if os.path.isfile(given) and cv2.VideoCapture(source).isOpened():  # whatever it is called
            return [], [source]
        known = f"{given.suffix or 'a file without extension'} is no format that is read here"
        raise UserError(f"--source {source}: {known if os.path.isfile(given) else 'no image or video there'}")
    return still, moving


def _listed(path: Path) -> list[str]:
    """The sources that a text file lists; relative paths count from the working directory, or from the file's folder.

    Raises:
        UserError: it lists none, or another list.
    """
    try:
        lines = read_text(path).split("\n")
    except (OSError, NotText) as error:
        raise UserError(f"--source {path}: cannot be read as text: {error}") from None
    entries = [line.strip().strip("\"'") for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not entries:
        raise UserError(f"--source {path}: lists nothing to detect on")
    if nested := next((entry for entry in entries if entry.lower().endswith(".txt")), ""):
        raise UserError(f"--source {path}: lists {nested}, another list")
    beside = {entry for entry in entries if not os.path.exists(entry) and os.path.exists(path.parent / entry)}
    return [str(path.parent / entry) if entry in beside else entry for entry in entries]
