"""Every link from one of the project's pages to another, or to a picture, leads somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "web").rglob("*.md")]
HELP = ROOT / "web" / "docs"
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links(page: Path) -> None:
    """The front end looks for a help page's pictures from the folder of all pages, whatever the language."""
    folder = HELP if HELP in page.parents else page.parent
    for target, _ in LINK.findall(page.read_text(encoding="utf-8")):
        if not target.startswith(("http:", "https:")):
            assert (folder / target).exists(), target
