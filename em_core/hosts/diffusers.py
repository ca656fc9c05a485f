"""The diffusion-model protocol, implemented with diffusers, which is an optional extra.

It works with any Stable Diffusion 1.x or 2.x pipeline folder, and with a single .safetensors
checkpoint if diffusers can read it without a network.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..errors import UserError
from ..masks.resizing import Size
from ..model.adapters import (
    DIFF,
    DOWN,
    TrainableParts,
    differences_applied,
    lora_applied,
    trainable_lora,
    trainable_weights,
)
from ..model.identity import ModelIdentity
from ..model.layers import AttentionLayer, halved
from ..model.protocol import Conditioning, TextStream
from ..model.recording import AttentionRecorder, listening
from ..model.schedules import NoiseSchedule, VariancePreserving
from ..model.vectors import random_vectors, spread_pieces
from ..prompts import ConceptPrompt, ConceptVectors, embedding_name, require_known
from ..runs.concept_set import ConceptSet
from ..runs.digest import Digest
from ..settings import WeightKind
from .loading import load_pipeline, require_plain_model, torch_device

SD2_WIDTH = 1024
ADAPTABLE = re.compile(r"attn.*\.(to_[qkv]|to_out\.0|[qkv]_proj|out_proj)$")
KEYS_AND_VALUES = re.compile(r"attn2\.to_[kv]\.weight$")


CROSS, SELF = "attn2", "attn1"


def attention_modules(unet: nn.Module, kind: str) -> dict[str, Any]:
    """Map module paths to diffusers' attention modules of a kind, in network order."""
    return {name: module for name, module in unet.named_modules() if name.endswith(kind)}


def record_attention(
    unet: nn.Module, recorder: AttentionRecorder
) -> AbstractContextManager[AttentionRecorder]:
    """Let `recorder` see a diffusers UNet's attention while the context is open."""
    return listening(recorder, attention_modules(unet, CROSS) | attention_modules(unet, SELF))


def attention_layers(unet: Any, latent_size: Size, kind: str = CROSS) -> tuple[AttentionLayer, ...]:
    """Return a diffusers UNet's attention layers of a kind, from the first down block to the last up
    block."""
    levels = len(unet.config.block_out_channels)
    layers: dict[str, list[AttentionLayer]] = {"down": [], "mid": [], "up": []}
    for name in attention_modules(unet, kind):
        stage, _, rest = name.partition("_block")
        index = int(rest.split(".")[1]) if stage != "mid" else levels - 1
        level = levels - 1 - index if stage == "up" else index
        layer = AttentionLayer(name, halved(latent_size, level), localises=stage != "mid")
        layers[stage].append(layer)
    return (*layers["down"], *layers["mid"], *layers["up"])


def dict_of(config: Any) -> dict[str, Any]:
    """Return the configuration of a module of diffusers or transformers."""
    return config.to_dict() if hasattr(config, "to_dict") else dict(config)


def is_about_files(name: str) -> bool:
    """Return whether an entry of a configuration says where it came from, not what it does."""
    return name.startswith("_") or name in ("transformers_version", "architectures")


class DiffusersHost:
    """The protocol :class:`em_core.model.protocol.DiffusionModel` over a Stable Diffusion pipeline.

    Attributes:
        pipeline: the diffusers pipeline; its modules are frozen and in eval mode.
        known_words: the words that the model was trained on, if it knows no others; otherwise None.
    """

    def __init__(
        self,
        pipeline: Any,
        device: torch.device | str = "cpu",
        known_words: frozenset[str] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.pipeline, self.known_words = pipeline, known_words
        self.device = torch.device(device)
        self.unet, self.vae, self.text_encoder = pipeline.unet, pipeline.vae, pipeline.text_encoder
        require_plain_model(self.unet, self.text_encoder)
        for module in (self.unet, self.vae, self.text_encoder):
            module.to(self.device, dtype).eval().requires_grad_(False)
        width = self.text_encoder.get_input_embeddings().weight.shape[1]
        # The names in embedding files: OpenCLIP-H for SD 2.x, CLIP-L for SD 1.x and small models like it.
        self.encoder = "clip_h" if width == SD2_WIDTH else "clip_l"
        config = pipeline.scheduler.config
        pipeline.set_progress_bar_config(disable=True)
        self.schedule: NoiseSchedule = VariancePreserving(
            pipeline.scheduler.alphas_cumprod.float(), config.prediction_type
        )
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.image_side = self.unet.config.sample_size * factor
        self.image_multiple = factor * 2 ** (len(self.unet.config.block_out_channels) - 1)

    @classmethod
    def load(
        cls,
        source: Path | str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "DiffusersHost":
        """Load a pipeline folder, a .safetensors checkpoint, or a model on the hub by its name.

        If the folder has a `words.json`, the model knows only the words listed there.

        Raises:
            UserError: diffusers is not installed, or there is no such model.
        """
        words = Path(source) / "words.json"
        known = (
            frozenset(json.loads(words.read_text(encoding="utf-8"))) if words.is_file() else None
        )
        place = torch_device(str(device))
        return cls(load_pipeline(source), place, known, dtype)

    def attention_layers(self, latent_size: Size) -> tuple[AttentionLayer, ...]:
        return attention_layers(self.unet, latent_size)

    def self_attention_layers(self, latent_size: Size) -> tuple[AttentionLayer, ...]:
        return attention_layers(self.unet, latent_size, SELF)

    @torch.no_grad()
    def encode_image(self, image: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        posterior = self.vae.encode(image.to(self.device, self.vae.dtype)).latent_dist
        return posterior.mean.float() * self.vae.config.scaling_factor

    def encode_prompts(
        self, prompts: Sequence[ConceptPrompt], vectors: ConceptVectors
    ) -> Conditioning:
        """Encode prompts with the vectors in place of the concepts.

        Raises:
            UserError: a prompt is too long, has a word that the model does not know, or has a concept
                without vectors.
        """
        rows = [self.token_row(prompt, vectors) for prompt in prompts]
        ids = torch.stack([ids for ids, _, _ in rows])
        columns = tuple(columns for _, columns, _ in rows)
        with self.concepts_in_place(columns, vectors):
            y = self.text_encoder(ids.to(self.device))[0]
        text = TextStream(y.shape[1], columns, tuple(end for _, _, end in rows))
        return Conditioning({"y": y}, {"text": text})

    def token_row(
        self, prompt: ConceptPrompt, vectors: ConceptVectors
    ) -> tuple[Int[Tensor, " t"], dict[str, tuple[int, ...]], int]:
        """Return a prompt's token ids, each concept's positions, and the position of the end token."""
        tokenizer = self.pipeline.tokenizer
        ids, columns = [tokenizer.bos_token_id], {}
        for part in prompt.parts:
            if isinstance(part, str):
                ids += self.pieces(part)
                continue
            if part.name not in vectors:
                raise UserError(
                    f"Concept {part.name} has not been learned. Known: {', '.join(vectors) or 'none'}."
                )
            count = len(vectors[part.name][self.encoder])
            columns[part.name] = tuple(range(len(ids), len(ids) + count))
            ids += [tokenizer.bos_token_id] * count
        end, limit = len(ids), self.text_encoder.config.max_position_embeddings
        if end + 1 > limit:
            raise UserError(
                f"The prompt {str(prompt)!r} is too long. Expected at most {limit - 2} pieces, got {end - 1}. "
                "Shorten it."
            )
        pad = tokenizer.pad_token_id
        row = [*ids, tokenizer.eos_token_id, *[pad] * (limit - end - 1)]
        return torch.tensor(row), columns, end

    def pieces(self, text: str) -> list[int]:
        """Return the CLIP ids of plain text.

        Raises:
            UserError: the model knows only some words, and `text` has others.
        """
        if self.known_words is not None:
            require_known(text, self.known_words)
        return self.pipeline.tokenizer(text, add_special_tokens=False).input_ids

    @contextmanager
    def concepts_in_place(
        self, columns: Sequence[Mapping[str, tuple[int, ...]]], vectors: ConceptVectors
    ) -> Iterator[None]:
        """Put the concepts' vectors at their positions in the token embeddings while the context is open."""

        def replace(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            output = output.clone()
            for row, positions_by_name in enumerate(columns):
                for name, positions in positions_by_name.items():
                    output[row, list(positions)] = vectors[name][self.encoder].to(output)
            return output

        handle = self.text_encoder.get_input_embeddings().register_forward_hook(replace)
        try:
            yield
        finally:
            handle.remove()

    def predict(
        self, Z_t: Float[Tensor, "b c h w"], t: Float[Tensor, " b"], conditioning: Conditioning
    ) -> Float[Tensor, "b c h w"]:
        dtype = self.unet.dtype
        return self.unet(Z_t.to(dtype), t, conditioning.inputs["y"].to(dtype)).sample.float()

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
        table = self.text_encoder.get_input_embeddings().weight.detach().float()
        ids = self.pieces(words)
        if not ids:
            return {self.encoder: random_vectors(table, count or 1, generator)}
        return {self.encoder: spread_pieces(table[ids], count or len(ids))}

    def modules(self) -> tuple[tuple[str, nn.Module], ...]:
        """Return the parts that can be learned, with the names that prefix their layers' names."""
        return ("unet", self.unet), ("text_encoder", self.text_encoder)

    def adaptable_layers(self) -> dict[str, nn.Linear]:
        """Map paths to the linear layers that a LoRA acts on: the attention of UNet and text encoder."""
        return {
            f"{root}.{name}": layer
            for root, module in self.modules()
            for name, layer in module.named_modules()
            if isinstance(layer, nn.Linear) and ADAPTABLE.search(name)
        }

    def weights(self, kind: WeightKind) -> dict[str, nn.Parameter]:
        """Map paths to the keys and values of cross-attention, or to all weights but the token table."""
        named = self.named_weights()
        if kind == "cross_attention":
            return {name: weight for name, weight in named.items() if KEYS_AND_VALUES.search(name)}
        table = self.text_encoder.get_input_embeddings().weight
        return {name: weight for name, weight in named.items() if weight is not table}

    def named_weights(self) -> dict[str, nn.Parameter]:
        """Map paths to all weights of the UNet and the text encoder."""
        return {
            f"{root}.{name}": weight
            for root, module in self.modules()
            for name, weight in module.named_parameters()
        }

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
        width = self.text_encoder.get_input_embeddings().weight.shape[1]
        family = {768: "sd1", SD2_WIDTH: "sd2"}.get(width, f"sd-{width}")
        return ModelIdentity.of_weights(family, {self.encoder: width}, self.named_weights())

    def fingerprint(self) -> str:
        """Return a hash of all that acts in the pipeline: weights, configurations and vocabulary."""
        parts = {"unet": self.unet, "vae": self.vae, "text_encoder": self.text_encoder}
        digest = Digest()
        for name, module in parts.items():
            config = json.loads(json.dumps(dict_of(module.config), default=str))
            digest.add([name, {k: x for k, x in sorted(config.items()) if not is_about_files(k)}])
            digest.add(dict(sorted(module.named_parameters())))
        return digest.add(sorted(self.pipeline.tokenizer.get_vocab().items())).hexdigest()

    @contextmanager
    def applied(self, weights: Mapping[str, Tensor], lora_scale: float) -> Iterator[None]:
        lora = {
            name: weight.to(self.device)
            for name, weight in weights.items()
            if not name.endswith(DIFF)
        }
        diffs = {name: weight for name, weight in weights.items() if name.endswith(DIFF)}
        with ExitStack() as stack:
            if any(name.endswith(DOWN) for name in lora):
                stack.enter_context(lora_applied(self.adaptable_layers(), lora, lora_scale))
            if diffs:
                stack.enter_context(differences_applied(self.weights("full"), diffs))
            yield

    def generate(
        self,
        prompt: ConceptPrompt | str,
        concepts: ConceptSet | None = None,
        seeds: Sequence[int] = (0,),
        steps: int = 30,
        guidance: float = 5.0,
        size: Size | None = None,
    ) -> Float[Tensor, "b 3 H W"]:
        """Draw pictures in 0..1, one per seed, from a prompt with learned concepts as `<name>`.

        Args:
            prompt: the prompt, such as `a photo of <rex> in the snow`.
            concepts: learned concepts; weights that were learned with them are applied too.
            seeds: seeds of the noise; the same seed gives the same picture.
            steps: number of steps of diffusers' own sampler.
            guidance: scale of classifier-free guidance.
            size: (height, width) in pixels; None takes the model's own.

        Raises:
            UserError: the prompt names a concept that is not among `concepts`.
        """
        prompt = ConceptPrompt.parse(prompt) if isinstance(prompt, str) else prompt
        vectors = concepts.vectors if concepts else {}
        with self.applied(*(concepts.weights, concepts.lora_scale) if concepts else ({}, 1.0)):
            return self.draw(prompt, vectors, seeds, steps, guidance, size)

    @torch.no_grad()
    def draw(
        self,
        prompt: ConceptPrompt,
        vectors: ConceptVectors,
        seeds: Sequence[int],
        steps: int = 30,
        guidance: float = 5.0,
        size: Size | None = None,
    ) -> Float[Tensor, "b 3 H W"]:
        """Draw pictures in 0..1, one per seed, with diffusers' own sampling loop and scheduler."""
        empty = self.encode_prompts([ConceptPrompt(())], {}).inputs["y"]
        y = self.encode_prompts([prompt], vectors).inputs["y"]
        height, width = size or (self.image_side, self.image_side)
        pictures = self.pipeline(
            prompt_embeds=y.expand(len(seeds), -1, -1),
            negative_prompt_embeds=empty.expand(len(seeds), -1, -1),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=height,
            width=width,
            output_type="pt",
        ).images
        return pictures.float()
