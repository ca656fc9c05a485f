"""The report as one HTML page that opens offline: pictures inside it, no scripts, all text escaped."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from PIL import Image

from ..pictures import Picture, to_image
from .album import PICTURES, name_of
from .contact import MOST, PictureOf, extremes
from .evaluation import FOUND, Evaluation, PictureScores
from .summary import MEASURES, Row, rankings, wanted
from .tables import HEAD, cells_of

SIDE = 192
STYLE = """body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 76em; padding: 0 1em; }
table { border-collapse: collapse; } th, td { border: 1px solid #ccc; padding: .25em .6em; text-align: left; }
h2 { margin-top: 1.8em; } .row { display: flex; flex-wrap: wrap; gap: .8em; } code { background: #f2f2f2; }
figure { margin: 0; width: 192px; font-size: 12px; } figure img.whole { width: 192px; } dd { margin-left: 1.5em; }
img.crop { width: 48px; height: 48px; margin-right: 3px; }"""
# Nothing is fetched and nothing runs, whatever a name or a prompt holds.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(
    title: str,
    rows: Sequence[Row],
    evaluation: Evaluation,
    picture_of: PictureOf,
    facts: Mapping[str, str],
    linked: bool = True,
) -> str:
    """Return the page.

    Args:
        title: its title.
        rows: the table.
        evaluation: what was measured.
        picture_of: the pictures.
        facts: what else to say of the evaluation, by name.
        linked: whether a picture links to its file beside the page.
    """

    def figures(some: Iterable[PictureScores]) -> str:
        return row(figure(scores, evaluation, picture_of, linked) for scores in some)

    parts = [f"<h1>{escape(title)}</h1>", facts_table(facts), summary_table(rows), meanings(rows)]
    if evaluation.references:
        parts.append("<h2>What the concepts were compared with</h2>")
        for name, crops in evaluation.references.items():
            parts.append(f"<h3>{escape(name)}</h3>{row(map(crop, crops))}")
    for order, scores in rankings(evaluation).items():
        best, worst = ([s for s, _ in some] for some in extremes(scores, MOST))
        parts.append(f"<h2>Best and worst by {escape(order)}</h2>")
        parts.append(f"<h3>Best</h3>{figures(best)}<h3>Worst</h3>{figures(worst)}")
    parts.append("<h2>All pictures</h2>")
    for number, prompt in enumerate(evaluation.prompts):
        diversity = "".join(
            f", {MEASURES[name].title} {value:.3f}"
            for name, value in evaluation.diversity[number].items()
        )
        parts.append(
            f"<h3>{number + 1}: <code>{escape(str(prompt))}</code>{escape(diversity)}</h3>"
        )
        parts.append(figures(s for s in evaluation.pictures if s.prompt == number))
    return document(title, parts)


def document(title: str, parts: Iterable[str]) -> str:
    """Return a whole HTML document around parts of it."""
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style>"
    )
    body = "\n".join(parts)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def row(figures: Iterable[str]) -> str:
    return f'<div class="row">{"".join(figures)}</div>'


def html_table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a table of escaped texts."""
    titles = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>\n" for line in lines
    )
    return f"<table><tr>{titles}</tr>\n{body}</table>"


def facts_table(facts: Mapping[str, str]) -> str:
    return html_table(("what", "value"), facts.items())


def summary_table(rows: Sequence[Row]) -> str:
    return "<h2>Summary</h2>" + html_table(HEAD, map(cells_of, rows))


def meanings(rows: Sequence[Row]) -> str:
    """Return what the measures in the table mean, and how its interval is made."""
    listed = "".join(
        f"<dt>{escape(MEASURES[name].title)}</dt><dd>{escape(MEASURES[name].meaning)}</dd>"
        for name in dict.fromkeys(row.measure for row in rows)
    )
    return (
        f"<dl>{listed}</dl><p>Means are over prompts, each of which counts the same; the interval is Student's, "
        "over the prompts' means.</p>"
    )


def figure(
    scores: PictureScores, evaluation: Evaluation, picture_of: PictureOf, linked: bool
) -> str:
    """Return a picture with what was found in it and its values."""
    image = picture_of(scores.prompt, scores.seed).convert("RGB")
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    shown = f'<img class="whole" src="{data(image)}" alt="">'
    if linked:
        shown = f'<a href="{PICTURES}/{name_of(scores.prompt, scores.seed)}.png">{shown}</a>'
    lines = [f"prompt {scores.prompt + 1}, seed {scores.seed}"]
    lines += [
        f"{label(key)} {value:.3f}" for key, value in scores.values.items() if key[0] != FOUND
    ]
    lines += [f"{name}: not found" for name in sorted(wanted(scores) - set(scores.crops))]
    crops = "".join(crop(of, name) for name, of in scores.crops.items())
    return f"<figure>{shown}<br>{crops}<br>{'<br>'.join(map(escape, lines))}</figure>"


def label(key: tuple[str, str]) -> str:
    measure, concept = key
    return f"{concept}: {MEASURES[measure].title}" if concept else MEASURES[measure].title


def crop(picture: Picture, name: str = "") -> str:
    return f'<img class="crop" src="{data(to_image(picture))}" alt="" title="{escape(name)}">'


def data(image: Image.Image) -> str:
    """Return an image as a URL that holds it, as JPEG."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
