"""Exported LoRAs and embeddings, read back by diffusers and peft as a user would."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from small_models import sdxl
from torch import Tensor
from transformers import CLIPTokenizer

from em_core import ConceptSet, UserError
from em_core.demo import model_path
from em_core.exchange.lora import token_entries
from em_core.exchange.low_rank import low_rank, takes_factors
from em_core.exchange.names import table_name
from em_core.exchange.saving import exports_of, save_exports
from em_core.files import DESCRIPTION
from em_core.hosts.diffusers import DiffusersHost
from em_core.model.adapters import init_lora
from em_core.prompts import Concept, ConceptPrompt

PROMPT = [ConceptPrompt.parse("a photo of <rex> on grass")]
FAMILIES = ("demo", "sdxl")


def host_of(family: str) -> DiffusersHost:
    return DiffusersHost.load(model_path()) if family == "demo" else DiffusersHost(sdxl())


def concepts_of(
    host: DiffusersHost, weights: Mapping[str, Tensor], scale: float = 1.0, count: int = 1
) -> ConceptSet:
    """A concept with random vectors, and the given weights."""
    g, identity = torch.Generator().manual_seed(1), host.identity()
    vectors = {e: torch.randn(count, d, generator=g) * 0.3 for e, d in identity.encoders.items()}
    return ConceptSet((Concept("rex", "star"),), {"rex": vectors}, identity, weights, scale)


def some_lora(host: DiffusersHost) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(2)
    fresh = init_lora(host.adaptable_layers(), 2, g)
    return {
        n: x.detach() if n.endswith("down") else torch.randn(x.shape, generator=g) * 0.2
        for n, x in fresh.items()
    }


def some_differences(host: DiffusersHost, kind: str, rank: int) -> dict[str, Tensor]:
    """Differences of this rank for matrices and kernels, and of any for what has no factors."""
    g = torch.Generator().manual_seed(3)
    found = {}
    for name, weight in host.weights(kind).items():  # type: ignore[arg-type]
        x = torch.randn(weight.shape, generator=g) * 0.02
        if takes_factors(f"{name}.diff", x):
            o, i = x.flatten(1).shape
            x = torch.randn(o, rank, generator=g) @ torch.randn(rank, i, generator=g)
            x = (x * 0.2 / i**0.5).reshape(weight.shape)
        elif kind == "full":
            x = torch.zeros_like(x)
        found[f"{name}.diff"] = x
    return found


@torch.no_grad()
def predicted(host: DiffusersHost, concepts: ConceptSet) -> Tensor:
    g = torch.Generator().manual_seed(4)
    Z, t = torch.randn(1, 4, 16, 16, generator=g), torch.tensor([300.0])
    return host.predict(Z, t, host.encode_prompts(PROMPT, concepts.vectors))


def load_into(host: DiffusersHost, file: Path) -> None:
    host.pipeline.load_lora_weights(str(file.parent), weight_name=file.name)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["lora", "cross_attention", "full"])
def test_diffusers_loads_the_second_file(tmp_path: Path, family: str, kind: str) -> None:
    """A LoRA to the last bit; changed weights of rank 3 by factors of rank 4."""
    host = host_of(family)
    weights = some_lora(host) if kind == "lora" else some_differences(host, kind, 3)
    concepts = concepts_of(host, weights, 0.5 if kind == "lora" else 1.0)
    saved = save_exports(concepts, "rex", tmp_path, tmp_path, host.vocabularies(), rank=4)
    assert set(saved.loras) == {"rex", "rex_lora"}
    plain = predicted(host, concepts)
    with host.applied(weights, concepts.lora_scale):
        ours = predicted(host, concepts)
    theirs = host_of(family)
    load_into(theirs, tmp_path / "rex_lora.safetensors")
    effect = (ours - plain).abs().max()
    assert effect > 0.01
    tolerance = 0.0 if kind == "lora" else 1e-3 * float(effect)
    torch.testing.assert_close(predicted(theirs, concepts), ours, atol=tolerance, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_refuses_the_first_file(tmp_path: Path, family: str) -> None:
    """With the tokens in it, it converts no name of the file, and complains of them."""
    host = host_of(family)
    concepts = concepts_of(host, some_lora(host))
    save_exports(concepts, "rex", tmp_path, tmp_path, host.vocabularies())
    before = predicted(host, concepts)
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        load_into(host, tmp_path / "rex.safetensors")
    assert torch.equal(predicted(host, concepts), before)


def dense_tokenizer(folder: Path) -> CLIPTokenizer:
    """The demo model's tokenizer with ids from 0 on without gaps, which diffusers counts on."""
    words = json.loads((model_path() / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    shutil.copytree(model_path() / "tokenizer", folder)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    return CLIPTokenizer.from_pretrained(folder)


def test_diffusers_reads_the_embedding_under_its_token(tmp_path: Path) -> None:
    host = host_of("demo")
    host.pipeline.tokenizer = dense_tokenizer(tmp_path / "words")
    concepts = concepts_of(host, {}, count=2)
    save_exports(concepts, "rex", tmp_path, tmp_path)
    pipeline = host.pipeline
    pipeline.load_textual_inversion(str(tmp_path / "rex_sd-64.safetensors"), token="<rex>")  # noqa: S106
    ids = pipeline.tokenizer.convert_tokens_to_ids(["<rex>", "<rex>_1"])
    rows = pipeline.text_encoder.get_input_embeddings().weight[ids]
    assert torch.equal(rows, concepts.vectors["rex"]["clip_l"])


def test_diffusers_reads_sdxl_embeddings_encoder_by_encoder(tmp_path: Path) -> None:
    host = host_of("sdxl")
    concepts = concepts_of(host, {})
    save_exports(concepts, "rex", tmp_path, tmp_path)
    state, pipeline = load_file(tmp_path / "rex_sdxl.safetensors"), host.pipeline
    pipeline.tokenizer = dense_tokenizer(tmp_path / "words")
    pipeline.tokenizer_2 = dense_tokenizer(tmp_path / "words_2")
    for key, end in (("clip_l", ""), ("clip_g", "_2")):
        encoder, words = (getattr(pipeline, n + end) for n in ("text_encoder", "tokenizer"))
        pipeline.load_textual_inversion(
            state[key],
            token="<rex>",  # noqa: S106
            text_encoder=encoder,
            tokenizer=words,
        )
        row = encoder.get_input_embeddings().weight[words.convert_tokens_to_ids("<rex>")]
        assert torch.equal(row, concepts.vectors["rex"][key][0])


def test_token_entries_replace_rows_of_the_table() -> None:
    """Up times down, added to the table, is the table with the learned vectors in the triggers' rows."""
    host = host_of("sdxl")
    concepts, words = concepts_of(host, {}, count=2), host.vocabularies()
    entries = token_entries(concepts.vectors, {"rex": ("sks", "ohwx")}, words)
    for encoder, vocabulary in words.items():
        name = table_name(encoder)
        up, down = entries[f"{name}.lora_up.weight"], entries[f"{name}.lora_down.weight"]
        expected = vocabulary.table.clone()
        expected[[48136, 47993]] = concepts.vectors["rex"][encoder]
        found = vocabulary.table + up.float() @ down * entries[f"{name}.alpha"] / len(down)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
        assert torch.equal(found[:47000], expected[:47000])


def test_on_a_fine_tune_the_token_is_off_by_the_trigger_s_own_change() -> None:
    host = host_of("demo")
    concepts, words = concepts_of(host, {}), host.vocabularies()
    (entry,) = token_entries(concepts.vectors, {"rex": ("sks",)}, words).keys() & {
        f"{table_name('clip_l')}.lora_down.weight"
    }
    down = token_entries(concepts.vectors, {"rex": ("sks",)}, words)[entry]
    shift = torch.full((64,), 0.1)
    tuned = words["clip_l"].table[48136] + shift
    torch.testing.assert_close(tuned + down[0], concepts.vectors["rex"]["clip_l"][0] + shift)


def test_low_rank_is_the_best_that_there_is() -> None:
    """Eckart and Young: the singular values that are left out are the error."""
    g = torch.Generator().manual_seed(0)
    U, _ = torch.linalg.qr(torch.randn(40, 30, generator=g))
    V, _ = torch.linalg.qr(torch.randn(90, 30, generator=g))
    S = 0.8 ** torch.arange(30.0)
    name = "unet.mid_block.attentions.0.proj.weight.diff"
    x = {name: ((U * S) @ V.T).reshape(40, 10, 3, 3)}
    found = low_rank(x, 8)
    best = float((S[8:].square().sum() / S.square().sum()).sqrt())
    assert found.error == pytest.approx(best, rel=1e-3)
    again = low_rank(x, 8)
    assert all(torch.equal(found.weights[n], again.weights[n]) for n in found.weights)
    assert low_rank(x, 64).error < 1e-5


def test_what_has_no_factors_counts_as_left_out() -> None:
    x = {
        "unet.mid_block.attentions.0.proj.weight.diff": torch.ones(4, 4) * 3,
        "unet.mid_block.attentions.0.proj.bias.diff": torch.ones(16) * 4,
    }
    found = low_rank(x, 2)
    assert found.left_out == ("unet.mid_block.attentions.0.proj.bias",)
    assert found.error == pytest.approx(0.8, rel=1e-5)
    assert low_rank({}, 4).error == 0 and not low_rank({}, 4).weights


def test_metadata_says_where_a_file_goes(tmp_path: Path) -> None:
    host = host_of("demo")
    concepts = concepts_of(host, some_lora(host))
    save_exports(concepts, "rex", tmp_path, tmp_path, host.vocabularies())

    def told(name: str) -> tuple[dict[str, str], dict[str, Any]]:
        with safe_open(tmp_path / f"{name}.safetensors", framework="pt") as file:
            metadata = dict(file.metadata())
        return metadata, json.loads(metadata[DESCRIPTION])

    metadata, described = told("rex")
    assert described["triggers"] == {"rex": ["sks"]} and described["family"] == "sd-64"
    assert metadata["modelspec.trigger_phrase"] == "sks"
    assert "`sks` means rex" in metadata["modelspec.usage_hint"]
    metadata, described = told("rex_lora")
    assert described["triggers"] == {} and "diffusers" in metadata["modelspec.usage_hint"]
    metadata, described = told("rex_sd-64")
    assert (described["family"], described["concept"]) == ("sd-64", "rex")


def test_only_what_was_learned_is_exported() -> None:
    host = host_of("demo")
    tokens, weights = concepts_of(host, {}), concepts_of(host, some_lora(host))
    words = host.vocabularies()
    assert set(exports_of(tokens, "x").loras) == set()
    assert set(exports_of(tokens, "x", words).loras) == {"x"}
    assert set(exports_of(weights, "x").loras) == {"x", "x_lora"}
    assert "Connect a CLIP" in exports_of(weights, "x").guide
    with pytest.raises(UserError, match="do not fit these text encoders"):
        exports_of(tokens, "x", host_of("sdxl").vocabularies())
