"""The only file that opens an image: size from the header, pixels as 8-bit BGR, EXIF rotation applied to both."""

from __future__ import annotations

import mmap
import os
import struct

import cv2
import numpy as np

# What pictures are called. Whether one can be read is for the decoder to say, by its content: a kind that it cannot
# read (HEIC, SVG) is thus named, not passed over.
_PICTURES = """arw avif bmp cr2 dib dng exr gif hdr heic heif jfif jp2 jpe jpeg jpg jxl mpo nef pbm pcx pfm pgm pic png
    pnm ppm psd pxm ras sr svg tga tif tiff webp"""
# What lies beside pictures and is none: not worth opening to ask the decoder.
_OTHER_FILES = "cache csv db gz html ini json jsonl log md names npy pt py tar tsv txt xlsx xml yaml yml zip"
_VIDEOS = "3gp asf avi flv gif m2ts m4v mjpeg mjpg mkv mov mp4 mpeg mpg mts ogv ts webm wmv"
EXTENSIONS = frozenset(f".{word}" for word in _PICTURES.split())
VIDEO_EXTENSIONS = frozenset(f".{word}" for word in _VIDEOS.split())  # a GIF is a picture to train on
_OTHERS = frozenset(f".{word}" for word in _OTHER_FILES.split())
NO_MEMORY = -4  # code of OpenCV's error when an allocation fails
MIN_SIDE = 10  # px; smaller images are not trained on

_NO_PICTURE = "truncated or not an image"
_NOT_READ = frozenset({".arw", ".cr2", ".nef", ".pcx", ".tga"})  # nothing in these files says reliably what they are

_ORIENTATION = 0x0112  # the EXIF tag
_JPEG_START, _JPEG_END, _PNG_START = b"\xff\xd8\xff", b"\xff\xd9", b"\x89PNG\r\n\x1a\n"
# Only JPEG decoders gain by these: of other formats OpenCV decodes every pixel first.
_REDUCED = {8: cv2.IMREAD_REDUCED_COLOR_8, 4: cv2.IMREAD_REDUCED_COLOR_4, 2: cv2.IMREAD_REDUCED_COLOR_2}
_SOF_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}

# A broken file is reported by us, in one line, with its name: not a second time by OpenCV (4.10 has no such module).
if hasattr(cv2.utils, "logging"):
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_FATAL)
cv2.setNumThreads(0)  # images are small: threads inside one only compete with the training's


class ImageFault(ValueError):
    """This file cannot be used as an image. The message says why and leaves out the path; ``reason`` is to count by."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason or message.partition(":")[0].partition(" (")[0]


def is_image_name(path: str | os.PathLike[str]) -> bool:
    """Whether this is a picture by its name or, where the name says nothing (``photo``, ``x.jpg_1``), for OpenCV."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix in EXTENSIONS or suffix in _OTHERS or suffix in VIDEO_EXTENSIONS:
        return suffix in EXTENSIONS
    try:
        return bool(cv2.haveImageReader(os.fspath(path)))
    except (cv2.error, UnicodeError):
        return False


def read_image(path: str | os.PathLike[str], at_least: int = 0) -> np.ndarray:
    """Pixels of a file as uint8 [H, W, 3] in BGR order, upright: gray, alpha, CMYK, 16 bits and floats are converted.

    ``at_least``: a JPEG is decoded at a half, a quarter or an eighth of its size, the smallest of which the longer side
    keeps this many px (0: whole). It costs less time, and averages what a small picture could not show.

    Raises:
        ImageFault: missing, empty, truncated, or no image.
    """
    try:
        with open(path, "rb") as file:
            data = file.read()
    except FileNotFoundError:
        raise ImageFault("no such file") from None
    except OSError as error:
        raise ImageFault(f"cannot be read: {error.strerror}") from None
    if not data:
        raise ImageFault("empty file (0 bytes)")
    try:
        return _decode(data, at_least)
    except ImageFault as fault:
        kind = os.path.splitext(path)[1].lower()
        if fault.reason == _NO_PICTURE and kind in _NOT_READ:
            raise ImageFault(f"{kind[1:].upper()} is not read by OpenCV: convert it to JPEG or PNG") from None
        raise


def read_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(width, height) in px of the upright image; JPEG and PNG are not decoded, only their header and end are read.

    Raises:
        ImageFault: missing, empty, truncated, no image, or a side below ``MIN_SIDE``.
    """
    size = _header_size(path)
    if size is None:
        height, width = read_image(path).shape[:2]
        size = (width, height)
    if min(size) < MIN_SIDE:
        raise ImageFault(f"{size[0]} x {size[1]} px is below {MIN_SIDE} px", f"below {MIN_SIDE} px")
    return size


def _header_size(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """(width, height) of a JPEG or PNG; None: another format, or a header that only the decoder can judge."""
    try:
        # mapped, so that only the pages with the header and the end are read from a disk
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:3] == _JPEG_START:
                return _jpeg_size(data)
            return _png_size(data) if data[:8] == _PNG_START else None
    except FileNotFoundError:
        raise ImageFault("no such file") from None
    except ImageFault:
        raise
    except (OSError, ValueError):  # cannot be mapped (an empty file is one such)
        return None


def _decode(data: bytes, at_least: int) -> np.ndarray:
    if data.startswith(_JPEG_START) and data.rfind(_JPEG_END) < 0:
        raise ImageFault("truncated JPEG")  # some OpenCV versions would fill the missing part with gray
    try:
        # ANYDEPTH, because OpenCV's own way to 8 bits drops the lower byte: 12 bits in 16 turn nearly black
        flags = _color_flag(data, at_least) | cv2.IMREAD_ANYDEPTH
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        if image is None and data[:4] in (b"II*\0", b"MM\0*"):  # gray floats: OpenCV makes no colours of them
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
            image = cv2.merge([image] * 3) if image is not None and image.ndim == 2 else None
    except cv2.error as error:
        if error.code == NO_MEMORY:
            raise MemoryError from None
        raise ImageFault(_foreign(data) or f"cannot be decoded: {error.err}") from None
    if image is None:
        raise ImageFault(_foreign(data) or _NO_PICTURE)
    return image if image.dtype == np.uint8 else _to_eight_bits(image)


def _color_flag(data: bytes, at_least: int) -> int:
    """How OpenCV is to decode colours: of a JPEG at the size that ``at_least`` allows. Its orientation is followed."""
    size = _jpeg_size(data) if at_least and data.startswith(_JPEG_START) else None
    if size is not None:
        for divisor, flag in _REDUCED.items():
            if max(size) >= divisor * at_least:
                return flag
    return cv2.IMREAD_COLOR


def _foreign(data: bytes) -> str:
    """What a file really is that is called a picture and cannot be decoded; '' where nobody knows."""
    start = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n")
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer: fetch the picture with 'git lfs pull'"
    if start[:14].lower() == b"<!doctype html" or start[:5].lower() == b"<html":
        return "a web page: the download of the picture failed"
    if data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"mif1", b"msf1", b"hevc"):
        return "HEIC is not read by OpenCV: convert it to JPEG or PNG"
    kinds = {
        b"8BPS": "PSD",
        b"<svg": "SVG",
        b"\xff\x0a": "JPEG XL",
        b"\0\0\0\x0cJXL ": "JPEG XL",
        b"v/1\x01": "OpenEXR",
    }
    for mark, kind in kinds.items():
        if start.startswith(mark) or data.startswith(mark) or (kind == "SVG" and b"<svg" in start):
            return f"{kind} is not read by OpenCV: convert it to JPEG or PNG"
    return ""


def _to_eight_bits(image: np.ndarray) -> np.ndarray:
    """Whole numbers lose what lies below the upper 8 of their 10, 12, 14 or 16 bits (the fewest that hold the largest
    value: cameras store 12 bits in 16). Floats are taken for 0..1, else for 0..255, else scaled from their range.

    Raises:
        ImageFault: floats of which none is finite.
    """
    if np.issubdtype(image.dtype, np.integer):
        largest = int(image.max())
        bits = next((bits for bits in (8, 10, 12, 14, 16) if largest < 1 << bits), 32)
        return (np.maximum(image, 0) >> (bits - 8)).astype(np.uint8)
    finite = image[np.isfinite(image)]
    if not finite.size:
        raise ImageFault("no finite pixel")
    low, high = min(float(finite.min()), 0.0), float(finite.max())
    high = 1.0 if high <= 1 else 255.0 if high <= 255 else high
    scaled = (np.nan_to_num(image, nan=low, posinf=high, neginf=low).astype(np.float64) - low) * (255 / (high - low))
    return np.clip(scaled.round(), 0, 255).astype(np.uint8)


def _jpeg_size(data: mmap.mmap | bytes) -> tuple[int, int] | None:
    """(width, height) from the start-of-frame segment; None where the segments make no sense (the decoder decides)."""
    position, orientation = 2, 1
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # padding
            position += 1
            continue
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        body = data[position + 4 : position + 2 + length]
        if marker == 0xE1 and body.startswith(b"Exif\0\0"):
            orientation = _exif_orientation(body[6:])
        if marker in _SOF_MARKERS and len(body) >= 5:
            height, width = struct.unpack(">HH", body[1:5])
            if not height or not width:
                return None
            if data.rfind(_JPEG_END) < position:  # an earlier end belongs to the thumbnail
                raise ImageFault("truncated JPEG")
            return (height, width) if orientation in (5, 6, 7, 8) else (width, height)
        position += 2 + length
    return None


def _png_size(data: mmap.mmap) -> tuple[int, int] | None:
    if data[12:16] != b"IHDR" or b"eXIf" in data[:4096]:  # which rotations apply to a PNG is up to the decoder
        return None
    if data.rfind(b"IEND") < 0:
        raise ImageFault("truncated PNG")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def _exif_orientation(tiff: bytes) -> int:
    """The orientation (1..8) in the first directory of a TIFF block; 1 where there is none."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None or len(tiff) < 8:
        return 1
    (directory,) = struct.unpack(order + "I", tiff[4:8])
    if directory + 2 > len(tiff):
        return 1
    (count,) = struct.unpack(order + "H", tiff[directory : directory + 2])
    for start in range(directory + 2, min(directory + 2 + 12 * count, len(tiff) - 11), 12):
        tag, kind, _, value = struct.unpack(order + "HHIH", tiff[start : start + 10])
        if tag == _ORIENTATION and kind == 3:
            return value if 1 <= value <= 8 else 1
    return 1
