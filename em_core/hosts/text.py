"""The text encoders of a Stable Diffusion pipeline: prompts of any length with concepts in them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..errors import UserError
from ..model.protocol import Conditioning, TextStream
from ..model.vectors import TableStatistics, spread_pieces
from ..prompts import ConceptPrompt, ConceptVectors, not_learned

SD2_WIDTH = 1024
WORD_LENGTH = 8
Piece = tuple[int, str]
"""An id of the vocabulary, and the concept whose vector stands in its place ("" for none)."""


@dataclass(frozen=True)
class Row:
    """A prompt as a text encoder reads it.

    Attributes:
        ids: of all its chunks, one after another.
        columns: concept name -> positions at which its vectors stand.
        end: position of the first end token.
    """

    ids: tuple[int, ...]
    columns: Mapping[str, tuple[int, ...]]
    end: int


@dataclass(frozen=True)
class TextEncoder:
    """A CLIP text encoder with its tokenizer.

    Attributes:
        name: as in embedding files: "clip_l", "clip_g" or "clip_h".
        part: name of the pipeline's part, which prefixes the names of its layers.
        model, tokenizer: those of the pipeline.
        penultimate: whether the last layer but one is read, without the last norm, as SDXL does.
    """

    name: str
    part: str
    model: Any
    tokenizer: Any
    penultimate: bool = False

    @property
    def table(self) -> nn.Parameter:
        """The token table [v, d]."""
        return self.model.get_input_embeddings().weight

    @property
    def width(self) -> int:
        return self.table.shape[1]

    @property
    def length(self) -> int:
        """Positions of a chunk, those of the begin and end tokens among them."""
        return self.model.config.max_position_embeddings

    def pieces(self, text: str) -> list[int]:
        """Return the ids of plain text of any length."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def row(self, prompt: ConceptPrompt, vectors: ConceptVectors) -> Row:
        """Return a prompt in as many chunks as it needs."""
        chunks = in_chunks(self.groups(prompt, vectors), self.length - 2)
        pieces = [piece for chunk in chunks for piece in self.whole(chunk)]
        columns: dict[str, tuple[int, ...]] = {}
        for position, (_, name) in enumerate(pieces):
            if name:
                columns[name] = (*columns.get(name, ()), position)
        return Row(tuple(i for i, _ in pieces), columns, len(chunks[0]) + 1)

    def groups(self, prompt: ConceptPrompt, vectors: ConceptVectors) -> Iterator[list[Piece]]:
        """Yield the pieces of each stretch of plain text, and of each concept."""
        for plain, parts in groupby(prompt.parts, lambda part: isinstance(part, str)):
            if plain:
                yield [(i, "") for i in self.pieces("".join(map(str, parts)))]
                continue
            for concept in parts:
                name = concept.name  # type: ignore[union-attr]
                yield [(self.tokenizer.bos_token_id, name)] * len(vectors[name][self.name])

    def whole(self, chunk: Sequence[Piece]) -> list[Piece]:
        """Return a chunk between its begin and end tokens, filled up to its length."""
        ids = self.tokenizer
        fill = self.length - 2 - len(chunk)
        end = [(ids.eos_token_id, ""), *[(ids.pad_token_id, "")] * fill]
        return [(ids.bos_token_id, ""), *chunk, *end]

    def encode(
        self, rows: Sequence[Row], vectors: ConceptVectors
    ) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b p"] | None]:
        """Return the sequences, and the first chunks' pooled vectors where the encoder projects any.

        Shorter prompts get empty chunks, so that all are as long as the longest.
        """
        ids = self.padded([row.ids for row in rows]).to(self.table.device)
        with self.concepts_in_place([row.columns for row in rows], vectors):
            out = self.model(
                rearrange(ids, "b (c t) -> (b c) t", t=self.length),
                output_hidden_states=self.penultimate,
            )
        y = out.hidden_states[-2] if self.penultimate else out[0]
        y = rearrange(y, "(b c) t d -> b (c t) d", b=len(rows))
        if out[0].ndim != 2:
            return y, None
        return y, rearrange(out[0], "(b c) p -> b c p", b=len(rows))[:, 0]

    def padded(self, ids: Sequence[tuple[int, ...]]) -> Int[Tensor, "b t"]:
        """Return the ids of several prompts with empty chunks after the shorter ones."""
        longest = max(map(len, ids))
        empty = [i for i, _ in self.whole(())]
        return torch.tensor([[*i, *empty * ((longest - len(i)) // self.length)] for i in ids])

    @contextmanager
    def concepts_in_place(
        self, columns: Sequence[Mapping[str, tuple[int, ...]]], vectors: ConceptVectors
    ) -> Iterator[None]:
        """Put the concepts' vectors at their positions in the token embeddings while the context is open.

        From there on the encoder computes in float32, whatever its weights rest in.
        """

        def replace(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            whole = rearrange(output, "(b c) t d -> b (c t) d", b=len(columns)).to(
                torch.float32, copy=True
            )
            for row, positions_by_name in enumerate(columns):
                for name, positions in positions_by_name.items():
                    of_name = vectors[name][self.name].to(whole)
                    for position, vector in zip(positions, of_name, strict=True):
                        whole[row, position] = vector
            return rearrange(whole, "b (c t) d -> (b c) t d", t=output.shape[1])

        handle = self.model.get_input_embeddings().register_forward_hook(replace)
        try:
            yield
        finally:
            handle.remove()

    def initial_vectors(
        self, words: str, count: int, generator: torch.Generator
    ) -> Float[Tensor, "n d"]:
        """Return the vectors of the words' pieces or, without words, random ones like the table's."""
        ids = self.pieces(words)
        if not ids:
            return self.statistics.draw(count, generator)
        return spread_pieces(self.table.detach()[ids].float(), count)

    @cached_property
    def statistics(self) -> TableStatistics:
        """Those of the token table, for random vectors."""
        return TableStatistics.of(self.table.detach().float())


def text_encoders(pipeline: Any) -> tuple[TextEncoder, ...]:
    """Return a pipeline's text encoders in the order in which their outputs are joined."""
    first = pipeline.text_encoder, pipeline.tokenizer
    if getattr(pipeline, "text_encoder_2", None) is not None:
        second = pipeline.text_encoder_2, pipeline.tokenizer_2
        return (
            TextEncoder("clip_l", "text_encoder", *first, penultimate=True),
            TextEncoder("clip_g", "text_encoder_2", *second, penultimate=True),
        )
    # OpenCLIP-H for SD 2.x, CLIP-L for SD 1.x and small models like it.
    width = first[0].get_input_embeddings().weight.shape[1]
    return (TextEncoder("clip_h" if width == SD2_WIDTH else "clip_l", "text_encoder", *first),)


def in_chunks(groups: Iterable[Sequence[Piece]], room: int) -> list[list[Piece]]:
    """Return pieces in chunks of at most `room`, as ComfyUI cuts long prompts.

    A group that does not fit into what is left of a chunk begins the next one; only one of 8 pieces
    and more is cut in two.
    """
    chunks: list[list[Piece]] = [[]]
    for group in groups:
        rest = list(group)
        while len(rest) + len(chunks[-1]) > room:
            if len(group) >= min(WORD_LENGTH, room):
                free = room - len(chunks[-1])
                chunks[-1] += rest[:free]
                rest = rest[free:]
            chunks.append([])
        chunks[-1] += rest
    return chunks


def encode_prompts(
    encoders: Sequence[TextEncoder], prompts: Sequence[ConceptPrompt], vectors: ConceptVectors
) -> Conditioning:
    """Encode prompts with all text encoders, whose outputs stand side by side.

    Raises:
        UserError: the encoders cut a prompt into different pieces.
    """
    rows = []
    for prompt in prompts:
        rows.append([encoder.row(prompt, vectors) for encoder in encoders])
        require_same_places(prompt, rows[-1])
    encoded = [
        encoder.encode(of_encoder, vectors)
        for encoder, of_encoder in zip(encoders, zip(*rows, strict=True), strict=True)
    ]
    y, pooled = torch.cat([y for y, _ in encoded], dim=-1), encoded[-1][1]
    columns, end = (tuple(row.columns for row, *_ in rows), tuple(row.end for row, *_ in rows))
    inputs = {"y": y} if pooled is None else {"y": y, "pooled": pooled}
    return Conditioning(inputs, {"text": TextStream(y.shape[1], columns, end)})


def require_learned(prompt: ConceptPrompt, vectors: ConceptVectors) -> None:
    """Refuse a prompt with a concept that has no vectors, or not equally many for all text encoders.

    Raises:
        UserError: there is such a concept.
    """
    for name in prompt.names:
        if name not in vectors:
            raise not_learned(name, vectors)
        counts = {encoder: len(v) for encoder, v in vectors[name].items()}
        if len(set(counts.values())) > 1:
            raise UserError(
                f"Concept {name} is inconsistent. Expected equally many vectors for each text encoder, "
                f"got {counts}. Learn it again."
            )


def require_same_places(prompt: ConceptPrompt, rows: Sequence[Row]) -> None:
    """Refuse a prompt that two text encoders cut into different pieces.

    Raises:
        UserError: concepts or ends stand at different positions.
    """
    if len({(tuple(row.columns.items()), row.end, len(row.ids)) for row in rows}) > 1:
        raise UserError(
            f"The model's text encoders cut the prompt {str(prompt)!r} into different pieces, so that its "
            "concepts would stand at different places. Expected tokenizers with one vocabulary, as SDXL "
            "has. Load a complete SDXL pipeline."
        )
