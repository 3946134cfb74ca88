"""README.md: short, every link leads somewhere, every figure stands in docs/results.md or its archive."""

import re
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
TEXT = (CHECKOUT / "README.md").read_text(encoding="utf-8")
PROSE = re.sub(r"^```.*?^```$|^    .*?$", "", TEXT, flags=re.M | re.S)
FIGURE = re.compile(r"(\d+\.\d+) ± (\d+\.\d+)")


def test_it_is_short() -> None:
    lines = TEXT.splitlines()
    assert len(lines) <= 80
    assert max(map(len, lines)) <= 120


def test_it_reads_easily() -> None:
    for opening, closing in ("()", "[]"):
        depth = 0
        for letter in PROSE:
            depth += (letter == opening) - (letter == closing)
            assert 0 <= depth <= 1, f"brackets {opening}{closing} in brackets"
    for sentence in re.split(r"[.:!?]\s|\n\n|\|", PROSE):
        assert sentence.count(";") < 2, sentence


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert len(targets) > 10
    for target in targets:
        assert target.startswith("https://doi.org/") or (CHECKOUT / target.partition("#")[0]).is_file(), target


def test_two_commands_set_it_up() -> None:
    commands = re.findall(r"^    (python3 -m venv .*)$", TEXT, flags=re.M)
    programs = [command.split(".venv/bin/python ")[-1] for command in commands]
    assert programs == ["train_sp.py", "-m pytest -q -n 2 --dist loadfile"]


def test_figures_are_those_of_the_results() -> None:
    """Two decimals there, one here."""
    pages = ("results.md", "results-archive.md")
    results = "".join((CHECKOUT / "docs" / page).read_text(encoding="utf-8") for page in pages)
    measured = [(float(mean), float(half)) for mean, half in FIGURE.findall(results)]
    shown = [(float(mean), float(half)) for mean, half in FIGURE.findall(TEXT)]
    assert len(shown) >= 10
    for mean, half in shown:
        assert any(abs(mean - m) < 0.0501 and abs(half - h) < 0.0501 for m, h in measured), f"{mean} ± {half}"
