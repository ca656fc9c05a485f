"""The protocol of em_core.model.protocol over a MODEL, a CLIP and a VAE of ComfyUI."""

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
from ...em_core.masks.resizing import Size
from ...em_core.model.adapters import TrainableParts, trainable_lora, trainable_weights
from ...em_core.model.identity import ModelIdentity
from ...em_core.model.layers import AttentionLayer
from ...em_core.model.protocol import Conditioning, TextStream
from ...em_core.model.recording import AttentionRecorder
from ...em_core.model.schedules import NoiseSchedule
from ...em_core.model.vectors import random_vectors
from ...em_core.prompts import ConceptPrompt, ConceptVectors
from ...em_core.settings import WeightKind
from ..exports import loadable
from .attention import attention_layers, block_levels, record_attention
from .copies import private_copies
from .families import GraphModels, noise_schedule, prediction
from .text import (
    find_columns,
    keep_saved,
    pad_chunks,
    pieces,
    require_same_count,
    token_table,
    tokenize,
    with_concepts,
    word_vectors,
)

UNET = "diffusion_model"
ADAPTABLE = re.compile(r"attn[12]\.(to_[qkv]|to_out\.0)$|self_attn\.([qkv]|out)_proj$")
CROSS_ATTENTION = re.compile(r"attn2\.to_[kv]\.weight$")
NO_PART = re.compile(r"token_embedding\.weight$|logit_scale$|text_projection\.weight$")


class ComfyHost:
    """The protocol :class:`em_core.model.protocol.DiffusionModel` over ComfyUI.

    Attributes:
        models: what the graph gives, identified.
        learning: the weights are private copies with gradients; False: the user's own, to read only.
    """

    def __init__(self, models: GraphModels, learning: bool = False) -> None:
        self.models, self.learning = models, learning
        self.model, self.clip, self.vae = models.model, models.clip, models.vae
        self.unet = self.model.model.diffusion_model
        self.device = torch.device(self.model.load_device)
        self.schedule: NoiseSchedule = noise_schedule(self.model)
        self.image_side = models.image_side
        deepest = max(block_levels(self.unet).values())
        self.image_multiple = models.factor * 2**deepest
        sampling = self.model.get_model_object("model_sampling")
        self.sigmas = sampling.sigmas.detach().clone().float()
        self.loaded = False
        self._identity: ModelIdentity | None = None

    def attention_layers(self, latent_size: Size) -> tuple[AttentionLayer, ...]:
        return attention_layers(self.unet, latent_size)

    def load(self) -> None:
        """Bring MODEL and CLIP onto the device together, so that neither pushes the other out."""
        if not self.loaded:
            mm.load_models_gpu([self.model, self.clip.patcher], force_full_load=self.learning)
            self.model.pre_run()
            self.loaded = True

    @torch.no_grad()
    def encode_image(self, image: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        self.loaded = False
        pixels = rearrange(image, "b c h w -> b h w c").float().cpu() / 2 + 0.5
        latent = self.vae.encode(pixels).to(self.device, torch.float32, copy=True)
        return self.model.model.process_latent_in(latent)

    def encode_prompts(
        self, prompts: Sequence[ConceptPrompt], vectors: ConceptVectors
    ) -> Conditioning:
        """Encode prompts with the vectors in place of the concepts; any length.

        Raises:
            UserError: a concept without vectors.
        """
        self.load()
        require_same_count(vectors)
        tokenizer = with_concepts(self.clip.tokenizer, vectors, tuple(self.models.encoders))
        texts = [prompt_text(prompt, vectors) for prompt in prompts]
        tokens = {text: tokenize(tokenizer, text) for text in dict.fromkeys(texts)}
        chunks = max(len(rows) for of in tokens.values() for rows in of.values())
        encoded, places = {}, {}
        for text, of in tokens.items():
            encoded[text] = self.encode_tokens(pad_chunks(of, tokenizer, chunks))
            places[text] = find_columns(of, tokenizer, vectors)
        pooled = [vector for text in texts if (vector := encoded[text][1]) is not None]
        y = torch.cat([encoded[text][0] for text in texts])
        columns, end = zip(*(places[text] for text in texts), strict=True)
        inputs = {"y": y} | ({"pooled": torch.cat(pooled)} if pooled else {})
        return Conditioning(inputs, {"text": TextStream(y.shape[1], columns, end)})

    def encode_tokens(self, tokens: Any) -> tuple[Tensor, Tensor | None]:
        """The encoded sequence [1, t, d] and the pooled vector, as CLIP.encode_from_tokens gives them."""
        encoder = self.clip.cond_stage_model
        encoder.reset_clip_options()
        if self.clip.layer_idx is not None:
            encoder.set_clip_options({"layer": self.clip.layer_idx})
        encoder.set_clip_options({"execution_device": self.clip.patcher.load_device})
        with keep_saved() if torch.is_grad_enabled() else nullcontext():
            y, pooled = encoder.encode_token_weights(tokens)[:2]
        y = y.to(self.device).float()
        return y, None if pooled is None else pooled.to(self.device).float()

    def predict(
        self, Z_t: Float[Tensor, "b c h w"], t: Float[Tensor, " b"], conditioning: Conditioning
    ) -> Float[Tensor, "b c h w"]:
        """Output of the UNet with everything that is patched around it.

        ComfyUI's models take x = Z_t sqrt(sigma^2 + 1) and give x_0, so both are turned back.
        """
        mm.throw_exception_if_processing_interrupted()
        self.load()
        sigma = self.sigmas.to(t.device)[t.long()]
        wide = sigma[:, None, None, None]
        root = (wide**2 + 1).sqrt()
        x = Z_t.float() * root
        x_0 = self.apply(x, sigma, conditioning).float()
        if prediction(self.model) == "epsilon":
            return (x - x_0) / wide
        return (x / root**2 - x_0) * root / wide

    def apply(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """x_0, by the way a sampler of ComfyUI takes through the wrappers and patches of other packs."""
        options = self.model.model_options
        given = {
            "c_crossattn": conditioning.inputs["y"],
            "transformer_options": self.transformer_options(sigma),
        }
        given |= self.size_conditioning(x, conditioning)
        wrapper = options.get("model_function_wrapper")
        try:
            if wrapper is None:
                return self.model.model.apply_model(x, sigma, **given)
            call = {"input": x, "timestep": sigma, "c": given, "cond_or_uncond": [0]}
            return wrapper(self.model.model.apply_model, call)
        except RuntimeError as error:
            if self.learning and "nference tensor" in str(error):
                raise UserError(
                    "A patch that another node has put on the MODEL cannot take part in learning "
                    f"({error}). Give LearnConcepts the MODEL from before that node."
                ) from error
            raise

    def transformer_options(self, sigma: Tensor) -> dict[str, Any]:
        """What the UNet's blocks are told: the graph's patches, and what samplers add."""
        options = dict(self.model.model_options["transformer_options"])
        for what in ("wrappers", "callbacks"):
            of_model = getattr(self.model, what)
            options[what] = merge_nested_dicts(dict(options.get(what, {})), of_model)
        added = {"cond_or_uncond": [0], "uuids": [uuid.UUID(int=0)], "sigmas": sigma}
        return options | added | {"sample_sigmas": self.sigmas.flip(0)}

    def size_conditioning(self, x: Tensor, conditioning: Conditioning) -> dict[str, Tensor]:
        """SDXL's vector of the pooled text and the picture's size; nothing for the others."""
        if self.models.family != "sdxl":
            return {}
        height, width = x.shape[-2] * self.models.factor, x.shape[-1] * self.models.factor
        pooled = conditioning.inputs["pooled"]
        y = self.model.model.encode_adm(
            pooled_output=pooled, height=height, width=width, device=self.device
        )
        return {"y": y.to(self.device)}

    @contextmanager
    def record_attention(self, recorder: AttentionRecorder) -> Iterator[AttentionRecorder]:
        with record_attention(self.unet, recorder):
            yield recorder

    def initial_vectors(
        self, words: str, count: int | None, generator: torch.Generator
    ) -> dict[str, Float[Tensor, "n d"]]:
        """Vectors of the words' pieces, or random ones with the table's mean and deviation."""
        found = {}
        first = next(iter(self.models.encoders))
        count = count or max(1, len(pieces(self.clip.tokenizer, first, words)))
        for name in self.models.encoders:
            vectors = word_vectors(self.clip, name, words, count)
            if vectors is None:
                vectors = random_vectors(token_table(self.clip, name), count, generator)
            found[name] = vectors.to(self.device)
        return found

    def release(self) -> None:
        """Undo what running the model sets on it."""
        self.model.cleanup()

    def named_weights(self) -> dict[str, nn.Parameter]:
        """Path -> every weight of the UNet and the text encoders."""
        named = {f"{UNET}.{n}": p for n, p in self.unet.named_parameters()}
        return named | dict(self.clip.cond_stage_model.named_parameters())

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
        """Path -> linear layers that a LoRA acts on: the attention of UNet and text encoders."""
        found = {f"{UNET}.{n}": m for n, m in self.unet.named_modules()}
        found |= dict(self.clip.cond_stage_model.named_modules())
        return {n: m for n, m in found.items() if isinstance(m, nn.Linear) and ADAPTABLE.search(n)}

    def weights(self, kind: WeightKind) -> dict[str, nn.Parameter]:
        """Path -> the keys and values of cross-attention, or all weights that take part."""
        named = self.named_weights()
        if kind == "cross_attention":
            return {n: p for n, p in named.items() if CROSS_ATTENTION.search(n)}
        return {n: p for n, p in named.items() if not NO_PART.search(n)}

    @contextmanager
    def applied(self, weights: Mapping[str, Tensor], lora_scale: float) -> Iterator[None]:
        """Let learned weights act as ComfyUI's own LoRA loader applies them."""
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
        self, prompt: ConceptPrompt, vectors: ConceptVectors, seeds: Sequence[int]
    ) -> Float[Tensor, "b 3 H W"]:
        """Pictures in 0..1, one per seed, by ComfyUI's Euler sampler."""
        import comfy.sample

        conds = [
            self.sampler_conditioning(p, of)
            for p, of in ((prompt, vectors), (ConceptPrompt(()), {}))
        ]
        side = self.image_side // self.models.factor
        pictures = []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            noise = torch.randn(1, self.models.channels, side, side, generator=generator)
            latent = comfy.sample.sample(
                self.model, noise, 20, 5.0, "euler", "normal", *conds, torch.zeros_like(noise),
                disable_pbar=True, seed=seed,
            )  # fmt: skip
            self.loaded = False
            pictures.append(rearrange(self.vae.decode(latent), "b h w c -> b c h w").clone())
        return torch.cat(pictures)

    def sampler_conditioning(self, prompt: ConceptPrompt, vectors: ConceptVectors) -> list:
        """A CONDITIONING as ComfyUI's samplers take it."""
        encoded = self.encode_prompts([prompt], vectors)
        return [[encoded.inputs["y"], {"pooled_output": encoded.inputs.get("pooled")}]]


def prompt_text(prompt: ConceptPrompt, vectors: ConceptVectors) -> str:
    """The prompt with its concepts as `<name>`.

    Raises:
        UserError: a concept has no vectors.
    """
    missing = [name for name in prompt.names if name not in vectors]
    if missing:
        raise UserError(
            f"Concept {', '.join(missing)} has not been learned. Known: {', '.join(vectors)}."
        )
    return "".join(p if isinstance(p, str) else f"<{p.name}>" for p in prompt.parts)


@contextmanager
def learning_host(
    models: GraphModels, dtype: torch.dtype, clip_dtype: torch.dtype | None = None
) -> Iterator[ComfyHost]:
    """A host to learn on: private copies of the weights as the graph has patched them.

    Args:
        dtype: of the UNet's copy.
        clip_dtype: of the text encoders'; None: their own.

    Raises:
        UserError: MODEL or CLIP cannot be learned on.
    """
    with private_copies(models.model, models.clip, dtype, clip_dtype) as (model, clip):
        host = ComfyHost(replace(models, model=model, clip=clip), learning=True)
        try:
            yield host
        finally:
            host.__dict__.clear()  # whoever still holds it must not keep the copies alive
