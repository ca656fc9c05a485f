"""The shipped demo model: true CLIP ids, size, autoencoder, text conditioning, localisation."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTokenizer

from em_core.demo import known_words, model_path, vocabulary
from em_core.demo.captions import bare_caption
from em_core.demo.training import measure, sheet
from em_core.demo.training.checkpoint import Checkpoint
from em_core.demo.training.loop import Round, optimise
from em_core.demo.training.schedule import AveragedWeights

# Ids of whole words in the full CLIP vocabulary (49,408 pieces).
TRUE_IDS = {
    "a": 320,
    "photo": 1125,
    "of": 539,
    "and": 537,
    "on": 525,
    "thing": 946,
    "toy": 5988,
    "object": 14115,
    "item": 8532,
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
    assert everything > 25.5
    assert on_objects > 22.0


def test_the_right_caption_predicts_the_noise_better(pipeline, unseen):
    right, shuffled = measure.noise_errors(pipeline, unseen)
    assert right < 0.8 * shuffled


@pytest.mark.parametrize(("kind", "least"), [("full", 0.5), ("bare", 0.36), ("thing", 0.25)])
def test_every_up_layer_localises_nouns(pipeline, unseen, kind, least):
    found = measure.attention_iou(pipeline, unseen[:12], kind)
    assert min(found[layer] for layer in UP_LAYERS) > least


def test_alike_phrases_may_mean_their_objects_in_either_order():
    """Oracle: maps that are the masks themselves, exchanged where the words allow it and where not."""
    masks = np.zeros((3, 64, 64), dtype=bool)
    masks[0, :32, :32], masks[1, :32, 32:], masks[2, 32:] = True, True, True
    maps = torch.from_numpy(masks[[1, 0, 2]]).float()
    assert measure.assigned_iou(maps, list(masks), (False, False, True)) == [1, 1, 1]
    assert sorted(measure.assigned_iou(maps, list(masks), (True, True, True))) == [0, 0, 1]


def test_a_name_alone_is_one_of_two_objects(pipeline):
    """What the model has to have learned from captions that leave objects out."""
    found = []
    for scene in measure.unseen_scenes(40, seed=6):
        looks = measure.looks_of(scene)
        if len(looks) != 2 or looks[0][0] == looks[1][0]:
            continue
        for named in (0, 1):
            caption = bare_caption(looks, scene.background, named=(named,))
            map_ = measure.noun_maps(pipeline, scene, caption)[UP_LAYERS[-1]][0]
            found.append([_mean_under(map_, scene.masks[index]) for index in (named, 1 - named)])
    inside, elsewhere = np.array(found).T
    assert len(found) >= 10
    assert np.mean(inside > elsewhere) > 0.85
    assert inside.mean() > 3 * elsewhere.mean()


def _mean_under(map_, mask):
    large = torch.nn.functional.interpolate(map_[None, None], size=(64, 64), mode="bilinear")
    return float(large[0, 0][torch.from_numpy(mask)].mean())


class _Stopped(Exception):
    pass


def test_a_round_that_was_interrupted_ends_where_an_unbroken_one_does(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'join'}", rank=0, world_size=1
    )
    try:
        whole = _small_round(Checkpoint(tmp_path / "whole.pt", every=100))
        with pytest.raises(_Stopped):
            _small_round(Checkpoint(tmp_path / "part.pt", every=4), stop=7)
        resumed = _small_round(Checkpoint(tmp_path / "part.pt", every=4))
    finally:
        torch.distributed.destroy_process_group()
    assert resumed[1] == [4, 5, 6, 7, 8, 9]
    for one, other in zip(whole[0], resumed[0], strict=True):
        assert torch.equal(one, other)


def _small_round(checkpoint, stop=None):
    """Weights, averaged weights and steps of ten steps of a linear model."""
    torch.manual_seed(1 if checkpoint.path.exists() else 0)
    model = torch.nn.Linear(3, 2)
    average, steps = AveragedWeights(model, 0.9), []

    def loss_of(step):
        if step == stop:
            raise _Stopped
        steps.append(step)
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        return model(x).square().mean(), {}

    optimise(
        model,
        average,
        Round(10, 0.1, 4, warmup=2),
        loss_of,
        lambda _: None,
        lambda *_: None,
        checkpoint,
    )
    return [*model.parameters(), *average.module.parameters()], steps


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
