"""The shipped demo model: true CLIP ids, size, autoencoder, text conditioning, localisation."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTokenizer

from em_core.demo import known_words, model_path, vocabulary
from em_core.demo.training import measure, sheet

# Ids of whole words in the full CLIP vocabulary (49,408 pieces).
TRUE_IDS = {
    "a": 320,
    "photo": 1125,
    "of": 539,
    "and": 537,
    "on": 525,
    "thing": 946,
    "star": 1565,
    "circle": 7117,
    "triangle": 14615,
    "diamond": 6235,
    "red": 736,
    "purple": 5496,
    "dotted": 47950,
    "checked": 10387,
    "plain": 10709,
    "grass": 5922,
    "brick": 9518,
    "stone": 2441,
}
UP_LAYERS = [
    f"up_blocks.{block}.attentions.{index}.transformer_blocks.0.attn2"
    for block in (0, 1)
    for index in (0, 1)
]


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    torch.set_num_threads(1)
    return sheet.load(model_path())


@pytest.fixture(scope="module")
def unseen() -> list:
    return measure.unseen_scenes(24, seed=5)


def test_folder_is_small_enough_to_ship():
    sizes = [file.stat().st_size for file in model_path().rglob("*") if file.is_file()]
    assert sum(sizes) <= 25_000_000
    assert max(sizes) <= 9_000_000


def test_known_words_are_the_vocabulary():
    assert known_words() == vocabulary.WORDS == tuple(sorted(set(vocabulary.WORDS)))


def test_tokenizer_gives_the_ids_of_the_full_vocabulary():
    tokenizer = CLIPTokenizer.from_pretrained(model_path() / "tokenizer")
    for word, number in TRUE_IDS.items():
        assert tokenizer(word).input_ids == [49406, number, 49407]
    for word in known_words():
        assert len(tokenizer(word).input_ids) == 3
    text = "A photo of a Red dotted star, and a circle on grass"
    words = [320, 1125, 539, 320, 736, 47950, 1565, 267, 537, 320, 7117, 525, 5922]
    padded = tokenizer(text, padding="max_length", max_length=77).input_ids
    assert padded == [49406, *words] + [49407] * (76 - len(words))


def test_extraction_follows_byte_pair_encoding(tmp_path):
    """Oracle: a vocabulary worked out by hand, where the order of merges decides the pieces."""
    merges = [("a", "b"), ("b", "c</w>"), ("ab", "c</w>"), ("x", "y")]
    letters = ["a", "b", "c</w>", "x", "y"]
    pieces = [*letters, *(str(n) for n in range(512 - len(letters)))]
    pieces += [left + right for left, right in merges]
    pieces += [vocabulary.START_PIECE, vocabulary.END_PIECE]
    table = {piece: number for number, piece in enumerate(pieces)}
    (tmp_path / "vocab.json").write_text(json.dumps(table), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (tmp_path / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    found, used = vocabulary.extract(tmp_path, ("abc",))
    assert used == [("a", "b"), ("ab", "c</w>")]
    assert found["abc</w>"] == 514 and "xy" not in found and "bc</w>" not in found
    with pytest.raises(ValueError, match="'xyc' to be one piece"):
        vocabulary.extract(tmp_path, ("xyc",))


def test_words_never_used_have_zero_rows(pipeline):
    table = pipeline.text_encoder.get_input_embeddings().weight
    used = set(torch.nonzero(table.abs().sum(dim=1)).flatten().tolist())
    ids = vocabulary.read_ids(model_path() / "tokenizer")
    assert used == {ids[word + "</w>"] for word in known_words()} | {49406, 49407}


def test_topology_is_one_that_both_hosts_can_express(pipeline):
    unet, vae = pipeline.unet.config, pipeline.vae.config
    heads = zip(unet.block_out_channels, unet.attention_head_dim, strict=True)
    assert [channels // count for channels, count in heads] == [32, 32]
    assert all(
        channels % 32 == 0 for channels in (*unet.block_out_channels, *vae.block_out_channels)
    )
    assert (unet.norm_num_groups, vae.norm_num_groups) == (32, 32)
    assert not unet.use_linear_projection
    assert pipeline.scheduler.config.prediction_type == "epsilon"


def test_scaling_factor_makes_latents_of_deviation_one(pipeline, unseen):
    assert measure.encode_scenes(pipeline, unseen).std() == pytest.approx(1.0, abs=0.1)


def test_autoencoder_keeps_unseen_scenes(pipeline, unseen):
    everything, on_objects = measure.reconstruction(pipeline, unseen[:16])
    assert everything > 27.0
    assert on_objects > 23.5


def test_the_right_caption_predicts_the_noise_better(pipeline, unseen):
    right, shuffled = measure.noise_errors(pipeline, unseen)
    assert right < 0.8 * shuffled


@pytest.mark.parametrize(("kind", "least"), [("full", 0.66), ("bare", 0.62), ("thing", 0.55)])
def test_every_up_layer_localises_nouns(pipeline, unseen, kind, least):
    found = measure.attention_iou(pipeline, unseen[:12], kind)
    assert min(found[layer] for layer in UP_LAYERS) > least


def test_attention_of_a_noun_that_is_elsewhere_does_not_fit(pipeline, unseen):
    """The oracle of the oracle: maps of one scene do not fit the masks of another."""
    scene, other = unseen[0], unseen[1]
    caption = measure.full_caption(measure.looks_of(scene), scene.background)
    map_ = measure.noun_maps(pipeline, scene, caption)[UP_LAYERS[-1]][0]
    assert measure.mask_iou(map_, scene.masks[caption.meant[0]]) > 2 * measure.mask_iou(
        map_, other.masks.any(axis=0)
    )


def test_samples_differ_by_caption_and_repeat_by_seed(pipeline):
    captions = ("a photo of a red plain star on snow", "a photo of a blue plain star on snow")
    first, again = (sheet.draw(pipeline, captions[:1], seed=4, steps=6) for _ in range(2))
    assert np.array_equal(first, again)
    blue = sheet.draw(pipeline, captions[1:], seed=4, steps=6)
    assert first.astype(int)[..., 0].mean() > blue.astype(int)[..., 0].mean()
