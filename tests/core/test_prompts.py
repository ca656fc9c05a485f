"""The prompt grammar."""

import pytest
import torch

from em_core.errors import UserError
from em_core.examples import Example
from em_core.model.vectors import TableStatistics, spread_pieces
from em_core.prompts import Concept, ConceptPrompt, embedding_name, merge_concepts


def test_parts_of_a_prompt() -> None:
    prompt = ConceptPrompt.parse("a photo of <rex:dog> and <doll:old  doll>, on <shore>")
    assert prompt.parts == (
        "a photo of ",
        Concept("rex", "dog"),
        " and ",
        Concept("doll", "old doll"),
        ", on ",
        Concept("shore", ""),
    )
    assert prompt.plain() == "a photo of dog and old doll, on "


@pytest.mark.parametrize("text", ["a <rex:dog> b <c>", "<a><b:x y>", "plain", ""])
def test_text_survives_a_round_trip(text: str) -> None:
    assert str(ConceptPrompt.parse(text)) == text
    assert ConceptPrompt.parse(str(ConceptPrompt.parse(text))) == ConceptPrompt.parse(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a <rex:dog> and <rex>", "more than once"),
        ("a <rex:dog", "Unbalanced"),
        ("a rex> b", "Unbalanced"),
        ("a <>", "Bad concept name"),
        ("a <../x:dog>", "Bad concept name"),
        ("a <1st:dog>", "Bad concept name"),
        ("a <Rex:dog> and <rex:cat>", "Rex and rex differ only in upper and lower case"),
        ("a <lora:style:1>", "connect a Load LoRA node"),
        ("a <rex:embedding:>", "Bad start"),
        ("a <rex:red embedding:one>", "Bad start"),
        ("a <rex:embedding:one dog>", "Bad start"),
    ],
)
def test_malformed_prompts(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        ConceptPrompt.parse(text)


@pytest.mark.parametrize(
    "text", ["(<rex:dog>:1.3)", "a <rex> (on grass:.8) b", "(a <rex:dog>, big: 2 )"]
)
def test_weights_in_a_prompt_that_describes_a_picture(text: str) -> None:
    picture = torch.zeros(3, 8, 8)
    with pytest.raises(UserError, match="Weights such as"):
        Example(picture, ConceptPrompt.parse(text))
    plain = "a <rex:dog> (my dog) at 1:2, (see: here)"
    assert str(Example(picture, ConceptPrompt.parse(plain)).prompt) == plain


def test_embedding_in_place_of_words() -> None:
    (concept,) = ConceptPrompt.parse("a <rex:embedding:my/dog.pt>").concepts
    assert embedding_name(concept.words) == "my/dog.pt"
    assert embedding_name("red dog") is None and embedding_name("") is None


def test_a_prompt_without_concepts_is_refused_where_one_is_needed() -> None:
    with pytest.raises(UserError, match="No concept in the prompt"):
        ConceptPrompt.parse("a photo of a dog").require_concepts()


def test_orders_move_the_concepts_of_a_list_and_nothing_else() -> None:
    prompt = ConceptPrompt.parse("a photo of a <a:cat>, an <b:owl> and the <c> on <shore:beach>")
    assert [str(order) for order in prompt.orders()] == [
        "a photo of a <a:cat>, an <b:owl> and the <c> on <shore:beach>",
        "a photo of a <b:owl>, an <c> and the <a:cat> on <shore:beach>",
        "a photo of a <c>, an <a:cat> and the <b:owl> on <shore:beach>",
    ]
    for text in ("<a> with <b>", "<a> on <b>", "a photo of <a>", "a photo"):
        assert ConceptPrompt.parse(text).orders() == (ConceptPrompt.parse(text),)


def test_subset_follows_the_order_asked_for() -> None:
    prompt = ConceptPrompt.parse("<a:x> with <b:y> in <c:z>")
    assert str(prompt.subset(["c", "a"])) == "a photo of <c:z> and <a:x>"


def test_concepts_of_several_prompts() -> None:
    prompts = [ConceptPrompt.parse(t) for t in ("<a> and <b:dog>", "<a:cat> on <c>")]
    assert merge_concepts(prompts) == (Concept("a", "cat"), Concept("b", "dog"), Concept("c", ""))
    with pytest.raises(UserError, match="starts from 'dog' in one prompt"):
        merge_concepts([ConceptPrompt.parse("<a:dog>"), ConceptPrompt.parse("<a:cat>")])
    with pytest.raises(UserError, match="a and A differ only in upper and lower case"):
        merge_concepts([ConceptPrompt.parse("<a:dog>"), ConceptPrompt.parse("<A:dog>")])


def test_start_vectors_from_pieces() -> None:
    pieces = torch.tensor([[1.0, 0.0], [3.0, 2.0], [8.0, 8.0]])
    assert torch.equal(spread_pieces(pieces, 1), torch.tensor([[4.0, 10 / 3]]))
    assert torch.equal(spread_pieces(pieces, 2), torch.tensor([[2.0, 1.0], [8.0, 8.0]]))
    assert torch.equal(spread_pieces(pieces, 4), pieces[[0, 1, 2, 0]])


def test_random_start_matches_the_table_and_skips_unused_rows() -> None:
    g = torch.Generator().manual_seed(0)
    used = torch.randn(500, 3, generator=g) * torch.tensor([1.0, 2.0, 0.5]) + torch.tensor(
        [0.0, 5.0, -1.0]
    )
    table = torch.cat([used, torch.zeros(2000, 3)])
    drawn = TableStatistics.of(table).draw(20_000, g)
    torch.testing.assert_close(drawn.mean(dim=0), used.mean(dim=0), atol=0.05, rtol=0)
    torch.testing.assert_close(drawn.std(dim=0), used.std(dim=0), atol=0.05, rtol=0)
