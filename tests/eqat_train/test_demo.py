"""The demo: stories that are good English, and assets that show what quantization does."""

from __future__ import annotations

import itertools
import lzma
import math
import random
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eqat_train import demo
from eqat_train.demo import lexicon, stories
from eqat_train.demo.build import CALIBRATION_SEED, HELDOUT_SEED, TRAIN_SEED, BuildSettings, build
from eqat_train.demo.grammar import RULE, SLOT, inflect
from eqat_train.demo.phrases import PHRASES
from formats.affine import dequantize, round_to_nearest
from formats.errors import InputError
from formats.types import QuantScheme

GIRLS, BOYS = set(lexicon.GIRLS), set(lexicon.BOYS)
NAME = re.compile(r"\b[A-Z][a-z]+\b")
PLURALS = (
    "mittens gloves socks slippers marbles blocks carrots beans peas cookies buns berries nuts eggs boots planks nails"
)
SINGULARS = "ring key coin scarf hat kite ball doll rope ladder flute drum pie cake raft lantern jar teapot"


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return list(stories.stories(600, seed=11))


def names_of(text: str) -> set[str]:
    return set(NAME.findall(text)) & (GIRLS | BOYS)


# The generator


def test_stories_depend_on_seed_and_number_only() -> None:
    first = list(stories.stories(6, seed=5))
    assert first == list(stories.stories(6, seed=5))
    assert first[2:] == list(stories.stories(4, seed=5, start=2))
    assert first != list(stories.stories(6, seed=6))


def test_shipped_text_is_what_the_generator_writes() -> None:
    for split, seed in (("calibration", CALIBRATION_SEED), ("heldout", HELDOUT_SEED)):
        with lzma.open(demo.demo_text(split), "rt", encoding="utf-8") as file:
            shipped = file.read().split("\n<|endoftext|>\n")
        assert shipped[:50] == list(stories.stories(50, seed))
    assert len({TRAIN_SEED, CALIBRATION_SEED, HELDOUT_SEED}) == 3


def test_command_line_writes_separated_documents(tmp_path: Path) -> None:
    stories.main(["--stories", "5", "--seed", "3", "--out", str(tmp_path / "a.txt.xz")])
    stories.main(["--stories", "5", "--seed", "3", "--out", str(tmp_path / "a.txt")])
    text = (tmp_path / "a.txt").read_text()
    assert lzma.decompress((tmp_path / "a.txt.xz").read_bytes()).decode() == text
    assert text.splitlines().count("<|endoftext|>") == 4


def test_every_slot_and_rule_of_every_variant_exists() -> None:
    rng = random.Random(0)
    for plot in stories.PLOTS:
        slots = stories._cast(plot, rng)
        variants = [variant for beats in plot.paragraphs for _, beat in beats for variant in beat]
        rules = [variant.replace("$1", "helper").replace("$2", "hero") for rule in PHRASES.values() for variant in rule]
        for variant in variants + rules:
            for name, form in SLOT.findall(variant):
                if not isinstance(slots[name], str):
                    slots[name].form(form or ("name" if name in stories.ROLES else "the"))
            assert {call.split()[0] for call in RULE.findall(variant)} <= set(PHRASES)
            assert variant.count('"') % 2 == 0


@pytest.mark.parametrize(
    ("verb", "past", "done", "ing", "third"),
    [
        ("skip stones", "skipped", "skipped", "skipping", "skips"),
        ("carry", "carried", "carried", "carrying", "carries"),
        ("play", "played", "played", "playing", "plays"),
        ("swim", "swam", "swum", "swimming", "swims"),
        ("dance", "danced", "danced", "dancing", "dances"),
        ("catch", "caught", "caught", "catching", "catches"),
        ("gather", "gathered", "gathered", "gathering", "gathers"),
        ("have", "had", "had", "having", "has"),
        ("write", "wrote", "written", "writing", "writes"),
        ("read", "read", "read", "reading", "reads"),
    ],
)
def test_verbs_are_inflected(verb: str, past: str, done: str, ing: str, third: str) -> None:
    assert [inflect(verb, form).split()[0] for form in ("past", "done", "ing", "third")] == [past, done, ing, third]


def test_stories_have_the_stated_length_and_clean_text(texts: list[str]) -> None:
    for text in texts:
        assert 80 <= len(text.split()) <= 250
        assert re.fullmatch(r"[A-Za-z ,.:!?'\"\n-]+", text), text
        assert not re.search(r" [,.!?]|,,|\.\.|  |[,.!?][A-Za-z]|(?:^|\. )[a-z]", text), text
        assert text.count('"') % 2 == 0


def test_articles_agree_with_the_next_word(texts: list[str]) -> None:
    for text in texts:
        assert not re.search(r"\b[Aa] (?:[aeiou]|hour\b|honest\b)", text), text
        assert not re.search(r"\b[Aa]n (?!honest\b|hour\b)[^aeiou]", text), text
        assert not re.search(rf"\b[Aa]n? (?:\w+ )?(?:{PLURALS.replace(' ', '|')})\b", text), text


def test_verbs_agree_with_number(texts: list[str]) -> None:
    for text in texts:
        assert not re.search(rf"\bthe (?:{PLURALS.replace(' ', '|')}) (?:was|is|has)\b", text), text
        assert not re.search(rf"\bthe (?:{SINGULARS.replace(' ', '|')}) (?:were|are|have)\b", text), text
        assert not re.search(rf"\b[Tt]his (?:{PLURALS.replace(' ', '|')})\b", text), text
        assert not re.search(r"\b(?:he|she|it) (?:were|are|have)\b(?! here)", text), text


def test_names_recur(texts: list[str]) -> None:
    for text in texts:
        first = text.split("\n\n")[0]
        hero = next(name for name in NAME.findall(first) if name in GIRLS | BOYS)
        assert len(re.findall(rf"\b{hero}\b", text)) >= 3, text
        assert all(len(re.findall(rf"\b{name}\b", text)) >= 2 for name in names_of(text)), text
        assert len(set(re.findall(r"\b(?:Grandma|Grandpa|Aunt|Uncle) [A-Z]\w+", text))) <= 1, text


def test_pronouns_agree_with_gender(texts: list[str]) -> None:
    one_gender = 0
    for text in texts:
        women = bool(names_of(text) & GIRLS) or bool(re.search(r"Grandma|Aunt", text))
        men = bool(names_of(text) & BOYS) or bool(re.search(r"Grandpa|Uncle", text))
        one_gender += women != men
        assert women or not re.search(r"\b(?:[Ss]he|[Hh]er|[Hh]erself)\b", text), text
        assert men or not re.search(r"\b(?:[Hh]e|[Hh]im|[Hh]is|[Hh]imself)\b", text), text
        owner = r"\b([A-Z]\w+) (?:hid|shook|bit|clapped|hurt|opened|lifted|lost|closed|slipped and lost) (his|her)\b"
        for name, pronoun in re.findall(owner, text):
            assert (name in GIRLS) == (pronoun == "her") or name not in GIRLS | BOYS, text
        for noun, name in re.findall(r"\b(girl|boy) named ([A-Z]\w+)\b", text):
            assert name in (GIRLS if noun == "girl" else BOYS), text
    assert one_gender > 10


def test_stories_are_wide_and_not_near_duplicates(texts: list[str]) -> None:
    assert len({plot.name for plot in stories.PLOTS}) >= 15
    assert len({word.lower() for text in texts for word in re.findall(r"[A-Za-z]+", text)}) > 1200
    shingles = [set(zip(*(text.split()[i:] for i in range(5)), strict=False)) for text in texts[:250]]
    overlap = max(len(a & b) / len(a | b) for a, b in itertools.combinations(shingles, 2))
    assert overlap < 0.6


# The assets


def heldout_windows(tokenizer, windows: int, length: int) -> torch.Tensor:
    """``[windows, length]`` token ids: documents, each followed by id 0, concatenated."""
    with lzma.open(demo.demo_text("heldout"), "rt", encoding="utf-8") as file:
        documents = file.read().split("\n<|endoftext|>\n")
    ids = [i for document in documents[:60] for i in (*tokenizer(document, add_special_tokens=False).input_ids, 0)]
    return torch.tensor(ids[: windows * length]).view(windows, length)


@torch.no_grad()
def perplexity(model, windows: torch.Tensor) -> float:
    logits = model(input_ids=windows).logits[:, :-1].double()  # [windows, T-1, vocab]
    return math.exp(torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))


def test_assets_are_small_and_complete() -> None:
    sizes = {path.name: path.stat().st_size for path in demo.demo_folder().iterdir()}
    assert set(sizes) == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "calibration.txt.xz", "heldout.txt.xz",
    }  # fmt: skip
    assert sizes["model.safetensors"] <= 8_000_000
    assert sum(sizes.values()) <= 9_000_000


def test_demo_text_names_its_splits() -> None:
    with pytest.raises(InputError, match="calibration, heldout"):
        demo.demo_text("train")


def test_tokenizer_is_lossless_and_id_0_ends_a_document() -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo.demo_folder())
    assert tokenizer.eos_token_id == 0 == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert 1024 <= len(tokenizer) <= 2048
    for text in ('Mina said,  "Hello!"\n\n It\'s ten.', "naïve 雪 🦊\t\r\n", " leading", stories.story(4, 4)):
        ids = tokenizer(text).input_ids
        assert 0 not in ids
        assert tokenizer.decode(ids) == text


def test_model_is_sharp_and_2_bit_rounding_ruins_it() -> None:
    model = AutoModelForCausalLM.from_pretrained(demo.demo_folder(), dtype=torch.float32)
    windows = heldout_windows(AutoTokenizer.from_pretrained(demo.demo_folder()), windows=8, length=512)
    linears = [module for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear)]
    assert all(linear.in_features % 128 == 0 and linear.out_features % 32 == 0 for linear in linears)
    assert model.config.vocab_size % 32 == 0
    assert 2e6 <= sum(parameter.numel() for parameter in model.parameters()) <= 4e6

    full = perplexity(model, windows)
    assert full < 1.40
    for linear in linears:
        linear.weight.data = dequantize(round_to_nearest(linear.weight.data, QuantScheme(bits=2, group_size=64)))
    assert math.log(perplexity(model, windows)) > 2.5 * math.log(full)  # the loss, in nats


def test_build_runs_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = BuildSettings(
        stories=60, tokenizer_stories=60, steps=4, batch_size=2, sequence_length=64, workers=1, vocab_size=512,
        hidden_size=128, intermediate_size=128, layers=1, calibration_stories=3, heldout_stories=3,
    )  # fmt: skip
    results = build(tmp_path / "assets", settings)
    assert {path.name for path in (tmp_path / "assets").iterdir()} == {p.name for p in demo.demo_folder().iterdir()}
    assert 1 < results["full"] < 600 and math.isfinite(results["rtn"])
    assert "held-out perplexity" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "assets")
    assert model.dtype == torch.bfloat16 and model.config.num_hidden_layers == 1
    assert build(tmp_path / "again", settings) == results
