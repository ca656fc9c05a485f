"""The diffusers host with SDXL, and prompts beyond 77 pieces, with diffusers' own code as the oracle."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import EDMEulerScheduler
from small_models import PROJECTED, TIME, WIDTHS, sdxl, sdxl_unet

from em_core.errors import UserError
from em_core.examples import Example
from em_core.hosts.diffusers import DiffusersHost
from em_core.hosts.loading import number_type, require_plain_model
from em_core.hosts.text import Row, in_chunks, require_same_places
from em_core.method.problem import prepare
from em_core.method.start import initialise
from em_core.model.protocol import Conditioning, DiffusionModel
from em_core.presets import em_settings
from em_core.prompts import ConceptPrompt
from em_core.runs.concept_set import ConceptSet, conclude
from em_core.runs.runner import run
from em_core.settings import EMSettings, JointSettings, MaskSettings

PLAIN = ConceptPrompt.parse("a photo of star and circle on grass")
EMPTY = ConceptPrompt(())
# Of diffusers' Euler scheduler, which SDXL has, with newer versions of numpy.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sdxl")
    sdxl().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def xl(folder: Path) -> DiffusersHost:
    return DiffusersHost.load(folder)


@pytest.fixture(params=["demo", "sdxl"])
def either(request: pytest.FixtureRequest, host: DiffusersHost) -> DiffusersHost:
    """Hosts with one text encoder and with two; the demo model's words do not matter here."""
    if request.param == "sdxl":
        return request.getfixturevalue("xl")
    return DiffusersHost(host.pipeline)


@pytest.fixture
def brief() -> EMSettings:
    masks = MaskSettings(init_timesteps=2, crf=None)
    return replace(em_settings("sdxl"), steps=2, e_step_every=2, batch=2, vectors=2, masks=masks)


@pytest.fixture
def example() -> Example:
    picture = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    return Example(picture, ConceptPrompt.parse("a photo of <rex:red dog> and <doll> on grass"))


def vectors_for(host: DiffusersHost, name: str, count: int) -> dict[str, dict[str, torch.Tensor]]:
    return {name: host.initial_vectors("", count, torch.Generator().manual_seed(1))}


def test_what_the_host_says_of_sdxl(xl: DiffusersHost) -> None:
    identity = xl.identity()
    assert isinstance(xl, DiffusionModel)
    assert identity.family == "sdxl" and identity.encoders == WIDTHS
    assert (xl.image_side, xl.image_multiple) == (64, 4)
    layers = xl.attention_layers((32, 32))
    assert {layer.size for layer in layers} == {(16, 16)} and len(layers) == 2 + 2 + 4


def test_prompts_are_encoded_as_the_pipeline_does(xl: DiffusersHost) -> None:
    expected, _, pooled, _ = xl.pipeline.encode_prompt(PLAIN.plain(), device="cpu")
    found = xl.encode_prompts([PLAIN], {})
    assert torch.equal(found.inputs["y"], expected) and torch.equal(found.inputs["pooled"], pooled)
    assert found.streams["text"].length == 77 and found.streams["text"].end == (9,)


def test_a_concept_with_a_words_vectors_is_that_word_for_both_encoders(xl: DiffusersHost) -> None:
    prompt = ConceptPrompt.parse("a photo of <x:star> and circle on grass")
    vectors = {"x": xl.initial_vectors("star", 1, torch.Generator())}
    assert {name: v.shape[1] for name, v in vectors["x"].items()} == WIDTHS
    found = xl.encode_prompts([prompt, PLAIN], vectors)
    assert all(torch.equal(x[0], x[1]) for x in found.inputs.values())
    assert found.streams["text"].columns == ({"x": (4,)}, {})


def by_hand(unet, Z, t, y, pooled, size: tuple[int, int]) -> torch.Tensor:
    ids = torch.tensor([[*size, 0, 0, *size]] * len(Z), dtype=torch.float32)
    told = {"text_embeds": pooled, "time_ids": ids}
    return unet(Z, t, encoder_hidden_states=y, added_cond_kwargs=told).sample


@torch.no_grad()
def test_predictions_are_the_unets(xl: DiffusersHost) -> None:
    """Not square: the height comes first, and pixels count, not latents."""
    g = torch.Generator().manual_seed(0)
    Z, t = torch.randn(2, 4, 32, 24, generator=g), torch.tensor([100.0, 700.0])
    y, _, pooled, _ = xl.pipeline.encode_prompt([PLAIN.plain(), ""], device="cpu")
    expected = by_hand(xl.unet, Z, t, y, pooled, (64, 48))
    found = xl.predict(Z, t, Conditioning({"y": y, "pooled": pooled}, {}))
    assert torch.equal(found, expected)
    assert not torch.equal(found, by_hand(xl.unet, Z, t, y, pooled, (48, 64)))
    ours = xl.predict(Z, t, xl.encode_prompts([PLAIN, EMPTY], {}))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("zeros", [True, False])
def test_generation_is_the_pipelines(folder: Path, zeros: bool) -> None:
    """Whether pictures are drawn away from zeros or from the empty prompt."""
    xl = DiffusersHost.load(folder)
    xl.pipeline.register_to_config(force_zeros_for_empty_prompt=zeros)
    ours = xl.generate(PLAIN, None, [4, 5], steps=3, guidance=3.0)
    for seed, picture in zip((4, 5), ours, strict=True):
        (theirs,) = xl.pipeline(
            PLAIN.plain(), num_inference_steps=3, guidance_scale=3.0, output_type="pt",
            generator=torch.Generator().manual_seed(seed),
        ).images  # fmt: skip
        torch.testing.assert_close(picture, theirs, atol=1e-5, rtol=0)


def chunk_by_hand(host: DiffusersHost, number: int, ids: list[int]) -> torch.Tensor:
    """One chunk's encoding by the pipeline's own modules: begin, pieces, end, filling."""
    encoder = host.encoders[number]
    tokenizer = (host.pipeline.tokenizer, getattr(host.pipeline, "tokenizer_2", None))[number]
    fill = [tokenizer.pad_token_id] * (75 - len(ids))
    row = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id, *fill]
    several = len(host.encoders) > 1
    out = encoder.model(torch.tensor([row]), output_hidden_states=several)
    return out.hidden_states[-2] if several else out.last_hidden_state


@torch.no_grad()
def test_long_prompts_are_chunks_of_75_pieces(either: DiffusersHost) -> None:
    words = "red star and blue circle on green grass " * 20
    ids = either.pipeline.tokenizer(words, add_special_tokens=False, verbose=False).input_ids
    assert len(ids) == 160
    found = either.encode_prompts([ConceptPrompt((words,)), PLAIN], {})
    text = found.streams["text"]
    assert text.length == 3 * 77 and text.end == (76, 9)
    for row, chunks in enumerate(
        ([ids[:75], ids[75:150], ids[150:]], [either.encoders[0].pieces(PLAIN.plain()), [], []])
    ):
        expected = torch.cat(
            [
                torch.cat([chunk_by_hand(either, n, chunk) for chunk in chunks], dim=1)
                for n in range(len(either.encoders))
            ],
            dim=-1,
        )
        torch.testing.assert_close(found.inputs["y"][row], expected[0], atol=1e-5, rtol=1e-5)
    if "pooled" in found.inputs:
        first = ConceptPrompt((either.pipeline.tokenizer.decode(ids[:75]),))
        for row, prompt in enumerate((first, PLAIN)):
            pooled = either.encode_prompts([prompt], {}).inputs["pooled"]
            torch.testing.assert_close(found.inputs["pooled"][row], pooled[0])


@torch.no_grad()
@pytest.mark.parametrize(
    ("text", "count", "columns", "end"),
    [
        ("<x>" + " star" * 82, 3, [1, 2, 3], 76),
        ("star " * 72 + "<x> on grass", 3, [73, 74, 75], 76),
        ("star " * 72 + "<x> on grass", 7, list(range(78, 85)), 73),
        ("star " * 72 + "<x> on grass", 9, [73, 74, 75, *range(78, 84)], 76),
        ("<x>" + " star" * 3, 80, [*range(1, 76), *range(78, 83)], 76),
    ],
)
def test_where_concepts_stand_in_long_prompts(
    either: DiffusersHost, text: str, count: int, columns: list[int], end: int
) -> None:
    """Up to 7 vectors stay together; more are cut, as long stretches of text are."""
    prompt, vectors = ConceptPrompt.parse(text), vectors_for(either, "x", count)
    found = either.encode_prompts([prompt], vectors)
    stream = found.streams["text"]
    assert stream.columns == ({"x": tuple(columns)},) and stream.end == (end,)
    assert stream.length == 154
    moved = {"x": {name: v + 1 for name, v in vectors["x"].items()}}
    there = either.encode_prompts([prompt], moved).inputs["y"]
    changed = (there != found.inputs["y"]).any(dim=-1)[0]
    assert changed[columns].all() and not changed[: columns[0]].any()


def test_chunks() -> None:
    """Brute force: nothing is lost, no chunk is too long, short groups stay whole."""
    g = torch.Generator().manual_seed(0)
    for _ in range(200):
        sizes = torch.randint(0, 30, (6,), generator=g).tolist()
        groups = [[(100 * n + i, "") for i in range(size)] for n, size in enumerate(sizes)]
        chunks = in_chunks(groups, 20)
        assert [p for chunk in chunks for p in chunk] == [p for group in groups for p in group]
        assert all(len(chunk) <= 20 for chunk in chunks) and all(chunks[1:])
        for group in (group for group in groups if 0 < len(group) < 8):
            assert sum(group[0] in chunk or group[-1] in chunk for chunk in chunks) == 1


def test_drawing_from_long_prompts(either: DiffusersHost) -> None:
    """The pipeline takes what we encode, beside an empty prompt of the same length."""
    long = ConceptPrompt(("red star and blue circle on green grass " * 15,))
    given = []
    real = either.unet.forward

    def see(*args, **kwargs):
        given.append(kwargs["encoder_hidden_states"].shape)
        return real(*args, **kwargs)

    either.unet.forward = see
    try:
        picture = either.generate(long, None, [1], steps=1)
    finally:
        del either.unet.forward
    assert given[0][:2] == (2, 154) and torch.isfinite(picture).all()


def learned(
    host: DiffusersHost, example: Example, em: EMSettings, joint: JointSettings
) -> tuple[ConceptSet, dict]:
    problem = prepare(host, [example], em, joint)
    state = initialise(problem)
    start = {(c, e): v.detach().clone() for c, of in state.vectors.items() for e, v in of.items()}
    return conclude(problem, run(problem, state)), start


@pytest.mark.parametrize("kind", ["lora", "cross_attention", "full"])
def test_learning_moves_both_encoders_and_acts_after_saving(
    xl: DiffusersHost, example: Example, brief: EMSettings, tmp_path: Path, kind: str
) -> None:
    """Every part that takes part in predictions is learned; a saved file acts as what was learned."""
    joint = JointSettings(kind=kind, steps=2, learning_rate=1e-3)
    concepts, start = learned(xl, example, brief, joint)
    assert {encoder for _, encoder in start} == set(WIDTHS)
    for (name, encoder), v in start.items():
        assert not torch.equal(concepts.vectors[name][encoder], v), f"{name} {encoder}"
    moved = [n for n, w in concepts.weights.items() if w.any() and not n.endswith(".lora_down")]
    parts = ("unet",) if kind == "cross_attention" else ("unet", "text_encoder", "text_encoder_2")
    assert {name.partition(".")[0] for name in moved} == set(parts)
    assert not any("token_embedding" in n or "text_projection" in n for n in concepts.weights)
    concepts.save(tmp_path / "c.safetensors")
    loaded = ConceptSet.load(tmp_path / "c.safetensors")
    loaded.require_fit(xl.identity())
    Z, t = torch.randn(1, 4, 32, 32), torch.tensor([300.0])

    @torch.no_grad()
    def noise(of: ConceptSet) -> torch.Tensor:
        with xl.applied(of.weights, of.lora_scale):
            return xl.predict(Z, t, xl.encode_prompts([example.prompt], of.vectors))

    assert torch.equal(noise(loaded), noise(concepts))
    assert not torch.equal(noise(loaded), noise(replace(loaded, weights={})))


def test_recomputing_changes_nothing(
    folder: Path, xl: DiffusersHost, example: Example, brief: EMSettings
) -> None:
    """The same losses and vectors, and fewer bytes kept for the backward pass."""
    again = DiffusersHost.load(folder, recompute=True)
    found = [learned(one, example, brief, JointSettings())[0] for one in (xl, again)]
    for name in found[0].curves:
        values = [torch.tensor([v for _, v in of.curves[name]]) for of in found]
        torch.testing.assert_close(*values)
    assert kept(again) < 0.3 * kept(xl)


def kept(host: DiffusersHost) -> int:
    """Bytes that a prediction keeps for the backward pass, weights apart."""
    weights = {p.data_ptr() for p in host.unet.parameters()}
    seen: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    vectors = vectors_for(host, "x", 1)
    conditioning = host.encode_prompts([ConceptPrompt.parse("<x>")], vectors)
    inputs = {name: x.detach().requires_grad_(True) for name, x in conditioning.inputs.items()}
    Z, t = torch.zeros(1, 4, 32, 32), torch.tensor([300.0])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        host.predict(Z, t, replace(conditioning, inputs=inputs)).sum().backward()
    return sum(seen.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_close_and_learns(
    folder: Path, xl: DiffusersHost, example: Example, brief: EMSettings, dtype: str
) -> None:
    """Rounding alone: 2^-8 relative for bfloat16, over some tens of layers."""
    half = DiffusersHost.load(folder, dtype=dtype)
    assert half.unet.dtype == getattr(torch, dtype)
    assert half.loss_scale == (2.0**16 if dtype == "float16" else 1.0)
    Z, t = torch.randn(1, 4, 32, 32), torch.tensor([300.0])
    with torch.no_grad():
        ours, exact = (one.predict(Z, t, one.encode_prompts([PLAIN], {})) for one in (half, xl))
    assert ours.dtype == torch.float32
    assert torch.dist(ours, exact) < 0.05 * exact.norm()
    concepts, start = learned(half, example, brief, JointSettings(kind="lora", steps=1))
    for (name, encoder), v in start.items():
        assert v.dtype == torch.float32
        assert not torch.equal(concepts.vectors[name][encoder], v)
    assert half.vae.dtype == getattr(torch, dtype)
    assert torch.isfinite(half.generate("<rex> on grass", concepts, [1], steps=1)).all()


def test_the_key_knows_the_number_type(folder: Path, xl: DiffusersHost) -> None:
    half = DiffusersHost.load(folder, dtype="bfloat16")
    assert half.fingerprint() != xl.fingerprint()
    assert DiffusersHost.load(folder).fingerprint() == xl.fingerprint()


def test_number_types() -> None:
    cpu = torch.device("cpu")
    assert number_type("auto", cpu) == torch.float32
    assert number_type("bfloat16", cpu) == torch.bfloat16
    with pytest.raises(UserError, match=r"No number type 'half'\. Expected one of auto, float32"):
        number_type("half", cpu)


@pytest.mark.parametrize("bf16", [True, False])
def test_auto_on_a_card(monkeypatch: pytest.MonkeyPatch, bf16: bool) -> None:
    class Here:
        def __init__(self, device: object) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *args: object) -> None: ...

    monkeypatch.setattr(torch.cuda, "device", Here)
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation or bf16,
    )
    expected = torch.bfloat16 if bf16 else torch.float32
    assert number_type("auto", torch.device("cuda")) == expected


def test_vectors_must_be_equally_many(xl: DiffusersHost) -> None:
    vectors = {"x": {"clip_l": torch.zeros(2, 32), "clip_g": torch.zeros(1, 64)}}
    with pytest.raises(UserError, match="equally many vectors"):
        xl.encode_prompts([ConceptPrompt.parse("<x>")], vectors)


def test_text_encoders_that_disagree_are_refused() -> None:
    rows = [Row((1, 2, 3), {"x": (1,)}, 2), Row((1, 2, 3), {"x": (0,)}, 2)]
    require_same_places(PLAIN, rows[:1] * 2)
    with pytest.raises(UserError, match="into different pieces"):
        require_same_places(PLAIN, rows)


def refused() -> Iterator[tuple[str, dict]]:
    yield "inpainting", {"unet": sdxl_unet(in_channels=9)}
    yield "refiner", {
        "text_encoder": None, "tokenizer": None,
        "unet": sdxl_unet(cross_attention_dim=64,
                          projection_class_embeddings_input_dim=PROJECTED + 5 * TIME),
    }  # fmt: skip
    yield "other", {"unet": sdxl_unet(addition_embed_type=None)}


@pytest.mark.parametrize("case", list(refused()), ids=lambda case: case[0])
def test_other_kinds_of_sdxl_are_refused(case: tuple[str, dict], tmp_path: Path) -> None:
    """In words, from a folder as users have it; the refiner says that it is an image-to-image pipeline."""
    name, changes = case
    sdxl(**changes).save_pretrained(tmp_path)
    if name == "refiner":
        index = tmp_path / "model_index.json"
        config = json.loads(index.read_text())
        index.write_text(json.dumps(config | {"_class_name": "StableDiffusionXLImg2ImgPipeline"}))
    with pytest.raises(UserError, match="not a plain Stable Diffusion"):
        DiffusersHost.load(tmp_path)


def test_a_unet_with_one_encoder_that_wants_more_is_refused(host: DiffusersHost) -> None:
    config = SimpleNamespace(**{**host.unet.config, "class_embed_type": "projection"})
    pipeline = SimpleNamespace(
        unet=SimpleNamespace(config=config), text_encoder=host.pipeline.text_encoder
    )
    with pytest.raises(UserError, match="its UNet wants"):
        require_plain_model(pipeline)


def test_a_schedule_of_another_kind_is_refused(xl: DiffusersHost) -> None:
    parts = {**xl.pipeline.components, "scheduler": EDMEulerScheduler()}
    with pytest.raises(UserError, match=r"schedule is not supported.*by EDMEulerScheduler"):
        require_plain_model(SimpleNamespace(**parts))
