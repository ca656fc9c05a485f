"""What is wrong in the graph around a node that learns, said before anything is learned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import folder_paths

from ..em_core.errors import UserError
from ..em_core.examples import Example
from ..em_core.exchange.saving import SUFFIX, embedding_name, require_case
from ..em_core.exchange.triggers import read_triggers, require_pieces
from ..em_core.prompts import require_apart
from .host.families import encoder_widths
from .host.text import vocabularies

Graph = Mapping[str, Mapping[str, Any]]
SAVE = "SaveConcepts"


def require_savable(
    graph: Graph, node: str, output: int, names: Sequence[str], family: str, clip: Any
) -> None:
    """Refuse what each Save Concepts behind an output would refuse of its concepts.

    Args:
        graph: what is queued, in API format.
        node, output: whose concepts are saved.
        names: of the concepts.
        family: of the models.
        clip: that the concepts are learned on.

    Raises:
        UserError: trigger words or file names cannot be used.
    """
    for inputs in savers(graph, node, output):
        require_apart(names)
        name, triggers = inputs.get("name"), inputs.get("triggers")
        if isinstance(triggers, str) and inputs.get("exports") is True:
            wanted = read_triggers(triggers, names)
            if inputs.get("clip") == graph.get(node, {}).get("inputs", {}).get("clip"):
                words = [word for of in wanted.values() for word in of]
                require_pieces(words, vocabularies(clip, encoder_widths(clip)))
        if isinstance(name, str) and inputs.get("overwrite") is True:
            require_case(files_of(name, names, family))


def require_masks(examples: Sequence[Example]) -> None:
    """Say where masks go in the graph if the examples lack some that are to be learned under.

    Raises:
        UserError: a picture has no mask of a concept that its prompt marks.
    """
    for number, example in enumerate(examples, start=1):
        names = example.prompt.names
        missing = [name for name in names if name not in example.masks]
        if missing:
            raise UserError(
                f"No mask of {', '.join(missing)} in picture {number}, though 'masks' of this node is 'given'. "
                f"Connect masks to the input 'masks' of its Concept Example, one for each of {', '.join(names)} "
                "in this order; or choose 'find and improve' on this node."
            )


def savers(graph: Graph, node: str, output: int) -> Iterator[Mapping[str, Any]]:
    """Yield the inputs of each Save Concepts that is linked to an output."""
    for other in graph.values():
        inputs = other.get("inputs", {})
        if other.get("class_type") == SAVE and inputs.get("concepts") == [node, output]:
            yield inputs


def files_of(name: str, names: Sequence[str], family: str) -> list[Path]:
    """Return the files that Save Concepts may write under a name."""
    own, loras, embeddings = (
        Path(folder_paths.get_folder_paths(kind)[0])
        for kind in ("visual_concepts", "loras", "embeddings")
    )
    exported = [embeddings / f"{embedding_name(name, n, names, family)}{SUFFIX}" for n in names]
    return [own / f"{name}{SUFFIX}", loras / f"{name}{SUFFIX}", *exported]
