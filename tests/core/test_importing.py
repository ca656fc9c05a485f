"""Embeddings and LoRAs of other programs become concepts, or are refused in words."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import sdxl
from torch import Tensor, nn

from em_core import ConceptSet, UserError
from em_core.__main__ import main
from em_core.demo import model_path
from em_core.errors import Notice
from em_core.exchange.embeddings import read_embedding
from em_core.exchange.importing import concept_of_embedding
from em_core.exchange.saving import save_exports
from em_core.hosts.diffusers import DiffusersHost
from em_core.hosts.lora_files import concept_of_lora, own_name
from em_core.model.adapters import init_lora
from em_core.prompts import Concept, ConceptPrompt

L, H, G = (torch.arange(2.0 * d).reshape(2, d) / 999 for d in (768, 1024, 1280))


def host_of(family: str) -> DiffusersHost:
    return DiffusersHost.load(model_path()) if family == "demo" else DiffusersHost(sdxl())


@pytest.mark.parametrize(
    ("tensors", "family", "expected"),
    [
        ({"emb_params": L}, "sd1", {"clip_l": L}),
        ({"<rex>": L[0]}, "sd1", {"clip_l": L[:1]}),
        ({"*": H}, "sd2", {"clip_h": H}),
        ({"clip_g": G, "clip_l": L}, "sdxl", {"clip_l": L, "clip_g": G}),
        ({"emb_params": L.bfloat16()}, "sd1", {"clip_l": L.bfloat16().float()}),
        ({"emb_params": L.to(torch.float8_e4m3fn)}, "sd1", {"clip_l": L.to(torch.float8_e4m3fn).float()}),
        ({"emb_params": L[:, :64].contiguous()}, "sd-64", {"clip_l": L[:, :64]}),
    ],
    ids=["a1111", "diffusers", "sd2", "sdxl", "bf16", "fp8", "demo"],
)  # fmt: skip
def test_embeddings_of_any_program(
    tmp_path: Path, tensors: dict[str, Tensor], family: str, expected: dict[str, Tensor]
) -> None:
    save_file(tensors, tmp_path / "my dog!.safetensors")
    found = concept_of_embedding(tmp_path / "my dog!.safetensors", words="dog")
    assert (found.names, found.identity.family) == (("my_dog",), family)
    assert list(found.vectors["my_dog"]) == list(expected)
    assert all(torch.equal(found.vectors["my_dog"][e], v) for e, v in expected.items())
    found.save(tmp_path / "concept.safetensors")
    again = ConceptSet.load(tmp_path / "concept.safetensors")
    assert again.concepts == (Concept("my_dog", "dog"),)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"emb_params": torch.ones(2, 4096)}, "got emb_params .2, 4096."),
        ({"clip_g": G}, "clip_l of width 768 and clip_g"),
        ({"emb_params": G}, "got emb_params .2, 1280."),
        ({"emb_params": torch.ones(76, 768)}, "Expected up to 75 vectors"),
        ({"clip_l": L, "clip_g": G[:1]}, "different numbers of vectors"),
        ({"emb_params": torch.ones(2, 768, dtype=torch.int32)}, "numbers of type torch.int32"),
        ({"emb_params": L / 0}, "not finite"),
        ({"emb_params": torch.ones(())}, "is not an embedding"),
        ({}, "got no tensors"),
        ({n: L.clone() for n in "abcd"}, "and 1 more"),
    ],
)
def test_what_is_no_embedding(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=message):
        read_embedding(tmp_path / "x.safetensors")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    save_file({"emb_params": L}, tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[:-4])
    with pytest.raises(UserError, match="not a complete safetensors file"):
        read_embedding(tmp_path / "cut.safetensors")
    with pytest.raises(UserError, match="No file"):
        read_embedding(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="gives no name for a concept"):
        (tmp_path / "x.safetensors").rename(tmp_path / "123.safetensors")
        concept_of_embedding(tmp_path / "123.safetensors")


def test_an_embedding_of_another_family(tmp_path: Path) -> None:
    save_file({"emb_params": H}, tmp_path / "x.safetensors")
    with pytest.raises(
        UserError, match=r"Expected vectors of {'clip_l': 64}, got {'clip_h': 1024}"
    ):
        concept_of_embedding(tmp_path / "x.safetensors", identity=host_of("demo").identity())


@pytest.mark.parametrize("kind", ["sdxl", "disguised"])
def test_pickles_are_refused_with_the_command_that_converts_them(tmp_path: Path, kind: str) -> None:
    """The command is run as it stands."""
    file = tmp_path / ("dog.safetensors" if kind == "disguised" else "my dog.pt")
    held: dict = {"clip_l": nn.Parameter(L), "clip_g": G}
    if kind != "sdxl":
        held = {
            "string_to_token": {"*": 265},
            "string_to_param": {"*": nn.Parameter(L)},
            "name": "x",
        }
    torch.save(held, file)
    with pytest.raises(UserError, match="pickled file") as error:
        read_embedding(file)
    command = shlex.split(str(error.value).partition("convert it once: ")[2])
    target = tmp_path / ("dog_converted" if kind == "disguised" else "my dog")
    assert command[0] == "python" and command[-1] == f"{target}.safetensors"
    subprocess.run([sys.executable, *command[1:]], check=True)
    found = read_embedding(Path(command[-1]))
    assert all(
        torch.equal(found[e], v) for e, v in {"clip_l": L, "clip_g": G}.items() if e in found
    )
    assert len(found) == 1 + (kind == "sdxl")


def some_weights(host: DiffusersHost, kind: str) -> dict[str, Tensor]:
    """A LoRA on the attention, or changes of rank 2 of all that LoRA files name."""
    g = torch.Generator().manual_seed(2)
    if kind == "lora":
        fresh = init_lora(host.adaptable_layers(), 2, g)
        return {
            n: x.detach() if n.endswith("down") else torch.randn(x.shape, generator=g) * 0.2
            for n, x in fresh.items()
        }
    return {
        f"{n}.diff": torch.randn(p.shape, generator=g) * 0.03
        for n, p in host.weights("full").items()
        if p.ndim > 1
    }


@torch.no_grad()
def predicted(host: DiffusersHost, vectors: dict, text: str) -> Tensor:
    g = torch.Generator().manual_seed(4)
    Z, t = torch.randn(1, 4, 16, 16, generator=g), torch.tensor([300.0])
    return host.predict(Z, t, host.encode_prompts([ConceptPrompt.parse(text)], vectors))


@pytest.mark.parametrize("family", ["demo", "sdxl"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_lora_acts_as_when_diffusers_loads_it(tmp_path: Path, family: str, kind: str) -> None:
    """<it> is its trigger words, and the weights are those that diffusers puts into the model."""
    host = host_of(family)
    made = concepts_with(host, some_weights(host, kind))
    save_exports(made, "x", tmp_path, tmp_path, rank=8)
    file = tmp_path / "x_lora.safetensors"
    with pytest.warns(Notice, match="without the tokens"):
        found = concept_of_lora(host, file, "it", "red star")
    with host.applied(found.weights, found.lora_scale):
        ours = predicted(host, dict(found.vectors), "a photo of <it>")
    theirs = host_of(family)
    theirs.pipeline.load_lora_weights(str(tmp_path), weight_name=file.name)
    expected = predicted(theirs, {}, "a photo of red star")
    assert (predicted(host, {}, "a photo of red star") - expected).abs().max() > 0.01
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["demo", "sdxl"])
def test_whole_differences_come_back_exactly(tmp_path: Path, family: str) -> None:
    """Of all weights, norms and biases too, through the file for ComfyUI, which has them as `.diff`."""
    host = host_of(family)
    g = torch.Generator().manual_seed(3)
    weights = {
        f"{n}.diff": torch.randn(p.shape, generator=g) * 0.03
        for n, p in host.weights("full").items()
    }
    assert any(name.endswith("bias.diff") for name in weights)
    save_exports(concepts_with(host, weights), "x", tmp_path, tmp_path, rank=2)
    with pytest.warns(Notice, match="without the tokens"):
        found = concept_of_lora(host, tmp_path / "x.safetensors", "it", "red star")
    assert found.weights.keys() == weights.keys()
    assert all(torch.equal(found.weights[n], x) for n, x in weights.items())


def test_differences_of_another_shape(tmp_path: Path) -> None:
    host, file = host_of("demo"), tmp_path / "x.safetensors"
    for change in ({".diff": torch.ones(3, 64)}, {".diff_b": torch.ones(3)}):
        save_file({LAYER + end: x for end, x in change.items()}, file)
        with pytest.raises(UserError, match=r"different family .* Expected .* at"):
            concept_of_lora(host, file, "it", "red")


def test_names_of_comfyui_in_diffusers() -> None:
    """As its own Train LoRA writes them: the checkpoint's, with dots."""
    block = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k"
    own = "mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    assert own_name(block, 2) == own_name(block, 2, sdxl=True) == f"lora_unet_{own}"
    norm = "diffusion_model.input_blocks.1.0.in_layers.0"
    assert own_name(norm, 2) == "lora_unet_down_blocks_0_resnets_0_norm1"
    text = "text_encoders.clip_{}.transformer.text_model.encoder.layers.1.mlp.fc1"
    layer = "text_model_encoder_layers_1_mlp_fc1"
    assert own_name(text.format("l"), 2) == f"lora_te_{layer}"
    assert own_name(text.format("l"), 2, sdxl=True) == f"lora_te1_{layer}"
    assert own_name(text.format("g"), 2, sdxl=True) == f"lora_te2_{layer}"


def concepts_with(
    host: DiffusersHost, weights: dict[str, Tensor], scale: float = 0.5
) -> ConceptSet:
    identity = host.identity()
    vectors = {"rex": {e: torch.randn(2, d) * 0.3 for e, d in identity.encoders.items()}}
    return ConceptSet((Concept("rex"),), vectors, identity, weights, scale)


def test_names_of_layers_in_checkpoints_and_in_diffusers() -> None:
    """SDXL's, of which kohya keeps the checkpoint's, by hand; and diffusers' three forms."""
    of_sdxl = {
        "input_blocks_1_0_in_layers_2": "down_blocks_0_resnets_0_conv1",
        "input_blocks_3_0_op": "down_blocks_0_downsamplers_0_conv",
        "input_blocks_4_1_transformer_blocks_0_attn1_to_q":
            "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
        "input_blocks_8_1_proj_in": "down_blocks_2_attentions_1_proj_in",
        "middle_block_0_emb_layers_1": "mid_block_resnets_0_time_emb_proj",
        "middle_block_1_transformer_blocks_9_ff_net_2": "mid_block_attentions_0_transformer_blocks_9_ff_net_2",
        "middle_block_2_out_layers_3": "mid_block_resnets_1_conv2",
        "output_blocks_2_1_proj_out": "up_blocks_0_attentions_2_proj_out",
        "output_blocks_2_2_conv": "up_blocks_0_upsamplers_0_conv",
        "output_blocks_8_0_skip_connection": "up_blocks_2_resnets_2_conv_shortcut",
    }  # fmt: skip
    for theirs, own in of_sdxl.items():
        assert own_name(f"lora_unet_{theirs}", 2) == f"lora_unet_{own}"
    for theirs in ("unet.a.attn1.to_out.0", "unet.a.attn1.processor.to_out", "unet.a.attn1.to_out"):
        assert own_name(theirs, 2) == "unet.a.attn1.to_out.0"
    assert own_name("unet.a.attn1.processor.to_q", 2) == "unet.a.attn1.to_q"


LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{LAYER}.lora_up.weight": None}, "is incomplete: .* has .lora_down alone"),
        ({f"{LAYER}.dora_scale": torch.ones(64)}, "cannot become a concept.*dora_scale"),
        (
            {f"{LAYER}.lora_down.weight": torch.ones(2, 99)},
            r"different family .* Expected \[\d+, 64\]",
        ),
        ({f"{LAYER}.lora_down.weight": torch.ones(2, 64) / 0}, "not finite"),
    ],
)
def test_loras_that_cannot_become_concepts(
    tmp_path: Path, change: dict[str, Tensor | None], message: str
) -> None:
    host, file = host_of("demo"), tmp_path / "x.safetensors"
    width = host.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.out_features
    whole = {
        f"{LAYER}.lora_up.weight": torch.ones(width, 2),
        f"{LAYER}.lora_down.weight": torch.ones(2, 64),
    }
    changed = {n: x for n, x in (whole | change).items() if x is not None}
    save_file(changed, file)
    with pytest.raises(UserError, match=message):
        concept_of_lora(host, file, "it", "red")
    other = {n.replace("mid", "other"): x.clone() for n, x in whole.items()}
    save_file(other, file)
    with pytest.raises(UserError, match="fits no layer"):
        concept_of_lora(host, file, "it", "red")
    save_file(whole | other, file)
    with pytest.warns(Notice, match="1 of 2 layers"):
        assert len(concept_of_lora(host, file, "it", "red").weights) == 2
    for name, words in (("", "red"), ("it", " ")):
        with pytest.raises(
            UserError, match="Expected a name for the concept and the LoRA's trigger"
        ):
            concept_of_lora(host, file, name, words)
    save_file({"some.weight": torch.ones(2)}, file)
    with pytest.raises(UserError, match="holds no LoRA"):
        concept_of_lora(host, file, "it", "red")


def test_export_and_import_give_the_concept_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the commands, through the one file with the tokens in it, and through the embedding."""
    host = host_of("demo")
    made = concepts_with(host, some_weights(host, "lora"))
    made.save(tmp_path / "made.safetensors")
    out = ["--concepts", str(tmp_path / "made.safetensors"), "--out", str(tmp_path / "out")]
    assert main(["export", *out, "--name", "dog"]) == 0
    assert "`sks ohwx` means rex" in capsys.readouterr().out
    assert main(["export", *out, "--name", "dog"]) == 0
    assert main(["export", *out, "--name", "dog", "--overwrite", "--triggers", "rex: bsf gsc"]) == 0
    names = {f"dog{n}{of}" for n in ("", "_00001", "_00002") for of in ("", "_lora", "_sd-64")}
    assert {file.stem for file in (tmp_path / "out").iterdir()} == names

    def back(file: str, words: str) -> ConceptSet:
        given = ["--file", str(tmp_path / "out" / file), "--name", "it", "--words", words]
        out = ["--out", str(tmp_path / "back.safetensors"), "--overwrite"]
        assert main(["import", *given, *out]) == 0
        return ConceptSet.load(tmp_path / "back.safetensors")

    found = back("dog.safetensors", "bsf gsc")
    torch.testing.assert_close(found.vectors["it"]["clip_l"], made.vectors["rex"]["clip_l"])
    assert found.weights.keys() == made.weights.keys()
    found.require_fit(host.identity())
    assert torch.equal(
        back("dog_sd-64.safetensors", "star").vectors["it"]["clip_l"], made.vectors["rex"]["clip_l"]
    )
    assert main(["import", "--file", str(tmp_path / "x.pt"), "--name", "a", "--out", "b"]) == 2
    assert "pickled" in capsys.readouterr().err
    file = load_file(tmp_path / "out" / "dog_lora.safetensors")
    assert all("token_embedding" not in name for name in file)
