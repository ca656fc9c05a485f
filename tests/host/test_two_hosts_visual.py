"""A visual condition is learned, and acts, alike on diffusers and in ComfyUI."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from found import run_script
from safetensors.torch import load_file, save_file
from torch import Tensor

from em_core.commands.demo import example_of
from em_core.demo import model_path
from em_core.demo.scenes import concept_scene
from em_core.hosts.diffusers import DiffusersHost
from em_core.hosts.visual import looking
from em_core.model.visual import init_blocks
from em_core.model.visual_drawing import Reference
from em_core.presets import em_settings, visual_settings
from em_core.prompts import Concept, ConceptPrompt
from em_core.runs.concept_set import ConceptSet
from em_core.runs.visual import learn_visual
from em_core.runs.visual_condition import VisualCondition
from em_core.settings import to_json

TEXT = "a photo of <rex> and <doll> on sand"


def random_condition(host: DiffusersHost) -> VisualCondition:
    """Random blocks that look at a scene's true masks."""
    example, generator = example_of(concept_scene(1, "B")), torch.Generator().manual_seed(0)
    words = {c.name: c.words for c in example.prompt.concepts}
    vectors = {n: dict(host.initial_vectors(w, 1, generator)) for n, w in words.items()}
    known = tuple(Concept(*item) for item in words.items())
    blocks = init_blocks(host.image_places((16, 16)), list(words), generator, zero=False)
    latent = host.encode_image(example.picture[None] * 2 - 1)[0]
    reference = Reference(latent, dict(example.truth))
    return VisualCondition(ConceptSet(known, vectors, host.identity()), blocks, (reference,))


@torch.no_grad()
def guided(host: DiffusersHost, condition: VisualCondition, noise: Tensor) -> Tensor:
    """The sample of a single step from noise: x_0 under guidance, in the autoencoder's own scale."""
    prompts = [ConceptPrompt(()), ConceptPrompt.parse(TEXT)]
    encoded = host.encode_prompts(prompts, condition.concepts.vectors)
    t = torch.full((2,), 999.0)
    with looking(host, condition.use(0.7), encoded, 1):
        eps = host.predict(noise.expand(2, -1, -1, -1), t, encoded)
    alpha_bar = host.schedule.alphas_cumprod[-1]  # type: ignore[attr-defined]
    sigma = ((1 - alpha_bar) / alpha_bar).sqrt()
    x_0 = noise * (1 + sigma**2).sqrt() - sigma * (eps[:1] + 3.0 * (eps[1:] - eps[:1]))
    return x_0 / host.vae.config.scaling_factor


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """The inputs as a file, and what the diffusers host makes of them."""
    torch.set_num_threads(1)
    host, scene = DiffusersHost.load(model_path()), concept_scene(1, "B")
    folder, family = tmp_path_factory.mktemp("case"), host.identity().family
    em = em_settings(family)
    em = replace(em, mode="fixed", steps=1, seed=3, masks=replace(em.masks, init_timesteps=4))
    visual = replace(
        visual_settings(family), steps=3, token_learning_rate=1e-3, reference_gradient=True,
        end_of_text_weight=5e-4, key_masks="otsu",
    )  # fmt: skip
    example = example_of(scene)
    learned = learn_visual(host, [replace(example, truth={})], em, visual)
    found = {
        name: torch.tensor([value for _, value in points])
        for name, points in learned.concepts.curves.items()
        if "loss/" in name
    } | {f"blocks/{name}": x for name, x in learned.blocks.items()}
    condition, noise = random_condition(host), torch.randn(1, 4, 16, 16)
    condition.save(folder / "condition.safetensors")
    found["ours"] = guided(host, condition, noise)
    vico = replace(condition.settings, gated=False, own_prompts=True)
    found["vico"] = guided(host, replace(condition, settings=vico), noise)
    plain = {
        "em": to_json(em), "visual": to_json(visual), "prompt": scene.prompt, "text": TEXT,
        "condition": str(folder / "condition.safetensors"),
    }  # fmt: skip
    file = folder / "case.safetensors"
    tensors = {"picture": example.picture.contiguous(), "noise": noise}
    save_file(tensors, file, metadata={"plain": json.dumps(plain)})
    return file, found


def test_same_condition(
    comfyui: Path, case: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    """Both compute in float32, by other kernels. A sample from pure noise is sigma = 14 times as far off
    as its prediction; AdamW divides by the gradient's own size, so that after the first step blocks
    differ where their gradient is next to nothing."""
    file, expected = case
    out = tmp_path / "out.safetensors"
    assert "all is fine" in run_script(comfyui, "visual.py", file, model_path(), out)
    found = load_file(out)
    assert set(found) == set(expected)
    for name in ("ours", "vico"):
        torch.testing.assert_close(found[name], expected[name], atol=5e-3, rtol=1e-3)
    for name in (n for n in expected if "visual_loss/" in n):
        torch.testing.assert_close(found[name][0], expected[name][0], atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(found[name], expected[name], atol=2e-3, rtol=2e-3)
    for name in (n for n in expected if n.startswith("blocks/")):
        torch.testing.assert_close(found[name], expected[name], atol=2e-3, rtol=2e-3)
