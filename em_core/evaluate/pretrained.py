"""CLIP and DINO through transformers, from a folder or a name on the model hub."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from ..errors import UserError
from ..pictures import to_image
from .encoders import Pictures

EXTRA = "(the extra 'evaluate' of this package)"
POOLER = "pooler."  # of models whose class token is read instead
AT_ONCE = 16


class Clip:
    """CLIP's picture and text towers (Radford et al. 2021, arXiv 2103.00020)."""

    def __init__(self, model: Any, processor: Any, device: torch.device | str = "cpu") -> None:
        self.model, self.processor = model.to(device).eval(), processor
        self.device = torch.device(device)

    @classmethod
    def load(cls, source: Path | str, device: torch.device | str = "cpu") -> "Clip":
        """Load a CLIP model with its tokenizer and preprocessing.

        Raises:
            UserError: transformers is not installed, or there is no whole CLIP model of this name.
        """
        transformers = load_transformers()
        parts = read(source, "CLIP", transformers.CLIPModel, transformers.CLIPProcessor)
        return cls(*parts, device)

    @torch.no_grad()
    def images(self, pictures: Pictures) -> Float[Tensor, "n d"]:
        """Unit vectors of pictures in CLIP's joint space."""
        return batched(pictures, self.some_images)

    def some_images(self, pictures: Pictures) -> Tensor:
        given = self.processor(images=[*map(to_image, pictures)], return_tensors="pt")
        return projected(self.model.get_image_features(given["pixel_values"].to(self.device)))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Float[Tensor, "n d"]:
        """Unit vectors of texts in CLIP's joint space; what is beyond its 77 tokens is cut off."""
        length = self.model.config.text_config.max_position_embeddings
        given = self.processor(
            text=list(texts), return_tensors="pt", padding=True, truncation=True, max_length=length
        ).to(self.device)
        found = self.model.get_text_features(given["input_ids"], given["attention_mask"])
        return F.normalize(projected(found).float().cpu(), dim=-1)


class Dino:
    """The class token of a DINO, DINOv2 or other vision transformer (Caron et al. 2021, arXiv 2104.14294)."""

    def __init__(self, model: Any, processor: Any, device: torch.device | str = "cpu") -> None:
        self.model, self.processor = model.to(device).eval(), processor
        self.device = torch.device(device)

    @classmethod
    def load(cls, source: Path | str, device: torch.device | str = "cpu") -> "Dino":
        """Load a vision transformer with its preprocessing.

        Raises:
            UserError: transformers is not installed, or there is no whole model of this name.
        """
        transformers = load_transformers()
        parts = read(source, "DINO", transformers.AutoModel, transformers.AutoImageProcessor)
        return cls(*parts, device)

    @torch.no_grad()
    def images(self, pictures: Pictures) -> Float[Tensor, "n d"]:
        """Unit vectors of pictures.

        Raises:
            UserError: the model is no vision transformer with a class token.
        """
        return batched(pictures, self.some_images)

    def some_images(self, pictures: Pictures) -> Tensor:
        given = self.processor(images=[*map(to_image, pictures)], return_tensors="pt")
        states = self.model(pixel_values=given["pixel_values"].to(self.device)).last_hidden_state
        if states.ndim != 3:
            raise UserError(
                f"{type(self.model).__name__} is no encoder for identity. Expected a vision transformer "
                "with a class token, such as DINO or DINOv2."
            )
        return states[:, 0]


def batched(pictures: Pictures, encode: Callable[[Pictures], Tensor]) -> Float[Tensor, "n d"]:
    """Encode pictures a few at a time, which bounds the memory it takes."""
    starts = range(0, len(pictures), AT_ONCE)
    found = torch.cat([encode(pictures[start : start + AT_ONCE]) for start in starts])
    return F.normalize(found.float().cpu(), dim=-1)


def projected(found: Any) -> Tensor:
    """Return features that older versions of transformers give as they are and newer ones in an object."""
    return found if isinstance(found, Tensor) else found.pooler_output


def load_transformers() -> Any:
    """Return the module.

    Raises:
        UserError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f"Measuring pictures needs transformers {EXTRA}. Install it: pip install transformers"
        ) from error
    return transformers


def read(source: Path | str, what: str, kind: Any, preprocessing: Any) -> tuple[Any, Any]:
    """Return a model and its preprocessing; of safetensors alone, and of a folder without a network.

    Raises:
        UserError: they cannot be read, or weights are missing, which transformers would make up at random.
    """
    options: dict[str, Any] = {"local_files_only": True} if Path(source).is_dir() else {}
    try:
        model, told = kind.from_pretrained(
            str(source), use_safetensors=True, output_loading_info=True, **options
        )
        processor = preprocessing.from_pretrained(str(source), **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"Could not load a {what} model from {source}: {error}. Expected a folder in the layout of "
            "transformers (config.json, model.safetensors and the preprocessing's files), or the name of "
            "such a model on the hub (owner/name)."
        ) from error
    missing = sorted(name for name in told["missing_keys"] if not name.startswith(POOLER))
    if missing:
        raise UserError(
            f"{source} is no whole {what} model: {len(missing)} of its weights are missing, such as "
            f"{missing[0]}. Expected those of {type(model).__name__}. Download it again, or take another."
        )
    return model, processor
