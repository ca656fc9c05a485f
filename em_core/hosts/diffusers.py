"""The diffusion-model protocol over diffusers, which is an extra.

Works with any Stable Diffusion 1.x / 2.x pipeline folder, and with a single .safetensors checkpoint
where diffusers can read it without a network.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn

from ..errors import UserError
from ..model.adapters import DIFF, DOWN, differences_applied, lora_applied
from ..model.layers import CrossAttentionLayer
from ..model.protocol import Conditioning, ModelIdentity
from ..model.recording import AttentionRecorder, listening
from ..model.schedules import NoiseSchedule
from ..model.vectors import random_vectors, spread_pieces
from ..prompts import ConceptPrompt, ConceptVectors, require_known

SD2_WIDTH = 1024


def cross_attention_modules(unet: nn.Module) -> dict[str, Any]:
    """Module path -> diffusers Attention of every cross-attention (attn2), in network order."""
    return {name: m for name, m in unet.named_modules() if name.endswith("attn2")}


@contextmanager
def record_attention(unet: nn.Module, recorder: AttentionRecorder) -> Iterator[AttentionRecorder]:
    """Let `recorder` see a diffusers UNet's cross-attention while the context is open."""
    modules = cross_attention_modules(unet)
    with listening(recorder, {n: (m.to_q, m.to_k, m.heads) for n, m in modules.items()}):
        yield recorder


def describe_layers(unet: Any) -> tuple[CrossAttentionLayer, ...]:
    """The cross-attention layers of a diffusers UNet with their scale and stage."""
    levels = len(unet.config.block_out_channels)
    layers = []
    for name in cross_attention_modules(unet):
        stage, _, rest = name.partition("_block")
        index = int(rest.split(".")[1]) if stage != "mid" else levels - 1
        level = levels - 1 - index if stage == "up" else index
        layers.append(CrossAttentionLayer(name, 2**level, stage))
    order = {"down": 0, "mid": 1, "up": 2}
    return tuple(sorted(layers, key=lambda layer: order[layer.stage]))


def load_pipeline(path: Path) -> Any:
    """A Stable Diffusion pipeline from a folder or one .safetensors file, never from the network.

    Raises:
        UserError: diffusers is not installed, or there is no model that it can read.
    """
    try:
        from diffusers import StableDiffusionPipeline
    except ImportError as error:
        raise UserError(
            "This needs diffusers. Install it: pip install diffusers transformers"
        ) from error
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True}
    try:
        if path.is_dir():
            return StableDiffusionPipeline.from_pretrained(
                path, safety_checker=None, requires_safety_checker=False, **options
            )
        if path.suffix == ".safetensors" and path.is_file():
            return StableDiffusionPipeline.from_single_file(str(path), **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"Could not load a Stable Diffusion 1.x or 2.x model from {path}: {error}. "
            "Expected a diffusers pipeline folder with safetensors weights, or one .safetensors checkpoint."
        ) from error
    raise UserError(
        f"No model at {path}. Expected a diffusers pipeline folder (with model_index.json) "
        "or one .safetensors checkpoint."
    )


def require_plain_model(unet: Any, text_encoder: Any) -> None:
    """Refuse a UNet that takes more than noise, a timestep and one text encoder's output.

    Raises:
        UserError: an inpainting model, SDXL, or another kind.
    """
    channels, width = unet.config.in_channels, unet.config.cross_attention_dim
    text = text_encoder.get_input_embeddings().weight.shape[1]
    if channels != 4 or width != text:
        raise UserError(
            f"This is no plain Stable Diffusion 1.x or 2.x model. Expected a UNet of 4 input channels "
            f"and the text encoder's width of {text}, got {channels} channels and width {width}. "
            "Inpainting models and SDXL cannot be used here."
        )


class DiffusersHost:
    """The protocol :class:`em_core.model.protocol.DiffusionModel` over a diffusers Stable Diffusion pipeline.

    Attributes:
        pipeline: the diffusers pipeline; its modules are frozen and in eval mode.
        known_words: words that the model was trained on, where it knows only these.
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
        # As embedding files call them: OpenCLIP-H of SD 2.x, CLIP-L of SD 1.x and its small kin.
        self.encoder = "clip_h" if width == SD2_WIDTH else "clip_l"
        config = pipeline.scheduler.config
        pipeline.set_progress_bar_config(disable=True)
        self.schedule = NoiseSchedule(
            pipeline.scheduler.alphas_cumprod.float(), config.prediction_type
        )
        self.layers = describe_layers(self.unet)
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.image_side = self.unet.config.sample_size * factor
        self.image_multiple = factor * 2 ** (len(self.unet.config.block_out_channels) - 1)

    @classmethod
    def load(
        cls, path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> "DiffusersHost":
        """Load a model; a `words.json` beside it lists the only words that it knows."""
        words = path / "words.json"
        known = (
            frozenset(json.loads(words.read_text(encoding="utf-8"))) if words.is_file() else None
        )
        return cls(load_pipeline(path), device, known, dtype)

    @torch.no_grad()
    def encode_image(self, image: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        posterior = self.vae.encode(image.to(self.device, self.vae.dtype)).latent_dist
        return posterior.mean.float() * self.vae.config.scaling_factor

    def encode_prompts(
        self, prompts: Sequence[ConceptPrompt], vectors: ConceptVectors
    ) -> Conditioning:
        """Encode prompts with the vectors in place of the concepts.

        Raises:
            UserError: too many pieces, a word that the model does not know, or a concept without vectors.
        """
        rows = [self.token_row(prompt, vectors) for prompt in prompts]
        ids = torch.stack([ids for ids, _, _ in rows])
        columns = tuple(columns for _, columns, _ in rows)
        with self.concepts_in_place(columns, vectors):
            y = self.text_encoder(ids.to(self.device))[0]
        return Conditioning(y=y, columns=columns, end=tuple(end for _, _, end in rows))

    def token_row(
        self, prompt: ConceptPrompt, vectors: ConceptVectors
    ) -> tuple[Int[Tensor, " t"], dict[str, tuple[int, ...]], int]:
        """Token ids of one prompt, each concept's positions, and the position of the end token."""
        tokenizer = self.pipeline.tokenizer
        ids, columns = [tokenizer.bos_token_id], {}
        for part in prompt.parts:
            if isinstance(part, str):
                ids += self.pieces(part)
                continue
            if part.name not in vectors:
                raise UserError(
                    f"Concept {part.name} has not been learned. Known: {', '.join(vectors)}."
                )
            count = len(vectors[part.name][self.encoder])
            columns[part.name] = tuple(range(len(ids), len(ids) + count))
            ids += [tokenizer.bos_token_id] * count
        end, limit = len(ids), self.text_encoder.config.max_position_embeddings
        if end + 1 > limit:
            raise UserError(
                f"The prompt {str(prompt)!r} has {end - 1} pieces. Expected at most {limit - 2}: shorten it."
            )
        pad = tokenizer.pad_token_id
        row = [*ids, tokenizer.eos_token_id, *[pad] * (limit - end - 1)]
        return torch.tensor(row), columns, end

    def pieces(self, text: str) -> list[int]:
        """CLIP ids of plain text.

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
        """Put the concepts' vectors at their positions in the token embedding's output."""

        def replace(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            output = output.clone()
            for b, of_prompt in enumerate(columns):
                for name, positions in of_prompt.items():
                    output[b, list(positions)] = vectors[name][self.encoder].to(output)
            return output

        handle = self.text_encoder.get_input_embeddings().register_forward_hook(replace)
        try:
            yield
        finally:
            handle.remove()

    def predict_noise(
        self, Z_t: Float[Tensor, "b c h w"], t: Int[Tensor, " b"], conditioning: Conditioning
    ) -> Float[Tensor, "b c h w"]:
        dtype = self.unet.dtype
        return self.unet(Z_t.to(dtype), t, conditioning.y.to(dtype)).sample.float()

    @contextmanager
    def record_attention(self, recorder: AttentionRecorder) -> Iterator[AttentionRecorder]:
        with record_attention(self.unet, recorder):
            yield recorder

    def initial_vectors(
        self, words: str, count: int | None, generator: torch.Generator
    ) -> dict[str, Float[Tensor, "n d"]]:
        """Vectors of the words' pieces, or random ones with the table's mean and deviation."""
        table = self.text_encoder.get_input_embeddings().weight.detach().float()
        ids = self.pieces(words)
        if not ids:
            return {self.encoder: random_vectors(table, count or 1, generator)}
        return {self.encoder: spread_pieces(table[ids], count or len(ids))}

    def adaptable_layers(self) -> dict[str, nn.Linear]:
        found = {}
        for root, module in (("unet", self.unet), ("text_encoder", self.text_encoder)):
            for name, layer in module.named_modules():
                if isinstance(layer, nn.Linear) and re.search(
                    r"attn.*\.(to_[qkv]|to_out\.0|[qkv]_proj|out_proj)$", name
                ):
                    found[f"{root}.{name}"] = layer
        return found

    def weights(self, kind: Literal["cross_attention", "full"]) -> dict[str, nn.Parameter]:
        if kind == "cross_attention":
            wanted = re.compile(r"attn2\.to_[kv]\.weight$")
            return {f"unet.{n}": p for n, p in self.unet.named_parameters() if wanted.search(n)}
        table = self.text_encoder.get_input_embeddings().weight
        both = (("unet", self.unet), ("text_encoder", self.text_encoder))
        named = [(f"{root}.{n}", p) for root, module in both for n, p in module.named_parameters()]
        return {name: p for name, p in named if p is not table}

    def identity(self) -> ModelIdentity:
        modules = {"unet": self.unet, "text_encoder": self.text_encoder}
        tensors = {f"{r}.{n}": p for r, m in modules.items() for n, p in m.named_parameters()}
        names = sorted(tensors)
        shapes = "\n".join(f"{name} {tuple(tensors[name].shape)}" for name in names)
        flat = [tensors[name].detach().reshape(-1) for name in names]
        sample = torch.stack([x[len(x) // 2] for x in flat]).float().cpu()
        width = self.text_encoder.get_input_embeddings().weight.shape[1]
        architecture = hashlib.sha256(shapes.encode()).hexdigest()
        family = {768: "sd1", SD2_WIDTH: "sd2"}.get(width, f"sd-{width}")
        return ModelIdentity(family, architecture, {self.encoder: width}, sample)

    @contextmanager
    def adapted(self, weights: Mapping[str, Tensor], lora_scale: float) -> Iterator[None]:
        """Apply learned weights (LoRA factors or differences) while the context is open."""
        lora = {name: x.to(self.device) for name, x in weights.items() if not name.endswith(DIFF)}
        diffs = {name: x for name, x in weights.items() if name.endswith(DIFF)}
        with ExitStack() as stack:
            if any(name.endswith(DOWN) for name in lora):
                stack.enter_context(lora_applied(self.adaptable_layers(), lora, lora_scale))
            if diffs:
                stack.enter_context(differences_applied(self.weights("full"), diffs))
            yield

    @torch.no_grad()
    def generate(
        self,
        prompt: ConceptPrompt,
        vectors: ConceptVectors,
        seeds: Sequence[int],
        steps: int = 30,
        guidance: float = 5.0,
        size: tuple[int, int] | None = None,
    ) -> Float[Tensor, "b 3 H W"]:
        """Pictures in 0..1, one per seed (diffusers' own sampling loop and scheduler)."""
        empty = self.encode_prompts([ConceptPrompt(())], {}).y
        y = self.encode_prompts([prompt], vectors).y
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
