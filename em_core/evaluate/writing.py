"""Writing an evaluation's files."""

from collections.abc import Mapping
from html import escape
from pathlib import Path

from ..files import write_text
from ..pictures import save_image
from .contact import PictureOf, contact_sheet
from .evaluation import Evaluation
from .page import document, facts_table, html_table, meanings, page, summary_table
from .summary import Row, summarise
from .tables import HEAD, cells_of, pictures_csv, prompts_csv, summary_csv


def write_report(
    folder: Path,
    title: str,
    evaluation: Evaluation,
    picture_of: PictureOf,
    facts: Mapping[str, str],
) -> tuple[Row, ...]:
    """Write report.html, sheet.png, summary.csv, pictures.csv and prompts.csv, and return the table.

    Args:
        folder: where they go; the pictures are in its `pictures/`.
        title: the report's title.
        evaluation: what was measured.
        picture_of: the pictures.
        facts: what else the report says, by name.

    Raises:
        UserError: the folder cannot be written to.
    """
    rows = summarise([evaluation])
    write_text(folder / "summary.csv", summary_csv(rows))
    write_text(folder / "pictures.csv", pictures_csv(evaluation))
    write_text(folder / "prompts.csv", prompts_csv(evaluation))
    save_image(folder / "sheet.png", contact_sheet(evaluation, picture_of))
    write_text(folder / "report.html", page(title, rows, evaluation, picture_of, facts))
    return rows


def write_overview(
    folder: Path, title: str, evaluations: Mapping[str, Evaluation], facts: Mapping[str, str]
) -> tuple[Row, ...]:
    """Write report.html and summary.csv of several cases, whose own reports are in folders of their names.

    Raises:
        UserError: the folder cannot be written to.
    """
    rows = summarise(list(evaluations.values()))
    write_text(folder / "summary.csv", summary_csv(rows))
    parts = [f"<h1>{escape(title)}</h1>", facts_table(facts), summary_table(rows), meanings(rows)]
    for name, evaluation in evaluations.items():
        parts.append(f'<h2><a href="{escape(name)}/report.html">{escape(name)}</a></h2>')
        parts.append(html_table(HEAD, map(cells_of, summarise([evaluation]))))
    write_text(folder / "report.html", document(title, parts))
    return rows
