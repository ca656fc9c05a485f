"""The diffusion-model protocol, implemented with diffusers, which is an optional extra.

It works with any Stable Diffusion 1.x, 2.x or SDXL pipeline folder, and with a single .safetensors
checkpoint if diffusers can read it without a network.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import UserError
from ..exchange.triggers import RARE, Vocabulary
from ..masks.resizing import Size
from ..model.adapters import (
    TrainableParts,
    trainable_lora,
    trainable_weights,
)
from ..model.frozen import freeze_layers
from ..model.identity import ModelIdentity
from ..model.layers import AttentionLayer
from ..model.plans import loss_scale_for
from ..model.protocol import Conditioning
from ..model.recording import AttentionRecorder
from ..model.schedules import NoiseSchedule, VariancePreserving
from ..model.visual import Act, Place, image_places, transformed
from ..model.visual_drawing import VisualUse
from ..prompts import ConceptPrompt, ConceptVectors, embedding_name, require_known
from ..runs.concept_set import ConceptSet
from ..runs.visual_condition import VisualCondition
from ..settings import WeightKind
from .attention import SELF, attention_layers, record_attention
from .drawing import draw, in_full_range
from .fingerprint import fingerprint
from .layers import (
    adaptable_layers,
    linear_layers,
    named_weights,
    weights_applied,
    weights_of,
)
from .loading import (
    AS_READ,
    load_pipeline,
    number_type,
    require_plain_model,
    rest_in,
    torch_device,
    words_of,
)
from .text import SD2_WIDTH, encode_prompts, require_learned, text_encoders


class DiffusersHost:
    """The protocol :class:`em_core.model.protocol.DiffusionModel` over a Stable Diffusion pipeline.

    Attributes:
        pipeline: the diffusers pipeline; its modules are frozen and in eval mode.
        encoders: its text encoders.
        known_words: the words that the model was trained on, if it knows no others; otherwise None.
        dtype: number type in which the UNet computes.
        loss_scale, passes_at_once: see :mod:`em_core.model.protocol`.
    """

    passes_at_once = 10

    def __init__(
        self,
        pipeline: Any,
        device: torch.device | str = "cpu",
        known_words: frozenset[str] | None = None,
        dtype: torch.dtype = torch.float32,
        recompute: bool = False,
        storage: torch.dtype | None = None,
    ) -> None:
        require_plain_model(pipeline)
        self.pipeline, self.known_words, self.dtype = pipeline, known_words, dtype
        self.device = torch.device(device)
        self.unet, self.vae, self.encoders = pipeline.unet, pipeline.vae, text_encoders(pipeline)
        text = [encoder.model for encoder in self.encoders]
        rest_in(self.unet, storage or dtype, dtype)
        for encoder in text:  # in float32, as the vectors that learn are
            rest_in(encoder, dtype, torch.float32)
        for module in (self.unet, self.vae.to(dtype), *text):
            module.to(self.device).eval().requires_grad_(False)
        freeze_layers(self.unet, *text)
        if recompute:
            self.unet.enable_gradient_checkpointing()
        self.loss_scale = loss_scale_for(dtype)
        self.sizes: dict[Size, Float[Tensor, "1 6"]] = {}
        config = pipeline.scheduler.config
        pipeline.set_progress_bar_config(disable=True)
        self.schedule: NoiseSchedule = VariancePreserving(
            pipeline.scheduler.alphas_cumprod.float(), config.prediction_type
        ).to(self.device)
        self.factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.image_side = self.unet.config.sample_size * self.factor
        self.image_multiple = self.factor * 2 ** (len(self.unet.config.block_out_channels) - 1)

    @classmethod
    def load(
        cls,
        source: Path | str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str = torch.float32,
        recompute: bool = False,
        storage: torch.dtype | None = None,
    ) -> "DiffusersHost":
        """Load a pipeline folder, a .safetensors checkpoint, or a model on the hub by its name.

        If the folder has a `words.json`, the model knows only the words listed there.

        Args:
            source: the folder, file or name.
            device: where the model runs.
            dtype: number type of the weights, or its name; "auto" is bfloat16 on a card that computes in
                it, else float32. Whole weights are learned in float32 only.
            recompute: whether learning computes the UNet's blocks again in the backward pass, which takes
                less memory and more time.
            storage: number type in which the UNet's matrices rest, such as torch.float8_e4m3fn; they are
                cast layer by layer. None is `dtype`.

        Raises:
            UserError: diffusers is not installed, or there is no such model, device or number type.
        """
        place = torch_device(str(device))
        numbers = number_type(dtype, place) if isinstance(dtype, str) else dtype
        pipeline = load_pipeline(source, numbers if storage is None else AS_READ)
        return cls(pipeline, place, words_of(source), numbers, recompute, storage)

    def attention_layers(self, latent_size: Size) -> tuple[AttentionLayer, ...]:
        return attention_layers(self.unet, latent_size)

    def self_attention_layers(self, latent_size: Size) -> tuple[AttentionLayer, ...]:
        return attention_layers(self.unet, latent_size, SELF)

    def image_places(self, latent_size: Size) -> tuple[Place, ...]:
        return image_places(self.attention_layers(latent_size), self.unet)

    def transformed(self, places: Sequence[Place], act: Act) -> AbstractContextManager[None]:
        return transformed(self.unet, places, act)

    @torch.no_grad()
    def encode_image(self, image: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        with in_full_range(self.vae):
            posterior = self.vae.encode(image.to(self.device, self.vae.dtype)).latent_dist
        return posterior.mean.float() * self.vae.config.scaling_factor

    def encode_prompts(
        self, prompts: Sequence[ConceptPrompt], vectors: ConceptVectors
    ) -> Conditioning:
        """Encode prompts of any length, with the vectors in place of the concepts.

        Raises:
            UserError: a prompt has a word that the model does not know, or a concept without vectors.
        """
        for prompt in prompts:
            require_learned(prompt, vectors)
            self.require_known(" ".join(part for part in prompt.parts if isinstance(part, str)))
        return encode_prompts(self.encoders, prompts, vectors)

    def require_known(self, text: str) -> None:
        """Refuse text with words that the model does not know.

        Raises:
            UserError: the model knows only some words, and `text` has others.
        """
        if self.known_words is not None:
            require_known(text, self.known_words, RARE)

    def vocabularies(self) -> dict[str, Vocabulary]:
        """Return the text encoders' vocabularies, for trigger words."""
        return {
            encoder.name: Vocabulary(encoder.pieces, encoder.table.detach().float().cpu())
            for encoder in self.encoders
        }

    def predict(
        self, Z_t: Float[Tensor, "b c h w"], t: Float[Tensor, " b"], conditioning: Conditioning
    ) -> Float[Tensor, "b c h w"]:
        dtype = self.dtype
        given = self.size_conditioning(Z_t, conditioning)
        y = conditioning.inputs["y"].to(dtype)
        return self.unet(Z_t.to(dtype), t, y, added_cond_kwargs=given).sample.float()

    def size_conditioning(
        self, Z_t: Float[Tensor, "b c h w"], conditioning: Conditioning
    ) -> dict[str, Tensor] | None:
        """Return what SDXL's UNet is told besides: the pooled text, and a picture that is not cropped
        (its size, the crop's corner, the size to draw); None for other families."""
        if "pooled" not in conditioning.inputs:
            return None
        pooled = conditioning.inputs["pooled"]
        size = Z_t.shape[-2] * self.factor, Z_t.shape[-1] * self.factor
        if size not in self.sizes:
            self.sizes[size] = torch.tensor([[*size, 0.0, 0.0, *size]], device=self.device)
        return {
            "text_embeds": pooled.to(self.dtype),
            "time_ids": self.sizes[size].expand(len(pooled), -1),
        }

    def record_attention(
        self, recorder: AttentionRecorder
    ) -> AbstractContextManager[AttentionRecorder]:
        return record_attention(self.unet, recorder)

    def initial_vectors(
        self, words: str, count: int | None, generator: torch.Generator
    ) -> dict[str, Float[Tensor, "n d"]]:
        """Return the vectors of the words' pieces or, without words, random ones like the table's.

        Random vectors have the mean and standard deviation of the token table.

        Raises:
            UserError: an embedding is named in place of words.
        """
        if embedding_name(words) is not None:
            raise UserError(
                f"A start from {words!r} works inside ComfyUI alone, which knows where embeddings are. Give words "
                "instead."
            )
        self.require_known(words)
        # Concepts have equally many vectors for each encoder, since they stand at the same places.
        count = count or max(1, len(self.encoders[0].pieces(words)))
        return {
            encoder.name: encoder.initial_vectors(words, count, generator)
            for encoder in self.encoders
        }

    def modules(self) -> tuple[tuple[str, nn.Module], ...]:
        """Return the parts that can be learned, with the names that prefix their layers' names."""
        return ("unet", self.unet), *((one.part, one.model) for one in self.encoders)

    def adaptable_layers(self) -> dict[str, nn.Linear]:
        """Map paths to the linear layers that a LoRA learns: the attention of UNet and text encoders."""
        return adaptable_layers(self.modules())

    def linear_layers(self) -> dict[str, nn.Linear]:
        """Map paths to all linear layers, on which LoRAs of other programs may act."""
        return linear_layers(self.modules())

    def weights(self, kind: WeightKind) -> dict[str, nn.Parameter]:
        """Map paths to the keys and values of cross-attention, or to all weights but those of the token tables
        and of the projection to pooled text."""
        tables = [encoder.table for encoder in self.encoders]
        return weights_of(kind, self.modules(), tables)

    def named_weights(self) -> dict[str, nn.Parameter]:
        """Map paths to all weights of the UNet and the text encoders."""
        return named_weights(self.modules())

    def trainable(
        self,
        kind: WeightKind,
        values: Mapping[str, Tensor],
        generator: torch.Generator,
        rank: int = 4,
        alpha: float = 4.0,
    ) -> AbstractContextManager[TrainableParts]:
        if kind == "lora":
            return trainable_lora(self.adaptable_layers(), values, generator, rank, alpha)
        return trainable_weights(self.weights(kind), values)

    def identity(self) -> ModelIdentity:
        widths = {encoder.name: encoder.width for encoder in self.encoders}
        width = sum(widths.values())
        family = {768: "sd1", SD2_WIDTH: "sd2"}.get(width, f"sd-{width}")
        family = "sdxl" if len(widths) > 1 else family
        return ModelIdentity.of_weights(family, widths, self.named_weights())

    def fingerprint(self) -> str:
        """Return a hash of all that acts in the pipeline: weights, configurations and vocabulary."""
        parts = dict((*self.modules(), ("vae", self.vae)))
        return fingerprint(parts, self.encoders, {"zero_empty": self.zero_empty})

    @property
    def zero_empty(self) -> bool:
        """Whether pictures are drawn away from zeros, not from the empty prompt; as SDXL's pipeline says."""
        return bool(self.pipeline.config.get("force_zeros_for_empty_prompt", False))

    def applied(
        self, weights: Mapping[str, Tensor], lora_scale: float
    ) -> AbstractContextManager[None]:
        full = self.weights("full")
        return weights_applied(weights, lora_scale, self.device, self.linear_layers(), full)

    def generate(
        self,
        prompt: ConceptPrompt | str,
        concepts: ConceptSet | None = None,
        seeds: Sequence[int] = (0,),
        steps: int = 30,
        guidance: float = 5.0,
        size: Size | None = None,
        condition: VisualCondition | None = None,
        strength: float = 1.0,
        span: tuple[float, float] = (0.0, 1.0),
    ) -> Float[Tensor, "b 3 H W"]:
        """Draw pictures in 0..1, one per seed, from a prompt with learned concepts as `<name>`.

        Args:
            prompt: the prompt, such as `a photo of <rex> in the snow`.
            concepts: learned concepts; weights that were learned with them are applied too.
            seeds: seeds of the noise; the same seed gives the same picture.
            steps: number of steps of diffusers' own sampler.
            guidance: scale of classifier-free guidance.
            size: (height, width) in pixels; None takes the model's own.
            condition: a visual condition, whose concepts are used where `concepts` are not given.
            strength: factor of what the condition adds, 0 to 2; 0 is the model without it.
            span: the part of the sampling in which it acts, as shares (start, end) of the schedule.

        Raises:
            UserError: the prompt names a concept that is not among `concepts`, or the condition is of
                another family.
        """
        prompt = ConceptPrompt.parse(prompt) if isinstance(prompt, str) else prompt
        if condition is not None:
            concepts = concepts or condition.concepts
        use = condition.use(strength, span) if condition else None
        vectors = concepts.vectors if concepts else {}
        with self.applied(*(concepts.weights, concepts.lora_scale) if concepts else ({}, 1.0)):
            return self.draw(prompt, vectors, seeds, steps, guidance, size, use)

    def draw(
        self,
        prompt: ConceptPrompt,
        vectors: ConceptVectors,
        seeds: Sequence[int],
        steps: int = 30,
        guidance: float = 5.0,
        size: Size | None = None,
        visual: VisualUse | None = None,
    ) -> Float[Tensor, "b 3 H W"]:
        """Draw pictures in 0..1, one per seed, with diffusers' own sampling loop and scheduler."""
        shape = size or (self.image_side, self.image_side)
        return draw(self, prompt, vectors, seeds, steps, guidance, shape, visual)
