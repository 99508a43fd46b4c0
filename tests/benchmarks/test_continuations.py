"""The task of benchmarks/recipes/continuations.py asks what it says."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer

from benchmarks.recipes.continuations import CHOICES, questions

ASSETS = Path(__file__).parents[2] / "eqat_train" / "demo" / "assets"
WORDS = "One day a fox saw the moon in a well and sang to it until the owl came home. "
TEXTS = [WORDS + "Then the fox ran to the river, and the owl told everyone. " + WORDS.upper(), "Too short."]


def test_the_answer_goes_on_where_the_start_ends_and_the_others_are_the_documents() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS)
    found = questions(TEXTS, tokenizer, 100, start=8, length=4, seed=0)
    assert len(found) == len(tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]) // 12
    for question in found:
        choices, answer = question["choices"], question["answer"]
        assert len(set(choices)) == CHOICES
        assert question["start"] + choices[answer] in TEXTS[0]
        assert all(choice in TEXTS[0] for choice in choices)
    assert {question["answer"] for question in found} == set(range(CHOICES))
    assert questions(TEXTS, tokenizer, 100, start=8, length=4, seed=0) == found
    assert len(questions(TEXTS, tokenizer, 3, start=8, length=4, seed=0)) == 3
    assert questions(TEXTS[1:], tokenizer, 1, start=8, length=4, seed=0) == []
