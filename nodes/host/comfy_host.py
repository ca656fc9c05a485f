"""The protocol of em_core.model.protocol, implemented with ComfyUI's MODEL, CLIP and VAE."""

import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import comfy.model_management as mm
import torch
from comfy.patcher_extension import merge_nested_dicts
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from ...em_core.errors import UserError
from ...em_core.exchange.lora import loadable
from ...em_core.masks.resizing import Size
from ...em_core.model.adapters import TrainableParts, trainable_lora, trainable_weights
from ...em_core.model.identity import ModelIdentity
from ...em_core.model.layers import AttentionLayer
from ...em_core.model.protocol import Conditioning, TextStream
from ...em_core.model.recording import AttentionRecorder
from ...em_core.model.schedules import NoiseSchedule
from ...em_core.model.vectors import TableStatistics
from ...em_core.model.visual import Act, Place, image_places, transformed
from ...em_core.prompts import ConceptPrompt, ConceptVectors
from ...em_core.settings import WeightKind
from .attention import SELF, attention_layers, block_levels, record_attention
from .copies import private_copies, unload
from .embeddings import require_embeddings, start_of_embedding
from .families import GraphModels, noise_schedule, wrong_vae
from .layers import adaptable_layers, crossing_weights, named_weights, taking_part
from .patches import (
    OrdinaryTensors,
    core_attention,
    guarded,
    patch_functions,
    refusal,
    refusing,
    uncompiled,
    watching_gradients,
)
from .text import (
    Tokens,
    find_columns,
    keep_saved,
    pad_chunks,
    pieces,
    require_same_count,
    results_stay,
    token_table,
    tokenize,
    with_concepts,
    word_vectors,
)

OVERRIDE = "optimized_attention_override"
PARENTHESIS = re.compile(r"(?<!\\)([()])")  # of a description, where it is no weight


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

    @torch.no_grad()
    def encode_image(self, image: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """Return scaled latents of pictures in -1..1.

        Raises:
            UserError: the VAE is of another family.
        """
        self.loaded = False
        pixels = rearrange(image, "b c h w -> b h w c").float().cpu() / 2 + 0.5
        latent = self.vae.encode(pixels).to(self.device, torch.float32, copy=True)
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
        require_same_count(vectors)
        tokenizer = with_concepts(self.clip.tokenizer, vectors, tuple(self.models.encoders))
        texts = [prompt_text(prompt, vectors) for prompt in prompts]
        require_embeddings(self.clip.tokenizer, self.models.encoders, set(texts))
        tokens = {text: tokenize(tokenizer, text) for text in dict.fromkeys(texts)}
        chunks = max(len(rows) for by_encoder in tokens.values() for rows in by_encoder.values())
        places = [find_columns(of, tokenizer, vectors) for of in tokens.values()]
        padded = [pad_chunks(of, tokenizer, chunks) for of in tokens.values()]
        y, pooled = self.encode_texts(padded, chunks)
        columns, end = zip(*places, strict=True)
        inputs = {"y": y} | ({} if pooled is None else {"pooled": pooled})
        distinct = Conditioning(inputs, {"text": TextStream(y.shape[1], columns, end)})
        order = [list(tokens).index(text) for text in texts]
        return distinct if order == list(range(len(y))) else distinct.rows(order)

    def encode_texts(
        self, texts: Sequence[Tokens], chunks: int
    ) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d"] | None]:
        """Return the sequences and pooled vectors of texts of equally many chunks, encoded in one call.

        ComfyUI reads the texts as one long text, of which it pools the first chunk alone; the other
        texts' pooled vectors are taken from the encoder that pooled it.
        """
        rows: list[Tensor] = []
        last = getattr(self.clip.cond_stage_model, list(self.models.encoders)[-1])
        handle = last.register_forward_hook(lambda module, args, out: rows.append(out[1]))
        try:
            y, pooled = self.encode_tokens(
                {key: [row for text in texts for row in text[key]] for key in texts[0]}
            )
        finally:
            handle.remove()
        y = rearrange(y, "1 (b t) d -> b t d", b=len(texts))
        if pooled is None or len(texts) == 1:
            return y, pooled
        if rows and len(rows[-1]) >= len(texts) * chunks:
            return y, rows[-1][: len(texts) * chunks : chunks].to(pooled)
        one_by_one = [self.encode_tokens(text)[1] for text in texts]
        return y, torch.cat([vector for vector in one_by_one if vector is not None])

    def encode_tokens(self, tokens: Any) -> tuple[Tensor, Tensor | None]:
        """Return the encoded sequence [1, t, d] and the first chunk's pooled vector [1, d], as
        CLIP.encode_from_tokens does."""
        encoder = self.clip.cond_stage_model
        encoder.reset_clip_options()
        if self.clip.layer_idx is not None:
            encoder.set_clip_options({"layer": self.clip.layer_idx})
        encoder.set_clip_options({"execution_device": self.clip.patcher.load_device})
        keeping = keep_saved() if torch.is_grad_enabled() else nullcontext()
        with keeping, results_stay(self.device):
            y, pooled = encoder.encode_token_weights(tokens)[:2]
        y = y.to(self.device).float()
        return y, None if pooled is None else pooled.to(self.device).float()

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
        x_0 = self.apply(x, sigma, conditioning).float()
        if self.prediction == "epsilon":
            return (x - x_0) / wide
        return (x / root**2 - x_0) * root / wide

    def apply(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Compute x_0 as ComfyUI's samplers do, through the wrappers and patches of other packs."""
        options = self.model.model_options
        given = {
            "c_crossattn": conditioning.inputs["y"],
            "transformer_options": self.transformer_options(sigma),
        }
        given |= self.size_conditioning(x, conditioning)
        wrapper = options.get("model_function_wrapper")
        run = self.model.model.apply_model
        with refusing(self.model, self.learning, anything=True), self.expecting_unet():
            if wrapper is None:
                return run(x, sigma, **given)
            return wrapper(run, {"input": x, "timestep": sigma, "c": given, "cond_or_uncond": [0]})

    @contextmanager
    def expecting_unet(self) -> Iterator[None]:
        """Refuse a patch that runs another module in the UNet's place, or none at all.

        Raises:
            UserError: the UNet whose attention is recorded has not run.
        """
        ran = []
        handle = self.unet.register_forward_pre_hook(lambda module, args: ran.append(True))
        try:
            yield
        finally:
            handle.remove()
        if not ran:
            raise refusal(self.model, "it runs something else in the UNet's place", self.learning)

    def transformer_options(self, sigma: Tensor) -> dict[str, Any]:
        """Return what the UNet's blocks are told: the graph's patches and what samplers add."""
        options = dict(self.model.model_options["transformer_options"])
        for kind in ("wrappers", "callbacks"):
            registered = getattr(self.model, kind)
            options[kind] = merge_nested_dicts(dict(options.get(kind, {})), registered)
        added = {"cond_or_uncond": [0], "uuids": [uuid.UUID(int=0)], "sigmas": sigma}
        options |= added | {"sample_sigmas": self.sigmas.flip(0)}
        if self.learning:
            options[OVERRIDE] = self.attention
        seed = int(sigma.sum() * 1e6) if self.one_time else 0
        return guarded(options, self.ordinary, seed)

    def size_conditioning(self, x: Tensor, conditioning: Conditioning) -> dict[str, Tensor]:
        """Return SDXL's vector of the pooled text and the picture's size; empty for other families."""
        if self.models.family != "sdxl":
            return {}
        height, width = x.shape[-2] * self.models.factor, x.shape[-1] * self.models.factor
        pooled = conditioning.inputs["pooled"]
        if (height, width) not in self.sizes:
            # ComfyUI builds it on the CPU, where the pooled vectors would be waited for in each step.
            blank = torch.zeros(1, pooled.shape[1])
            y = self.model.model.encode_adm(
                pooled_output=blank, height=height, width=width, device=self.device
            )
            self.sizes[height, width] = y[:, pooled.shape[1] :].to(self.device)
        of_size = self.sizes[height, width].expand(len(pooled), -1)
        return {"y": torch.cat([pooled, of_size], dim=1)}

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

    @torch.no_grad()
    def draw(
        self,
        prompt: ConceptPrompt,
        vectors: ConceptVectors,
        seeds: Sequence[int],
        steps: int = 20,
        guidance: float = 5.0,
    ) -> Float[Tensor, "b 3 H W"]:
        """Draw pictures in 0..1, one per seed, with ComfyUI's Euler sampler."""
        import comfy.sample

        conds = [
            self.sampler_conditioning(text, known)
            for text, known in ((prompt, vectors), (ConceptPrompt(()), {}))
        ]
        side = self.image_side // self.models.factor
        pictures = []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            noise = torch.randn(1, self.models.channels, side, side, generator=generator)
            latent = comfy.sample.sample(
                self.model, noise, steps, guidance, "euler", "normal", *conds, torch.zeros_like(noise),
                disable_pbar=True, seed=seed,
            )  # fmt: skip
            self.loaded = False
            pictures.append(rearrange(self.vae.decode(latent), "b h w c -> b c h w").clone())
        return torch.cat(pictures)

    def sampler_conditioning(self, prompt: ConceptPrompt, vectors: ConceptVectors) -> list:
        """Return a CONDITIONING, as ComfyUI's samplers take it."""
        encoded = self.encode_prompts([prompt], vectors)
        return [[encoded.inputs["y"], {"pooled_output": encoded.inputs.get("pooled")}]]


def prompt_text(prompt: ConceptPrompt, vectors: ConceptVectors) -> str:
    """Return the prompt with its concepts written as `<name>`.

    Raises:
        UserError: a concept has no vectors.
    """
    missing = [name for name in prompt.names if name not in vectors]
    if missing:
        raise UserError(
            f"Concept {', '.join(missing)} has not been learned. Known: {', '.join(vectors) or 'none'}."
        )
    return "".join(
        PARENTHESIS.sub(r"\\\1", part) if isinstance(part, str) else f"<{part.name}>"
        for part in prompt.parts
    )


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
