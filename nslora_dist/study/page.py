"""A page about a study, or a section of one, from a template: prose whose figures are looked up and never typed.

A template is Jinja's, in Markdown. ``{{ kept('1m', 'minimum', 'lora') | n }}`` becomes .270; ``figures.py`` says
what may be asked for. Lines are filled anew, so that a figure's length does not matter.
"""

import re
import textwrap
from pathlib import Path

from nslora_dist import artifacts
from nslora_dist.errors import UserError
from nslora_dist.study.figures import Figures
from nslora_dist.study.written import number, rate

WIDTH = 130
SUFFIX = ".j2"


def write_page(template: Path, figures: Figures) -> Path:
    """Fills a template; beside it lies the page, named without ``.j2``.

    Args:
        template: ends in ``.j2``.
        figures: what it may ask for.

    Raises:
        UserError: the template's name, or something in it that the summary does not have.
    """
    if template.suffix != SUFFIX or not template.is_file():
        raise UserError(f"--page {template}: wanted is a template that exists, with a name that ends in {SUFFIX}")
    page = template.with_suffix("")
    artifacts.write_text(page, text_of_page(template, figures))
    return page


def write_section(document: Path, template: Path, figures: Figures) -> None:
    """Fills a template into a document, between ``<!-- NAME -->`` and ``<!-- /NAME -->``, its name.

    The rest is as for ``write_page``.

    Raises:
        UserError: as there; or the document does not have the two marks, once each and in this order.
    """
    if not (template.is_file() and document.is_file()):
        missing = next(path for path in (template, document) if not path.is_file())
        raise UserError(f"--section {document} {template}: there is no {missing}")
    before, inner, after = section_of(document.read_text(encoding="utf-8"), document, template.name)
    text = text_of_page(template, figures)
    if text.strip() != inner.strip():
        artifacts.write_text(document, f"{before}\n{text}{after}")


def section_of(text: str, document: Path, name: str) -> tuple[str, str, str]:
    """A document's text up to the mark of a section and with it, the section, and the rest from its end mark on."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(start) != 1 or text.count(end) != 1 or text.index(end) < text.index(start):
        raise UserError(f"{document}: a section needs a line '{start}' and, behind it, a line '{end}'")
    at, to = text.index(start) + len(start), text.index(end)
    return text[:at], text[at:to], text[to:]


def text_of_page(template: Path, figures: Figures) -> str:
    """The page as ``write_page`` writes it."""
    from jinja2 import Environment, StrictUndefined, TemplateError

    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    environment.filters |= {"n": number, "n2": lambda value: number(value, 2), "percent": lambda value: f"{value:.0%}"}
    environment.filters["percent1"] = lambda value: f"{value:.1%}"
    environment.filters["rate"] = rate
    try:
        asked = environment.from_string(template.read_text(encoding="utf-8"))
        text = asked.render(figures.names())
    except (TemplateError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{template}: {type(error).__name__}: {error}") from error
    return filled(text)


def filled(text: str) -> str:
    """Paragraphs and lists filled to ``WIDTH``; headings, tables and pictures as they are."""
    blocks = []
    for block in text.strip().split("\n\n"):
        if re.match(r"[|#!]", block):
            blocks.append(block)
            continue
        items = re.split(r"\n(?=- )", block.strip("\n"))
        blocks.append("\n".join(_filled(" ".join(item.split())) for item in items))
    return "\n\n".join(blocks) + "\n"


def _filled(item: str) -> str:
    indent = "  " if item.startswith("- ") else ""
    return textwrap.fill(item, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
