"""Train the reader of pictures (ruler.py) on renders, and measure it on others.

    python benchmarks/ruler_train.py            # about 25 minutes of one core
    python benchmarks/ruler_train.py --measure  # only the figures of the weights that are there

It learns from scenes of any shape, colour and pattern of the world, half of them as rendered and half
after the demo model's autoencoder, with a little noise on the latents: what the demo model draws
comes out of that autoencoder. Its scenes are from a random stream of their own, so it has seen neither
the demo model's training scenes nor a scene of any benchmark. It is measured on concept scenes with seeds
from 5000 on, as rendered and after the autoencoder, and on fresh scenes of its own stream.

Writes ruler.safetensors, results/ruler.md and results/ruler_log.jsonl.
"""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from numpy import ndarray
from numpy.random import Generator
from ruler import BACKGROUNDS, CELL, KIND, SIZES, WEIGHTS, WORDS, Reading, Ruler, load, read
from torch import Tensor

from em_core.commands.common import load_host
from em_core.demo import textures
from em_core.demo.captions import Look
from em_core.demo.placing import APART, CLOSE, place
from em_core.demo.rendering import SceneObject, render
from em_core.demo.scenes import ConceptPicture, Scene, concept_scene
from em_core.demo.training.autoencoder import to_tensor
from em_core.demo.training.schedule import Log, cosine_rate, lay_out_channels_last
from em_core.files import write_tensors, write_text
from em_core.hosts.diffusers import DiffusersHost

RESULTS = Path(__file__).parent / "results"
STREAM = 3  # the demo world's own scenes have 1 and 2
COUNTS = (0.25, 0.4, 0.15, 0.15, 0.05)
RADII = ((9.0, 17.0), (9.0, 16.0), (8.5, 12.5), (8.0, 11.0), (7.5, 9.5))
UNKNOWN = 255
SIDE = textures.SIZE // CELL
NOISE = 0.15
"""Most standard deviation of the noise on latents, whose own is about 1."""
SHOWN_SETS, FIRST_SEEN, UNSEEN = "ABC", 5000, 999


@dataclass(frozen=True)
class Table:
    """Pictures (values 0 to 255) and what the network should say of them.

    `heat`: 1 at the cell of each thing's centre, falling off around it. `looks`: index of shape, colour
    and pattern in the nine cells around each centre, `UNKNOWN` elsewhere.
    """

    pictures: UInt8[ndarray, "n 64 64 3"]
    heat: Float[ndarray, "n 32 32"]
    looks: UInt8[ndarray, "n 3 32 32"]
    grounds: Int[ndarray, " n"]

    def __len__(self) -> int:
        return len(self.pictures)


class Row(NamedTuple):
    """One scene of a table."""

    picture: ndarray
    heat: ndarray
    looks: ndarray
    ground: int


def any_scene(rng: Generator) -> Scene:
    """One to five things of any shape, colour and pattern; in a third of scenes they may overlap."""
    count = int(rng.choice(len(COUNTS), p=COUNTS)) + 1
    looks: list[Look] = []
    for _ in range(count):
        shape, colour, pattern = (words[int(rng.integers(len(words)))] for words in WORDS)
        looks.append((shape, colour, pattern))
    near = CLOSE if rng.random() < 1 / 3 else APART
    placed = place(looks, rng, RADII[count - 1], near)
    objects = tuple(placed[int(index)] for index in rng.permutation(count))
    name = BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]
    picture, masks = render(objects, textures.background(name, rng))
    return Scene(picture, masks, objects, name)


def as_row(scene: Scene) -> Row:
    """A scene's row of the table; things of which fewer than 20 pixels are seen are not counted."""
    heat = np.zeros((SIDE, SIDE), dtype=np.float32)
    looks = np.full((len(WORDS), SIDE, SIDE), UNKNOWN, dtype=np.uint8)
    down, across = np.mgrid[:SIDE, :SIDE]
    for mask, each in zip(scene.masks, scene.objects, strict=True):
        if mask.sum() < 20:
            continue
        row, column = cell_of(mask)
        far = (down - row) ** 2 + (across - column) ** 2
        heat = np.maximum(heat, np.exp(-far / 2).astype(np.float32))
        looks[:, far <= 2] = np.array(indices(each), dtype=np.uint8)[:, None]
    return Row(scene.image, heat, looks, BACKGROUNDS.index(scene.background))


def cell_of(mask: ndarray) -> tuple[int, int]:
    """The cell of the centroid of visible pixels."""
    rows, columns = np.nonzero(mask)
    return int((rows.mean() + 0.5) / CELL), int((columns.mean() + 0.5) / CELL)


def indices(each: SceneObject) -> list[int]:
    """Shape, colour and pattern as numbers."""
    look = (each.shape, each.colour, each.pattern)
    return [words.index(word) for words, word in zip(WORDS, look, strict=True)]


def table_of(scenes: Iterable[Scene]) -> Table:
    """A table of scenes."""
    pictures, heat, looks, grounds = zip(*map(as_row, scenes), strict=True)
    return Table(np.stack(pictures), np.stack(heat), np.stack(looks), np.array(grounds))


@torch.no_grad()
def redrawn(
    host: DiffusersHost, pictures: UInt8[ndarray, "n 64 64 3"], seed: int, noise: float = 0.0
) -> UInt8[ndarray, "n 64 64 3"]:
    """Pictures after the autoencoder's round trip, with up to `noise` on their latents."""
    rng = torch.Generator().manual_seed(seed)
    done = []
    for start in range(0, len(pictures), 32):
        z = host.encode_image(to_tensor(pictures[start : start + 32]))
        amount = torch.rand((len(z), 1, 1, 1), generator=rng) * noise
        z = z + amount * torch.randn(z.shape, generator=rng)
        x = host.vae.decode(z / host.vae.config.scaling_factor).sample.float()
        values = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        done.append(values.permute(0, 2, 3, 1).numpy())
    return np.concatenate(done)


def batches(
    tables: Sequence[Table], count: int, size: int, seed: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Random rows of random tables, mirrored at random."""
    rng = np.random.default_rng([STREAM, seed, 1])
    for _ in range(count):
        rows: list[Row] = []
        for _ in range(size):
            table = tables[int(rng.integers(len(tables)))]
            at, step = int(rng.integers(len(table))), int(rng.choice((-1, 1)))
            rows.append(
                Row(
                    table.pictures[at][:, ::step],
                    table.heat[at][:, ::step],
                    table.looks[at][..., ::step],
                    int(table.grounds[at]),
                )
            )
        pictures, heat, looks, grounds = zip(*rows, strict=True)
        of_heat, of_looks = (torch.from_numpy(np.stack(each)) for each in (heat, looks))
        yield to_tensor(np.stack(pictures)), of_heat, of_looks, torch.tensor(grounds)


def centre_loss(logits: Float[Tensor, "b h w"], heat: Float[Tensor, "b h w"]) -> Tensor:
    """Focal loss of centres (Zhou et al. 2019, arXiv 1904.07850, Eq. 1)."""
    sure, unsure = F.logsigmoid(logits), F.logsigmoid(-logits)
    p, centre = logits.sigmoid(), heat == 1
    loss = torch.where(centre, (1 - p) ** 2 * sure, (1 - heat) ** 4 * p**2 * unsure)
    return -loss.sum() / centre.sum().clamp(min=1)


def losses(
    logits: Float[Tensor, "b c h w"],
    grounds: Float[Tensor, "b g"],
    heat: Tensor,
    looks: Tensor,
    ground: Tensor,
) -> list[Tensor]:
    """Losses of centres, shapes, colours, patterns and backgrounds."""
    parts = logits[:, 1:].split(SIZES, dim=1)
    known = looks.long()
    named = [
        F.cross_entropy(part, known[:, index], ignore_index=UNKNOWN)
        for index, part in enumerate(parts)
    ]
    return [centre_loss(logits[:, 0], heat), *named, F.cross_entropy(grounds, ground)]


def train(host: DiffusersHost, scenes: int, steps: int, size: int, seed: int, log: Log) -> Ruler:
    """Train from a seed; the log gets the mean losses of every hundred steps."""
    rng = np.random.default_rng([STREAM, seed])
    clean = table_of(any_scene(rng) for _ in range(scenes))
    part = slice(0, (scenes + 1) // 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        blurred = redrawn(host, clean.pictures[part], seed, NOISE)
    tables = (clean, Table(blurred, clean.heat[part], clean.looks[part], clean.grounds[part]))
    log.write(scenes=scenes)
    torch.manual_seed(seed)
    ruler = Ruler()
    ruler.head.bias.data[0] = -4.0  # hardly any cell is a centre
    lay_out_channels_last(ruler)
    optimiser = torch.optim.AdamW(ruler.parameters(), weight_decay=0.02)
    recent: list[list[float]] = []
    for step, (x, heat, looks, ground) in enumerate(batches(tables, steps, size, seed)):
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * cosine_rate(step / steps, step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits, grounds = ruler(x.contiguous(memory_format=torch.channels_last))
        terms = losses(logits.float(), grounds.float(), heat, looks, ground)
        optimiser.zero_grad(set_to_none=True)
        torch.stack(terms).sum().backward()
        optimiser.step()
        recent.append(torch.stack(terms).tolist())
        if (step + 1) % 100 == 0:
            means = np.mean(recent, axis=0).round(4).tolist()
            names = ("centre", "shape", "colour", "pattern", "ground")
            log.write(step=step + 1, **dict(zip(names, means, strict=True)))
            recent = []
    return ruler.eval().requires_grad_(False)


def save(ruler: Ruler) -> None:
    """Write the weights in half precision."""
    tensors = {
        name: x.contiguous().half() if x.is_floating_point() else x
        for name, x in ruler.state_dict().items()
    }
    write_tensors(WEIGHTS, tensors, KIND, {})


def unseen(set_: str, count: int) -> list[Scene]:
    """Scenes of a set, or fresh ones of the reader's own stream."""
    if set_ == "own":
        rng = np.random.default_rng([STREAM, UNSEEN])
        return [any_scene(rng) for _ in range(count)]
    scenes = [concept_scene(FIRST_SEEN + index, set_) for index in range(count)]
    return [
        Scene(each.image, np.stack(list(each.masks.values())), in_order(each.only), each.background)
        for each in scenes
    ]


def in_order(picture: ConceptPicture) -> tuple[SceneObject, ...]:
    """The objects in the order of the masks."""
    return tuple(picture.objects[i] for i in picture.meant.values() if i is not None)


@dataclass(frozen=True)
class Figures:
    """How often the reader is right: `things` of n, `pictures` of n, and what of each."""

    things: int
    pictures: int
    right: dict[str, float]


def measured(
    scenes: Sequence[Scene], pictures: UInt8[ndarray, "n 64 64 3"], ruler: Ruler
) -> Figures:
    """Shares of things found and named rightly (one that is not found is named wrongly), and of
    pictures with the right number of things and the right background."""
    things: list[list[bool]] = []
    counts, grounds = [], []
    for start in range(0, len(scenes), 32):
        x = to_tensor(pictures[start : start + 32]) / 2 + 0.5
        for scene, reading in zip(scenes[start : start + 32], read(x, ruler), strict=True):
            things += [
                judged(mask, each, reading)
                for mask, each in zip(scene.masks, scene.objects, strict=True)
            ]
            counts.append(len(reading.things) == len(scene.objects))
            grounds.append(reading.background == scene.background)
    names = ("found", "shape", "colour", "pattern")
    right = dict(zip(names, np.mean(things, axis=0).tolist(), strict=True))
    right |= {"count": float(np.mean(counts)), "background": float(np.mean(grounds))}
    return Figures(len(things), len(scenes), right)


def judged(mask: ndarray, each: SceneObject, reading: Reading) -> list[bool]:
    """Whether an object is found, and its shape, colour and pattern are named rightly."""
    rows, columns = np.nonzero(mask)
    x, y = columns.mean() + 0.5, rows.mean() + 0.5
    near = min(reading.things, key=lambda t: (t.x - x) ** 2 + (t.y - y) ** 2, default=None)
    if near is None or (near.x - x) ** 2 + (near.y - y) ** 2 > 6**2:
        return [False] * 4
    look = (each.shape, each.colour, each.pattern)
    return [True, *(a == b for a, b in zip(near.look, look, strict=True))]


def report(ruler: Ruler, host: DiffusersHost, count: int) -> str:
    """The table of the reader's errors."""
    columns = ("found", "shape", "colour", "pattern", "count", "background")
    lines = []
    for set_ in (*SHOWN_SETS, "EF", "own"):
        scenes = [s for one in (set_ if set_ != "own" else ["own"]) for s in unseen(one, count)]
        pictures = np.stack([scene.image for scene in scenes])
        for how, shown in (("rendered", pictures), ("autoencoder", redrawn(host, pictures, 0))):
            found = measured(scenes, shown, ruler)
            shares = " | ".join(f"{found.right[name]:.1%}" for name in columns)
            lines.append(f"| {set_} | {how} | {found.pictures} | {found.things} | {shares} |")
    head = f"| scenes | pictures are | n | things | {' | '.join(columns)} |"
    return "\n".join([INTRODUCTION, head, "|" + " --- |" * (len(columns) + 4), *lines, ""])


INTRODUCTION = """# How often the reader of pictures is right

On scenes that it was not trained on. Shares of things that are found, and whose shape, colour and pattern
are named rightly (what is not found counts as wrong), then of pictures with the right number of things
and with the right background. `autoencoder`: after the demo model's autoencoder, as all that the model
draws is. `own`: one to five things, also overlapping ones. See benchmarks/ruler_train.py.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=12_000)
    parser.add_argument("--steps", type=int, default=2_400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--measured", type=int, default=200, help="scenes of each set to measure on"
    )
    parser.add_argument("--measure", action="store_true", help="only measure what is there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    host = load_host("demo")
    if not args.measure:
        path = RESULTS / "ruler_log.jsonl"
        path.unlink(missing_ok=True)
        save(train(host, args.scenes, args.steps, args.batch, args.seed, Log(path)))
    text = report(load(), host, args.measured)
    write_text(RESULTS / "ruler.md", text)
    print(text)


if __name__ == "__main__":
    main()
