"""The numbers as text on a screen and as CSV files."""

import csv
import io
from collections.abc import Iterable, Sequence

from .album import PICTURES, name_of
from .evaluation import Evaluation
from .summary import MEASURES, Row, by_prompt

HEAD = ("measure", "concept", "mean", "95% interval", "better", "values")
Cell = str | float | int | None


def cells_of(row: Row) -> tuple[str, ...]:
    """Return a line of the table as texts."""
    ends = "" if row.ends is None else f"{row.ends[0]:.3f} to {row.ends[1]:.3f}"
    measure = MEASURES[row.measure]
    return (measure.title, row.concept, f"{row.mean:.3f}", ends, measure.better, str(row.values))


def table(rows: Sequence[Row]) -> str:
    """Return the table with aligned columns, for a screen."""
    lines = [HEAD, *map(cells_of, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def summary_csv(rows: Sequence[Row]) -> str:
    """Return the table as CSV, with the ends of the intervals as numbers."""
    head = ("measure", "concept", "mean", "low", "high", "values")
    lines = ((r.measure, r.concept, r.mean, *(r.ends or ("", "")), r.values) for r in rows)
    return written(head, lines)


def pictures_csv(evaluation: Evaluation) -> str:
    """Return one line per picture: its prompt, seed and file, and a column per measure and concept."""
    there = {key for scores in evaluation.pictures for key in scores.values}
    keys = [(m, c) for m in MEASURES for c in ("", *evaluation.concepts) if (m, c) in there]
    lines = (
        (
            scores.prompt + 1,
            str(evaluation.prompts[scores.prompt]),
            scores.seed,
            f"{PICTURES}/{name_of(scores.prompt, scores.seed)}.png",
            *(scores.values.get(key) for key in keys),
        )
        for scores in evaluation.pictures
    )
    return written(("prompt", "text", "seed", "file", *map(column, keys)), lines)


def prompts_csv(evaluation: Evaluation) -> str:
    """Return one line per prompt: its pictures' means, and their diversity."""
    groups = by_prompt(evaluation)
    there = {key for group in groups for key in group}
    keys = [(m, c) for m in MEASURES for c in ("", *evaluation.concepts) if (m, c) in there]
    lines = (
        (
            number,
            str(prompt),
            *(sum(group[key]) / len(group[key]) if key in group else None for key in keys),
        )
        for number, (prompt, group) in enumerate(
            zip(evaluation.prompts, groups, strict=True), start=1
        )
    )
    return written(("prompt", "text", *map(column, keys)), lines)


def column(key: tuple[str, str]) -> str:
    """Return a column's name, such as `dino:rex`."""
    return ":".join(filter(None, key))


def written(head: Sequence[str], lines: Iterable[Sequence[Cell]]) -> str:
    """Return lines as CSV; what was not measured is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(["" if cell is None else cell for cell in line] for line in lines)
    return text.getvalue()
