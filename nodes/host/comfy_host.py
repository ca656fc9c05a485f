"""The protocol of em_core.model.protocol, implemented with ComfyUI's MODEL, CLIP and VAE."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import comfy.model_management as mm
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from ...em_core.exchange.lora import loadable
from ...em_core.masks.resizing import Size
from ...em_core.model.adapters import TrainableParts, trainable_lora, trainable_weights
from ...em_core.model.identity import ModelIdentity
from ...em_core.model.layers import AttentionLayer
from ...em_core.model.protocol import Conditioning
from ...em_core.model.recording import AttentionRecorder
from ...em_core.model.schedules import NoiseSchedule
from ...em_core.model.vectors import TableStatistics
from ...em_core.model.visual import Act, Place, image_places, transformed
from ...em_core.prompts import ConceptPrompt, ConceptVectors
from ...em_core.settings import WeightKind
from .attention import SELF, attention_layers, block_levels, record_attention
from .calling import OVERRIDE, apply_model
from .copies import private_copies, unload
from .drawing import draw
from .embeddings import start_of_embedding
from .families import GraphModels, noise_schedule, wrong_vae
from .layers import adaptable_layers, crossing_weights, named_weights, taking_part
from .patches import (
    OrdinaryTensors,
    core_attention,
    patch_functions,
    refusing,
    uncompiled,
    watching_gradients,
)
from .prompt_encoding import encode_prompts
from .text import pieces, token_table, word_vectors


class ComfyHost:
    """The protocol :class:`em_core.model.protocol.DiffusionModel` over ComfyUI.

    Attributes:
        models: the graph's models, identified.
        learning: whether the weights are private copies with gradients; otherwise they are the user's
            own and only read.
        one_time: whether all samples of a call need the same time, as in sampling: other nodes' patches
            look at the first one's.
        loss_scale, passes_at_once: see :mod:`em_core.model.protocol`.
        memory_required: bytes that a step takes besides the weights, which others must leave free.
    """

    loss_scale = 1.0
    passes_at_once = 10
    memory_required = 0.0

    def __init__(self, models: GraphModels, learning: bool = False) -> None:
        self.models, self.learning = models, learning
        self.model = models.model if learning else uncompiled(models.model)
        self.clip, self.vae = models.clip, models.vae
        self.unet = self.model.model.diffusion_model
        self.device = torch.device(self.model.load_device)
        schedule = noise_schedule(self.model).to(self.device)
        self.schedule: NoiseSchedule = schedule
        self.prediction = schedule.prediction
        self.image_side = models.image_side
        deepest = max(block_levels(self.unet).values())
        self.image_multiple = models.factor * 2**deepest
        sampling = self.model.get_model_object("model_sampling")
        self.sigmas = sampling.sigmas.detach().clone().float().to(self.device)
        self.tables: dict[str, TableStatistics] = {}
        self.sizes: dict[Size, Tensor] = {}
        self.loaded = False
        self.one_time = bool(patch_functions(self.model))
        self.ordinary = OrdinaryTensors() if learning else None
        self.attention = core_attention(
            self.model.model_options["transformer_options"].get(OVERRIDE), learning
        )
        self._identity: ModelIdentity | None = None

    def attention_layers(self, latent_size: Size) -> tuple[AttentionLayer, ...]:
        return attention_layers(self.unet, latent_size)

    def self_attention_layers(self, latent_size: Size) -> tuple[AttentionLayer, ...]:
        return attention_layers(self.unet, latent_size, SELF)

    def image_places(self, latent_size: Size) -> tuple[Place, ...]:
        return image_places(self.attention_layers(latent_size), self.unet)

    def transformed(self, places: Sequence[Place], act: Act) -> AbstractContextManager[None]:
        return transformed(self.unet, places, act)

    def load(self) -> None:
        """Bring MODEL and CLIP onto the device together, so that neither evicts the other."""
        if not self.loaded:
            mm.load_models_gpu(
                [self.model, self.clip.patcher],
                memory_required=self.memory_required,
                force_full_load=self.learning,
            )
            self.model.pre_run()
            self.loaded = True

    @contextmanager
    def vae_in_use(self) -> Iterator[Any]:
        """The user's VAE, loaded and taken off the device again in inference mode, as the executor does it.

        Weights that were made in inference mode and then moved outside of it, or the other way around, fail
        when they are used next. So the private copies leave the device first, in the mode that they came in.
        """
        self.loaded = False
        if not self.learning:
            yield self.vae
            return
        for patcher in (self.model, self.clip.patcher):
            unload(patcher)
        with torch.inference_mode():
            try:
                yield self.vae
            finally:
                unload(self.vae.patcher)

    @torch.no_grad()
    def encode_image(self, image: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """Return scaled latents of pictures in -1..1.

        Raises:
            UserError: the VAE is of another family.
        """
        pixels = rearrange(image, "b c h w -> b h w c").float().cpu() / 2 + 0.5
        with self.vae_in_use() as vae:
            latent = vae.encode(pixels)
        latent = latent.to(self.device, torch.float32, copy=True)
        if latent.ndim != 4 or latent.shape[1] != self.models.channels:
            raise wrong_vae(self.models.channels, f"latents of shape {tuple(latent.shape)}")
        return self.model.model.process_latent_in(latent)

    def encode_prompts(
        self, prompts: Sequence[ConceptPrompt], vectors: ConceptVectors
    ) -> Conditioning:
        """Encode prompts of any length, with the vectors in place of the concepts.

        Raises:
            UserError: a concept has no vectors.
        """
        self.load()
        return encode_prompts(self.clip, self.models.encoders, self.device, prompts, vectors)

    def predict(
        self, Z_t: Float[Tensor, "b c h w"], t: Float[Tensor, " b"], conditioning: Conditioning
    ) -> Float[Tensor, "b c h w"]:
        """Return the UNet's output, with all patches around it.

        ComfyUI's models take x = Z_t sqrt(sigma^2 + 1) and return x_0, so both are converted.
        """
        mm.throw_exception_if_processing_interrupted()
        self.load()
        sigma = self.sigmas[t.long()]
        wide = sigma[:, None, None, None]
        root = (wide**2 + 1).sqrt()
        x = Z_t.float() * root
        x_0 = apply_model(self, x, sigma, conditioning).float()
        if self.prediction == "epsilon":
            return (x - x_0) / wide
        return (x / root**2 - x_0) * root / wide

    def record_attention(
        self, recorder: AttentionRecorder
    ) -> AbstractContextManager[AttentionRecorder]:
        return record_attention(self.unet, recorder)

    def initial_vectors(
        self, words: str, count: int | None, generator: torch.Generator
    ) -> dict[str, Float[Tensor, "n d"]]:
        """Return the vectors of the words' pieces or, without words, random ones like the table's.

        Random vectors have the mean and standard deviation of the token table. `embedding:file` in
        place of words gives all vectors of that file, whatever `count` is.

        Raises:
            UserError: there is no such file, or it is of another family.
        """
        start = start_of_embedding(self.clip.tokenizer, self.models.encoders, words)
        if start is not None:
            return {name: vectors.to(self.device) for name, vectors in start.items()}
        found = {}
        first = next(iter(self.models.encoders))
        count = count or max(1, len(pieces(self.clip.tokenizer, first, words)))
        for name in self.models.encoders:
            vectors = word_vectors(self.clip, name, words, count)
            if vectors is None:
                vectors = self.statistics(name).draw(count, generator)
            found[name] = vectors.to(self.device)
        return found

    def statistics(self, encoder: str) -> TableStatistics:
        """Return those of an encoder's token table, computed once."""
        if encoder not in self.tables:
            self.tables[encoder] = TableStatistics.of(token_table(self.clip, encoder))
        return self.tables[encoder]

    def release(self) -> None:
        """Undo what running the model has set on it."""
        self.model.cleanup()

    def named_weights(self) -> dict[str, nn.Parameter]:
        """Map paths to all weights of the UNet and the text encoders."""
        return named_weights(self.unet, self.clip.cond_stage_model)

    def trainable(
        self,
        kind: WeightKind,
        values: Mapping[str, Tensor],
        generator: torch.Generator,
        rank: int = 4,
        alpha: float = 4.0,
    ) -> AbstractContextManager[TrainableParts]:
        self.load()  # what is made beside a weight is made where the weight is
        if kind == "lora":
            return trainable_lora(self.adaptable_layers(), values, generator, rank, alpha)
        return trainable_weights(self.weights(kind), values)

    def adaptable_layers(self) -> dict[str, nn.Linear]:
        """Map paths to the linear layers that a LoRA acts on: the attention of UNet and text encoders."""
        return adaptable_layers(self.unet, self.clip.cond_stage_model)

    def weights(self, kind: WeightKind) -> dict[str, nn.Parameter]:
        """Map paths to the keys and values of cross-attention, or to all weights that take part."""
        if kind == "cross_attention":
            return crossing_weights(self.unet)
        return taking_part(self.named_weights())

    @contextmanager
    def applied(self, weights: Mapping[str, Tensor], lora_scale: float) -> Iterator[None]:
        """Apply learned weights with ComfyUI's own LoRA loader while the context is open."""
        if not weights:
            yield
            return
        import comfy.sd

        own = self.model, self.clip
        if self.learning:  # what is loaded here goes in the mode that it came in
            unload(self.model)
            unload(self.clip.patcher)
        lora = loadable(weights, lora_scale, self.models.family == "sdxl")
        try:
            self.model, self.clip = comfy.sd.load_lora_for_models(*own, lora, 1.0, 1.0)
            self.loaded = False
            yield
        finally:
            self.model.cleanup()
            if self.learning:  # the copies' weights must be their own again
                unload(self.model)
                unload(self.clip.patcher)
            self.model, self.clip = own
            self.loaded = False

    def identity(self) -> ModelIdentity:
        if self._identity is None:
            self.load()
            self._identity = ModelIdentity.of_weights(
                self.models.family, self.models.encoders, self.named_weights()
            )
        return self._identity

    def draw(
        self,
        prompt: ConceptPrompt,
        vectors: ConceptVectors,
        seeds: Sequence[int],
        steps: int = 20,
        guidance: float = 5.0,
    ) -> Float[Tensor, "b 3 H W"]:
        """Draw pictures in 0..1, one per seed, with ComfyUI's Euler sampler."""
        return draw(self, prompt, vectors, seeds, steps, guidance)


@contextmanager
def learning_host(
    models: GraphModels,
    dtype: torch.dtype,
    clip_dtype: torch.dtype | None = None,
    storage: torch.dtype | None = None,
) -> Iterator[ComfyHost]:
    """Provide a host to learn on, over private copies of the weights as the graph has patched them.

    Args:
        models: the graph's models.
        dtype: number type in which the UNet's copy computes.
        clip_dtype: number type of the text encoders' copy; None keeps their own.
        storage: number type in which the UNet's matrices are kept; None is `dtype`.

    Raises:
        UserError: MODEL or CLIP cannot be learned on.
    """
    with private_copies(models.model, models.clip, dtype, clip_dtype, storage) as (model, clip):
        host = ComfyHost(replace(models, model=model, clip=clip), learning=True)
        try:
            with refusing(model, learning=True), watching_gradients(host.unet):
                yield host
        finally:
            host.__dict__.clear()  # a leftover reference must not keep the copies alive
