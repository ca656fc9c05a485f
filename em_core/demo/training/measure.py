"""What the demo model can do, in numbers, on scenes that it was not trained on."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from numpy import ndarray
from torch import Tensor

from ...hosts.attention import attention_layers, record_attention
from ...model.columns import select_columns
from ...model.recording import AttentionRecorder
from ..captions import Caption, Look, bare_caption, full_caption
from ..scenes import Scene, training_generator, training_scene
from .autoencoder import to_tensor
from .denoiser import noise_schedule, stratified_steps
from .sheet import Pipeline, load

UNSEEN_STREAM = 999_000_000
STEPS = (50, 100, 150, 200, 250, 300)
CaptionOf = Callable[[list[Look], str], Caption]
CAPTIONS: dict[str, CaptionOf] = {
    "full": full_caption,
    "bare": bare_caption,
    "thing": lambda looks, background: bare_caption(looks, background, generic="thing"),
}


def unseen_scenes(count: int, seed: int = 0) -> list[Scene]:
    """Scenes of the kinds seen in training, from a random stream that training does not use."""
    rng = training_generator(UNSEEN_STREAM + seed)
    return [training_scene(rng) for _ in range(count)]


def looks_of(scene: Scene) -> list[Look]:
    """Shape, colour and pattern of the scene's objects."""
    return [(each.shape, each.colour, each.pattern) for each in scene.objects]


@torch.no_grad()
def encode_text(pipeline: Pipeline, captions: Sequence[Caption]) -> Float[Tensor, "b 77 64"]:
    """Conditioning of captions."""
    tokens = pipeline.tokenizer(
        [caption.text for caption in captions],
        padding="max_length",
        max_length=77,
        return_tensors="pt",
    )
    return pipeline.text_encoder(tokens.input_ids).last_hidden_state


@torch.no_grad()
def encode_scenes(pipeline: Pipeline, scenes: Sequence[Scene]) -> Float[Tensor, "b 4 16 16"]:
    """Scaled latents of scenes."""
    x = to_tensor(np.stack([scene.image for scene in scenes]))
    return pipeline.vae.encode(x).latent_dist.mean * pipeline.vae.config.scaling_factor


@torch.no_grad()
def noun_maps(
    pipeline: Pipeline, scene: Scene, caption: Caption, seed: int = 0
) -> dict[str, Float[Tensor, "k h w"]]:
    """Attention of the caption's nouns in every layer, mean over `STEPS`."""
    count = len(STEPS)
    select = select_columns([[[at + 1] for at in caption.nouns]] * count, 77)
    z = encode_scenes(pipeline, [scene]).repeat(count, 1, 1, 1)
    layers = attention_layers(pipeline.unet, (z.shape[-2], z.shape[-1]))
    recorder = AttentionRecorder({"text": select}, {layer.name: layer for layer in layers})
    y = encode_text(pipeline, [caption]).repeat(count, 1, 1)
    t = torch.tensor(STEPS)
    a = noise_schedule()[t][:, None, None, None]
    eps = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed))
    with record_attention(pipeline.unet, recorder):
        pipeline.unet(a.sqrt() * z + (1 - a).sqrt() * eps, t, y)
    return {name: maps.mean(dim=0) for name, maps in recorder.maps.items()}


def mask_iou(map_: Float[Tensor, "h w"], mask: Bool[ndarray, "64 64"]) -> float:
    """IoU of a mask and a map, enlarged (bilinear) and cut at half of its maximum."""
    large = F.interpolate(map_[None, None], size=mask.shape, mode="bilinear")[0, 0].numpy()
    found = large > 0.5 * large.max()
    return float((found & mask).sum() / (found | mask).sum())


def assigned_iou(
    maps: Float[Tensor, "k h w"], masks: Sequence[Bool[ndarray, "64 64"]], clear: Sequence[bool]
) -> list[float]:
    """IoU of each map with its mask; where words are not clear, of the best assignment of theirs."""
    pairs = [[mask_iou(map_, mask) for mask in masks] for map_ in maps]
    free = [index for index, known in enumerate(clear) if not known]
    orders = ([pairs[a][b] for a, b in zip(free, to, strict=True)] for to in permutations(free))
    return [pairs[i][i] for i, known in enumerate(clear) if known] + max(orders, key=sum)


def attention_iou(pipeline: Pipeline, scenes: Sequence[Scene], kind: str) -> dict[str, float]:
    """Mean IoU of every layer's noun maps with the objects' true masks; see `CAPTIONS`."""
    found: dict[str, list[float]] = {}
    for index, scene in enumerate(scenes):
        caption = CAPTIONS[kind](looks_of(scene), scene.background)
        for name, maps in noun_maps(pipeline, scene, caption, index).items():
            masks = [scene.masks[i] for i in caption.meant]
            found.setdefault(name, []).extend(assigned_iou(maps, masks, caption.clear))
    return {name: float(np.mean(values)) for name, values in found.items()}


@torch.no_grad()
def noise_errors(pipeline: Pipeline, scenes: Sequence[Scene], seed: int = 0) -> tuple[float, float]:
    """Mean squared error of the noise under the right captions and under those of other scenes."""
    rng = torch.Generator().manual_seed(seed)
    z = encode_scenes(pipeline, scenes)
    y = encode_text(pipeline, [full_caption(looks_of(s), s.background) for s in scenes])
    t = stratified_steps(len(scenes), rng)
    a = noise_schedule()[t][:, None, None, None]
    eps = torch.randn(z.shape, generator=rng)
    z_t = a.sqrt() * z + (1 - a).sqrt() * eps
    errors = [
        float((pipeline.unet(z_t, t, given).sample - eps).square().mean())
        for given in (y, y.roll(1, dims=0))
    ]
    return errors[0], errors[1]


@torch.no_grad()
def reconstruction(pipeline: Pipeline, scenes: Sequence[Scene]) -> tuple[float, float]:
    """PSNR in dB of the autoencoder over all pixels and over the objects' pixels."""
    x = to_tensor(np.stack([scene.image for scene in scenes]))
    y = pipeline.vae.decode(pipeline.vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
    error = ((x - y) / 2).square().mean(dim=1)
    inside = torch.from_numpy(np.stack([scene.masks.any(axis=0) for scene in scenes]))
    return _decibel(error.mean()), _decibel(error[inside].mean())


def _decibel(error: Tensor) -> float:
    return float(-10 * torch.log10(error))


def report(folder: Path, scenes: int = 60) -> dict[str, object]:
    """All figures of the model in `folder`."""
    pipeline, unseen = load(folder), unseen_scenes(scenes)
    right, shuffled = noise_errors(pipeline, unseen)
    everything, on_objects = reconstruction(pipeline, unseen)
    return {
        "scenes": scenes,
        "objects": sum(len(scene.objects) for scene in unseen),
        "psnr": everything,
        "psnr_objects": on_objects,
        "noise_error": right,
        "noise_error_shuffled": shuffled,
        "iou": {kind: attention_iou(pipeline, unseen, kind) for kind in CAPTIONS},
    }


def main() -> None:
    """Write the figures of a model folder to standard output, as JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path, help="pipeline folder")
    parser.add_argument("--scenes", type=int, default=60)
    arguments = parser.parse_args()
    figures = report(arguments.folder, arguments.scenes)
    sys.stdout.write(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
