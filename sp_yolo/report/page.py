"""report.html: one file that can be mailed, with tables and pictures inside."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from sp_yolo.errors import StorageError
from sp_yolo.eval.coco import EvalResult

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:0 auto;max-width:72rem;padding:1rem 1.5rem;color:#1b1f24;background:#fff}
h1{font-size:1.6rem;margin:.5rem 0} h2{font-size:1.15rem;margin:2rem 0 .6rem;border-bottom:1px solid #d5dae0}
.cards{display:flex;flex-wrap:wrap;gap:.8rem;margin:1rem 0}
.cards div{border:1px solid #d5dae0;border-radius:.5rem;padding:.5rem 1rem;min-width:6.5rem}
.cards b{display:block;font-size:1.4rem} .cards span{color:#57606a;font-size:.85rem}
.wide{overflow-x:auto} table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .8rem;text-align:right;border-bottom:1px solid #eaeef2;white-space:nowrap}
th:first-child,td:first-child{text-align:left} tbody tr:first-child{font-weight:600;background:#f6f8fa}
.facts td:last-child{text-align:left;white-space:normal;overflow-wrap:anywhere}
.facts tr:first-child{font-weight:inherit;background:none}
pre{background:#f6f8fa;padding:.8rem;overflow-x:auto;font-size:.85rem}
.pictures{display:grid;grid-template-columns:1fr 1fr;gap:1rem}
figure{margin:0;grid-column:1/-1} figure.half{grid-column:auto} figcaption{color:#57606a;font-size:.85rem}
img{max-width:100%;height:auto;border:1px solid #eaeef2}
"""
CAPTIONS = {
    "results.png": "Losses, precision, recall and mAP over the epochs",
    "PR_curve.png": "Precision over recall at IoU .5",
    "F1_curve.png": "F1 over the confidence threshold at IoU .5",
    "P_curve.png": "Precision over the confidence threshold at IoU .5",
    "R_curve.png": "Recall over the confidence threshold at IoU .5",
    "confusion_matrix.png": "Confusion matrix at confidence .25 and IoU .45: boxes, and shares of each true class",
    "channels.png": "Channels of each layer: what is left of them",
    "worst_missed.jpg": "Most missed labels: orange is missed, green is found",
    "worst_false.jpg": "Most false boxes: red is false, green are the labels",
}


def write_page(
    path: str | Path,
    title: str,
    result: EvalResult,
    columns: Sequence[str],
    rows: Sequence[tuple[str, int, int, float, float, float, float]],
    facts: Mapping[str, object],
    pictures: Sequence[Path],
) -> None:
    """Write the page. `rows` belong to `columns`; `pictures` (PNG or JPEG) are shown in the order given.

    Raises:
        StorageError: the page cannot be written.
    """
    cards = (
        ("mAP@.5:.95", result.map50_95),
        ("mAP@.5", result.map50),
        ("mAP@.75", result.map75),
        ("precision", result.precision),
        ("recall", result.recall),
        ("F1", result.f1),
        ("at confidence", result.confidence),
    )
    body = "".join(f"<tr>{''.join(_cell(value) for value in row)}</tr>\n" for row in rows)
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    about = "".join(f"<tr><td>{escape(k)}</td><td>{escape(str(v))}</td></tr>\n" for k, v in facts.items())
    page = [
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width,initial-scale=1'>",
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        f"<p>{result.images} images, {result.labels} labels, {len(result.per_class)} classes.</p>",
        "<div class='cards'>" + "".join(f"<div><b>{v:.3f}</b><span>{k}</span></div>" for k, v in cards) + "</div>",
        f"<table class='facts'>{about}</table>" if facts else "",
        f"<h2>Classes</h2><div class='wide'><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>",
        "<p>Precision and recall are at IoU .5 and the confidence with the highest mean F1.</p>",
        f"<h2>COCO summary</h2><pre>{escape(result.summary_text)}</pre>",
        "<h2>Pictures</h2>" if pictures else "",
        f"<div class='pictures'>{''.join(_figure(picture) for picture in pictures)}</div>" if pictures else "",
        "</body></html>\n",
    ]
    try:
        Path(path).write_text("\n".join(part for part in page if part), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror}") from None


def _cell(value: str | int | float) -> str:
    return f"<td>{value:.3f}</td>" if isinstance(value, float) else f"<td>{escape(str(value))}</td>"


def _figure(picture: Path) -> str:
    kind = "png" if picture.suffix == ".png" else "jpeg"
    data = base64.b64encode(picture.read_bytes()).decode()
    caption = escape(CAPTIONS.get(picture.name, picture.stem.replace("_", " ")))
    image = f"<img alt='{caption}' src='data:image/{kind};base64,{data}'>"
    half = " class='half'" if picture.stem.endswith("_curve") else ""
    return f"<figure{half}><figcaption>{caption}</figcaption>{image}</figure>"
