"""What the pages say by name is there: files and headings that they lead to, settings, fields of a result, routes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from service.events import Result
from service.settings import Settings

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
API = (ROOT / "docs" / "api.md").read_text()


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in re.findall(r"^#+ (.*?) *$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_what_is_there(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        name, _, anchor = link.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), link
        assert not anchor or anchor in anchors(file), link
    for name in re.findall(r"\bONSET_[A-Z0-9_]*[A-Z0-9]\b", page.read_text()):
        assert any(f"onset_{field}".startswith(name.lower()) for field in Settings.model_fields), f"{name} is no setting"


def test_the_page_of_the_api_has_every_field_of_a_result() -> None:
    table = API.partition("## A result")[2].partition("##")[0]
    named = set(re.findall(r"`(\w+)`", "\n".join(line.split("|")[1] for line in table.splitlines() if line.startswith("|"))))
    assert set(Result.__struct_fields__) - named == set()
