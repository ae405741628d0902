"""The study's committed figures: each follows from the committed lines, and no document says anything else."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from helpers.launching import ROOT
from nslora_dist.errors import UserError
from nslora_dist.study.analysis import analyse, whole_arms
from nslora_dist.study.cells import cells_of
from nslora_dist.study.figures import Figures
from nslora_dist.study.lines import of_cells, read_lines, round_floats
from nslora_dist.study.page import filled, section_of, text_of_page, write_page, write_section
from nslora_dist.study.prediction import predict
from nslora_dist.study.settings import Line
from nslora_dist.study.spec import load_study
from nslora_dist.study.summary import text_of

FOLDER = ROOT / "docs" / "study"
STUDY = load_study("frontier")
PAGE = ROOT / "docs" / "study.md.j2"
HEADLINE = ROOT / "docs" / "headline.md.j2"


@pytest.fixture(scope="module")
def lines() -> list[Line]:
    found, torn = read_lines(FOLDER / "cells.jsonl")
    assert torn == 0
    return of_cells(found, cells_of(STUDY))


@pytest.fixture(scope="module")
def summary() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / "summary.json").read_text())
    return found


def leaves(value: Any, where: str = "") -> dict[str, Any]:
    """Path → number or text of a JSON tree."""
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in leaves(inner, f"{where}/{key}").items()}
    if isinstance(value, list):
        return {k: v for place, inner in enumerate(value) for k, v in leaves(inner, f"{where}/{place}").items()}
    return {where: value}


def same(a: Any, b: Any) -> bool:
    """Texts exactly; numbers as far as two machines add alike."""
    return bool(a == (pytest.approx(b, rel=1e-4) if isinstance(b, float) else b))


def figures_of(lines: list[Line], summary: dict[str, Any]) -> Figures:
    return Figures(summary, (FOLDER / "summary.md").read_text(), lines, len(cells_of(STUDY)))


def test_every_line_is_of_this_study_and_of_one_base(lines: list[Line]) -> None:
    assert len(lines) == sum(1 for _ in (FOLDER / "cells.jsonl").open())
    for size in {line["size"] for line in lines}:
        assert len({line["base_hash"] for line in lines if line["size"] == size}) == 1
    assert not [line["version"] for line in lines if "dirty" in line["version"]], "measured by code that nobody has"


def test_the_figures_follow_from_the_lines(lines: list[Line], summary: dict[str, Any]) -> None:
    """Everything but intervals that are drawn at random: a few draws tell that the values are the lines'."""
    again = json.loads(json.dumps(round_floats(analyse(lines, STUDY) | {"prediction": predict(lines, STUDY, draws=2)})))
    drawn = ("/low", "/high", "/share")
    found, expected = (
        {k: v for k, v in leaves(x).items() if not (k.startswith("/prediction") and k.endswith(drawn))}
        for x in (again, summary)
    )
    assert found.keys() == expected.keys()
    different = [key for key in found if not same(found[key], expected[key])]
    assert different == []


def test_the_text_is_the_figures(lines: list[Line], summary: dict[str, Any]) -> None:
    text = (FOLDER / "summary.md").read_text()
    plots = [Path("plots") / name for name in sorted(path.name for path in (FOLDER / "plots").glob("*.png"))]
    missing = len(cells_of(STUDY)) - len(lines)
    again = text_of(summary, name="frontier", missing=missing, plots=plots)
    assert sorted(again.splitlines()) == sorted(text.splitlines())


def test_an_arm_that_was_not_run_whole_does_not_stand_in_the_headline(lines: list[Line]) -> None:
    own = [x for x in lines if (x["size"], x["task"], x["calibration"], x["seed"]) == ("1m", "minimum", "all", 0)]
    cut = [x for x in own if not (x["arm"] == "pissa" and x["learning_rate"] > 1e-3)]
    rows = {}
    for name, few in (("whole", own), ("cut", cut)):
        text = text_of(
            analyse(few, STUDY) | {"prediction": predict(few, STUDY, draws=2)}, name="x", missing=0, plots=[]
        )
        rows[name] = [row for row in text.splitlines() if row.startswith("| pissa |")]
    assert "–" not in rows["whole"][0].split("|")[2] and " 15 |" in rows["whole"][1]
    assert rows["cut"][0] == "| pissa | – | – |" and " 9 of 15 |" in rows["cut"][1]
    found = analyse(cut, STUDY)
    whole = whole_arms(found["settings"][0], found["compared"])
    assert whole.keys() == set(STUDY.grids["frontier"].arms) - {"pissa"}


@pytest.mark.parametrize("document", ["README.md", "docs/study.md"])
def test_documents_quote_the_summary(document: str) -> None:
    """A row of a table that names the study's columns stands in the summary as it is."""
    rows = set((FOLDER / "summary.md").read_text().splitlines())
    known = {row for row in rows if not row.startswith("| :--")}  # a rule, which tables of other things have as well
    quoted, inside = [], False
    for row in (ROOT / document).read_text().splitlines():
        inside = row.startswith("|") and (inside or row in known)
        if inside:
            quoted.append(row)
    assert len(quoted) > 5
    assert [row for row in quoted if row not in rows] == []


def test_the_page_is_its_template_filled_with_the_figures(lines: list[Line], summary: dict[str, Any]) -> None:
    text = text_of_page(PAGE, figures_of(lines, summary))
    assert text == (ROOT / "docs" / "study.md").read_text()


def test_the_readmes_section_is_its_template_filled(lines: list[Line], summary: dict[str, Any], tmp_path: Path) -> None:
    figures = figures_of(lines, summary)
    readme = (ROOT / "README.md").read_text()
    document = tmp_path / "README.md"
    before, inner, after = section_of(readme, document, HEADLINE.name)
    assert inner.count("\n- **") >= 4
    document.write_text(before + "\nan old text\n" + after)
    write_section(document, HEADLINE, figures)
    assert document.read_text() == readme
    changed = document.stat().st_mtime_ns
    write_section(document, HEADLINE, figures)
    assert document.stat().st_mtime_ns == changed, "nothing to say leaves the file alone"
    for text in (before, after, after + before, readme + readme):
        document.write_text(text)
        with pytest.raises(UserError, match="a section needs a line '<!-- headline"):
            write_section(document, HEADLINE, figures)
        assert document.read_text() == text
    with pytest.raises(UserError, match=r"there is no .*nowhere\.md"):
        write_section(tmp_path / "nowhere.md", HEADLINE, figures)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("page.md", "", "ends in .j2"),
        ("page.md.j2", "{{ kept('1m', 'minimum', 'nobody') | n }}", "KeyError: 'nobody'"),
        ("page.md.j2", "{{ kept('9m', 'minimum', 'lora') | n }}", "nothing of ('9m', 'minimum', 'all')"),
        ("page.md.j2", "{{ loss('1m') }}", "'loss' is undefined"),
        ("page.md.j2", "{{ mean('retention', size='9m') | n }}", "no cell has {'size': '9m'}"),
        ("page.md.j2", "{{ scores('dial', 0.5, 'retention') | max }}", "the summary has no dial at 0.5"),
        ("page.md.j2", "{{ kept('1m' }}", "TemplateSyntaxError"),
    ],
)
def test_a_template_asks_for_nothing_that_is_not_there(
    tmp_path: Path, lines: list[Line], summary: dict[str, Any], name: str, text: str, said: str
) -> None:
    template = tmp_path / name
    template.write_text(text)
    with pytest.raises(UserError, match=re.escape(said)):
        write_page(template, Figures(summary, "", lines, 1))
    assert list(tmp_path.iterdir()) == [template]


def test_a_page_is_filled_to_its_width() -> None:
    text = filled("# A\n# heading\n\n- one\n  two\n- " + "word " * 40 + "\n\n| a |\n| b |\n\nlast\nline")
    items = text.split("\n\n")
    assert (items[0], items[2], items[3]) == ("# A\n# heading", "| a |\n| b |", "last line\n")
    first, *rest = items[1].split("\n")
    assert first == "- one two" and rest[1].startswith("  word") and max(map(len, rest)) <= 130
