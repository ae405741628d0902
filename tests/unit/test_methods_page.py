"""docs/methods.md keeps what is cited of it, and what it names is there."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "nslora_dist"
PAGE = ROOT / "docs" / "methods.md"
MADE = ROOT / "docs" / "recipe.md"
"""Of docstrings, whose citations are looked at where they stand."""
FOLDERS = ("nslora_dist", "launch", "tests", "benchmarks", "docs", "recipes", "ds_configs")
TEXTS = {".py", ".md", ".j2", ".yaml", ".json", ".sh", ".sbatch"}
SECTION = r"§(\d+[a-z]?(?:\.\d+)?)"
# One section or a list of them, which may go on in the next line of a docstring or comment.
CITATION = re.compile(rf"docs/methods\.md((?:(?:,|\s|#|\band\b|\bto\b)*{SECTION})+)")
NAMED = re.compile(r"`([\w/]+\.py)`: (`[\w.]+`(?:, `[\w.]+`)*)")


def sections() -> set[str]:
    return set(re.findall(r"^#+ (\d+[a-z]?(?:\.\d+)?)\.? ", PAGE.read_text(encoding="utf-8"), re.MULTILINE))


def files() -> Iterator[Path]:
    yield ROOT / "README.md"
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in TEXTS and path not in (PAGE, MADE, Path(__file__).resolve()):
                yield path


def cited(text: str) -> list[str]:
    """The sections that a text cites of the page."""
    return [section for match in CITATION.finditer(text) for section in re.findall(SECTION, match[1])]


@cache
def names(module: Path) -> set[str]:
    """What a module defines at its top, and ``Class.name`` of what its classes do."""
    found = set()
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


def named(page: str) -> list[tuple[str, str]]:
    """(module, name) of every "`module.py`: `name`, `name`"; the page's lines break anywhere."""
    pairs = NAMED.findall(" ".join(page.split()))
    return [(module, name) for module, listed in pairs for name in re.findall(r"`([\w.]+)`", listed)]


def test_citations_are_found_wherever_a_line_breaks() -> None:
    assert cited("(docs/methods.md §1.1 to §1.3, §1c,\n    §1d) and docs/methods.md\n# §2.1; arXiv 1 §7") == [
        *("1.1", "1.3", "1c", "1d"),
        "2.1",
    ]
    assert cited("as docs/methods.md says, §1c") == [] == cited("METHODS.md §1c")


def test_every_section_that_is_cited_exists() -> None:
    known, count = sections(), 0
    for path in files():
        text = path.read_text(encoding="utf-8")
        found = cited(text)
        count += len(found)
        assert set(found) <= known, path
        assert len(found) == text.count("§"), f"{path}: a section sign that stands for no section of {PAGE.name}"
    assert count > 70


def test_the_page_refers_to_sections_that_it_has() -> None:
    inside = re.findall(SECTION, PAGE.read_text(encoding="utf-8"))
    assert len(inside) > 10 and set(inside) <= sections()


def test_what_the_page_names_exists() -> None:
    page = PAGE.read_text(encoding="utf-8")
    pairs = named(page)
    assert len(pairs) > 60
    assert [(module, name) for module, name in pairs if name not in names(PACKAGE / module)] == []
    for place in re.findall(r"`([\w/.]+\.(?:py|yaml))`", page):
        assert (PACKAGE / place).is_file() or (ROOT / place).is_file(), place
    for link in re.findall(r"\]\(([\w/.]+)\)", page):
        assert (PAGE.parent / link).is_file(), link


@pytest.mark.parametrize("wrong", ["`null_space.py`: `leak`, `lake`", "`budget.py`: `Budget.enforced`"])
def test_a_name_that_is_not_there_is_seen(wrong: str) -> None:
    assert any(name not in names(PACKAGE / module) for module, name in named(wrong))
