"""One file over HTTP: a broken connection is taken up again where it broke."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

CHUNK = 1 << 20  # bytes
TIMEOUT = 60  # seconds without a byte
ATTEMPTS = 5  # in a row without a byte
_BROKEN = (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError)


class TransferFailed(Exception):
    """The file could not be had; the message names the address and the reason."""


def receive(url: str, part: Path, size: int | None = None) -> None:
    """Append to ``part`` until it has the whole file, of ``size`` bytes where that is known beforehand.

    Raises:
        TransferFailed: the address cannot be reached, or offers a file of another size. ``part`` stays, to go on from.
        OSError: ``part`` cannot be written.
    """
    if size is not None and part.exists() and part.stat().st_size > size:
        part.unlink()
    failures = 0
    with tqdm(total=size, unit="B", unit_scale=True, desc=part.stem, dynamic_ncols=True) as bar:
        while True:
            start = part.stat().st_size if part.exists() else 0
            bar.update(start - bar.n)
            if start == size:
                return
            try:
                size = _receive_once(url, part, start, size, bar)
            except urllib.error.HTTPError as error:
                if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and start and size is None:
                    part.unlink()  # nothing is missing of it, but nobody knows whether it is whole
                    continue
                raise TransferFailed(f"{url}: {error.reason}") from None
            except _BROKEN as error:
                grown = part.exists() and part.stat().st_size > start
                failures = 1 if grown else failures + 1
                if failures >= ATTEMPTS:
                    raise TransferFailed(f"{url}: {getattr(error, 'reason', None) or error}") from None
                time.sleep(min(2.0**failures, 30) / 4)


def _receive_once(url: str, part: Path, start: int, size: int | None, bar: tqdm) -> int:
    """Append what comes in one connection; returns the size of the whole file."""
    headers = {"User-Agent": "sp-yolo", **({"Range": f"bytes={start}-"} if start else {})}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as answer:
        continued = answer.status == 206
        if continued and not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise TransferFailed(
                f"{url}: it sent {answer.headers.get('Content-Range')} when asked for bytes from {start}"
            )
        length = answer.headers.get("Content-Length")
        whole = (start if continued else 0) + int(length) if length else size
        if size is not None and whole != size:
            raise TransferFailed(f"{url}: it offers {whole} bytes, the published file has {size}")
        with open(part, "ab" if continued else "wb") as file:  # a server without ranges starts again
            bar.update(file.tell() - bar.n)
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    received = part.stat().st_size
    if whole is not None and received < whole:
        raise http.client.IncompleteRead(b"", whole - received)
    return received if whole is None else whole
