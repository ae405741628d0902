"""What the documents promise: their links lead somewhere, and the recipe that the README shows is one."""

import re
from pathlib import Path

import pytest
import yaml

from helpers.launching import ROOT
from nslora_dist.recipe_file import load_recipe

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(document: Path) -> set[str]:
    """Of headings, as GitHub makes them: small letters, digits and hyphens."""
    headings = re.findall(r"(?m)^#+ (.*)$", document.read_text())
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_to_a_file_of_the_repository(document: Path) -> None:
    lost = []
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = document.parent / name if name else document
        if not file.exists() or (anchor and anchor not in anchors(file)):
            lost.append(target)
    assert lost == []


def test_every_page_is_reached_from_the_readme() -> None:
    text = DOCUMENTS[0].read_text()
    assert [path.name for path in DOCUMENTS[1:] if f"docs/{path.name}" not in text] == []


def test_the_readmes_recipe_is_one(tmp_path: Path) -> None:
    (text,) = re.findall(r"(?s)```yaml\n(.*?)```", DOCUMENTS[0].read_text())
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    recipe = load_recipe(str(file))
    assert recipe.adapter.form == "delta" and recipe.train.max_steps == yaml.safe_load(text)["train"]["max_steps"]
    assert recipe.data.path == str(tmp_path / "mine.jsonl"), "./ counts from the recipe's folder"
