"""A CLIP that remembers where concepts stand in what it encodes."""

from collections.abc import Callable, Mapping
from typing import Any

from ...em_core.prompts import ConceptVectors
from .encodings import Columns, Encodings
from .text import find_columns

Mark = Callable[[dict[str, Any], Columns], None]


def noting_clip(
    clip: Any, vectors: ConceptVectors, encodings: Callable[[], Encodings], mark: Mark
) -> Any:
    """Return a CLIP that remembers where the concepts stand in what it encodes.

    Args:
        clip: knows the concepts already.
        vectors: of the concepts, the very tensors that its tokenizer gives.
        encodings: gives the memory.
        mark: writes the columns into a conditioning too, for nodes that change the text's values
            afterwards.
    """

    def columns_in(clip: Any, tokens: Any) -> Mapping[str, tuple[int, ...]]:
        return find_columns(tokens, clip.tokenizer, vectors)[0]

    class NotingClip(type(clip)):  # type: ignore[misc]
        def clone(self, *args: Any, **kwargs: Any) -> Any:
            twin = super().clone(*args, **kwargs)
            twin.__class__ = type(self)
            return twin

        def encode_from_tokens(self, tokens: Any, *args: Any, **kwargs: Any) -> Any:
            encoded = super().encode_from_tokens(tokens, *args, **kwargs)
            text = encoded["cond"] if isinstance(encoded, dict) else encoded
            encodings().add(text[0] if isinstance(text, tuple) else text, columns_in(self, tokens))
            return encoded

        def encode_from_tokens_scheduled(self, tokens: Any, *args: Any, **kwargs: Any) -> Any:
            encoded = super().encode_from_tokens_scheduled(tokens, *args, **kwargs)
            for text, plain in encoded:
                mark(plain, encodings().add(text, columns_in(self, tokens)))
            return encoded

    noting = clip.clone()
    noting.__class__ = NotingClip
    return noting
