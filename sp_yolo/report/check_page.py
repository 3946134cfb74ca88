"""check.html of `sp-yolo check`: labels drawn, statistics, problems by kind with pictures of them, all in one file."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import cv2
import numpy as np

from sp_yolo.data import DetectionDataset
from sp_yolo.data.images import ImageFault, read_image
from sp_yolo.data.statistics import class_counts
from sp_yolo.errors import StorageError
from sp_yolo.report.page import STYLE
from sp_yolo.report.pictures import class_color, draw_box

THUMBNAIL = 240  # px
_OWN_STYLE = """
.verdict{padding:.6rem 1rem;border-radius:.5rem;font-weight:600;background:#e6f4ea}
.verdict.bad{background:#fde7e7} .thumbs{display:flex;flex-wrap:wrap;gap:.6rem}
.thumbs figure{width:240px;overflow-wrap:anywhere} .found tr:first-child{font-weight:inherit;background:none}
td.words{white-space:normal;text-align:left;overflow-wrap:anywhere} li{overflow-wrap:anywhere}
"""


def write_check_page(
    path: Path,
    verdict: str,
    splits: Mapping[str, DetectionDataset],
    names: Sequence[str],
    errors: Sequence[str],
    warnings: Sequence[str],
) -> None:
    """Write the page; pictures that lie beside it as labels_SPLIT.jpg and .png are put into it.

    Raises:
        StorageError: it cannot be written.
    """
    parts = [
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width,initial-scale=1'>",
        f"<title>check</title><style>{STYLE}{_OWN_STYLE}</style></head><body>",
        "<h1>A look at the data</h1>",
        f"<p class='verdict{' bad' if errors else ''}'>{escape(verdict)}</p>",
        _list("Errors: training would stop", errors),
        _list("Warnings", warnings),
        _found(splits),
        _classes(splits, names),
    ]
    for split, data in splits.items():
        parts.append(_problems(split, data, names))
        for suffix, words in ((".jpg", "labels drawn"), (".png", "statistics of the labels")):
            picture = path.parent / f"labels_{split}{suffix}"
            if picture.is_file():
                parts.append(f"<h2>{escape(split)}: {words}</h2>{_image(picture.read_bytes(), suffix[1:], words)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join([*filter(None, parts), "</body></html>\n"]), "utf-8", errors="backslashreplace")
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror}") from None


def _list(title: str, lines: Sequence[str]) -> str:
    rows = "".join(f"<li>{escape(line)}</li>\n" for line in lines)
    return f"<h2>{title}</h2><ul>\n{rows}</ul>" if lines else ""


def _found(splits: Mapping[str, DetectionDataset]) -> str:
    """What became of the images and boxes of each split."""
    head = ("split", "images", "with labels", "background", "no label file", "unread", "boxes", "dropped", "ignored")
    rows = []
    for split, data in splits.items():
        tally = data.tally
        images = (tally.found, tally.labelled, tally.background, tally.no_label_file, tally.unread.total())
        rows.append((split, *images, tally.boxes, tally.dropped.total(), tally.ignored))
    return f"<h2>Found</h2>{_table(head, rows)}" if rows else ""


def _classes(splits: Mapping[str, DetectionDataset], names: Sequence[str]) -> str:
    counts = {split: class_counts(data) for split, data in splits.items()}
    head = ["class", *(f"{split} {what}" for split in splits for what in ("images", "boxes"))]
    rows = [(name, *(int(n) for each in counts.values() for n in each[:, index])) for index, name in enumerate(names)]
    return f"<h2>Classes</h2>{_table(head, rows)}" if splits else ""


def _problems(split: str, data: DetectionDataset, names: Sequence[str]) -> str:
    """Per reason its number, its first place and pictures of it with the labels that are left."""
    tally = data.tally
    counted = {**tally.unread, **tally.dropped, **tally.notes}
    if tally.no_label_file:
        counted["no label file"] = tally.no_label_file
    if tally.orphans:
        counted["label file without image"] = tally.orphans
    places = {path: index for index, path in enumerate(data.paths)}
    parts = []
    for reason, count in sorted(counted.items(), key=lambda pair: -pair[1]):
        parts.append(f"<h3>{count} x {escape(reason)}</h3><p>{escape(tally.examples.get(reason, ''))}</p>")
        thumbs = [_thumbnail(path, data, places, names) for path in tally.pictures.get(reason, [])]
        parts.append(f"<div class='thumbs'>{''.join(thumbs)}</div>")
    return f"<h2>{escape(split)}: problems by kind</h2>{''.join(parts)}" if parts else ""


def _thumbnail(path: str, data: DetectionDataset, places: Mapping[str, int], names: Sequence[str]) -> str:
    try:
        image = read_image(path)
    except ImageFault as fault:
        return f"<figure><figcaption>{escape(Path(path).name)}: {escape(str(fault))}</figcaption></figure>"
    height, width = image.shape[:2]
    scale = THUMBNAIL / max(height, width)
    wh = (max(round(width * scale), 1), max(round(height * scale), 1))
    small = np.ascontiguousarray(cv2.resize(image, wh, interpolation=cv2.INTER_AREA)[..., ::-1])
    for label, *box in data.labels[places[path]].tolist() if path in places else []:
        centre, half = np.array(box[:2]) * wh, np.array(box[2:]) * wh / 2
        draw_box(small, np.concatenate((centre - half, centre + half)), class_color(int(label)), names[int(label)])
    data_of = cv2.imencode(".jpg", small[..., ::-1])[1].tobytes()
    name = Path(path).name
    return f"<figure>{_image(data_of, 'jpg', name)}<figcaption>{escape(name)}</figcaption></figure>"


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    top = "".join(f"<th>{escape(word)}</th>" for word in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>\n" for row in rows)
    return f"<div class='wide'><table class='found'><thead><tr>{top}</tr></thead><tbody>\n{body}</tbody></table></div>"


def _image(data: bytes, kind: str, words: str) -> str:
    mime = "png" if kind == "png" else "jpeg"
    return f"<img alt='{escape(words)}' src='data:image/{mime};base64,{base64.b64encode(data).decode()}'>"
