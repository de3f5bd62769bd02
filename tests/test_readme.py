"""The README and the docs do what they say: every python block runs, every file and name they mention exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> list[tuple[int, str]]:
    """(first line, code) of every ```python block of a page."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text[: match.start(1)].count("\n") + 1, match[1]) for match in found]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A page is one session: its blocks run in order in one namespace, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    session = {"__name__": "__main__"}
    for line, code in blocks(page):
        # padded, so that a traceback shows the line of the page
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), session)


def test_the_readme_has_a_block_and_the_two_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert blocks(ROOT / "README.md")
    for command in ("make compare", "make test"):
        assert re.search(rf"^{command}$", text, re.MULTILINE), f"README.md shows no line {command!r}"


def test_ten_lines_are_enough():
    """The first block of the README is the ten-line tour."""
    _, code = blocks(ROOT / "README.md")[0]
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 10, f"{len(lines)} lines"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_to_files_lead_somewhere(page: Path):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    targets = [t for t in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in t]
    missing = [t for t in targets if not (page.parent / t).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_sf_name_exists(page: Path):
    """`sf.Name` in text or code is a public name of the package."""
    import sdeflow

    names = set(re.findall(r"\bsf\.([A-Za-z_]\w*)", page.read_text(encoding="utf-8")))
    assert sorted(name for name in names if not hasattr(sdeflow, name)) == []
