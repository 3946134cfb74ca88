"""docs/quickstart.ipynb: as it was run, and that it still runs."""

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "quickstart.ipynb"


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def printed(cells: list[Any]) -> str:
    return "".join("".join(output.get("text", "")) for cell in cells for output in cell["outputs"])


def test_it_is_kept_as_it_was_run() -> None:
    cells = code_cells(json.loads(NOTEBOOK.read_text(encoding="utf-8")))
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])
    pictures = [output for cell in cells for output in cell["outputs"] if "image/jpeg" in output.get("data", {})]
    assert len(pictures) == 3
    assert "18 epochs in" in printed(cells)
    assert NOTEBOOK.stat().st_size < 300_000


@pytest.mark.slow
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Needs the extra "docs". One epoch instead of 18; a cell that fails ends it."""
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("QUICKSTART_EPOCHS", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in code_cells(notebook):
        cell["outputs"] = []
    NotebookClient(notebook, timeout=900, kernel_name="python3").execute()
    words = printed(code_cells(notebook))
    assert (
        "1 epochs in" in words and "detections on 100 images" in words and "largest difference from the model" in words
    )
