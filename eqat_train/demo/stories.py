"""Short stories from a grammar: the text that the demo model is trained on, calibrated with and measured by.

    python -m eqat_train.demo.stories --stories 1000 --seed 7 --out stories.txt.xz

A story draws its cast, things and places once, then follows a plot: paragraphs of beats, each told by one of several
variants. Story ``i`` of seed ``s`` depends on nothing but ``(s, i)``, so stories can be written in parallel.
Documents are separated by a line that holds only ``<|endoftext|>``.
"""

from __future__ import annotations

import argparse
import lzma
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import lexicon, plots_courage, plots_friends, plots_making, plots_search
from .grammar import Activity, Character, Place, Realizer, Slot, Thing, expand, parse_variants
from .phrases import PHRASES

__all__ = ["DOCUMENT_END", "Plot", "load_plots", "main", "stories", "story", "write_stories"]

DOCUMENT_END = "<|endoftext|>"
MIN_WORDS, MAX_WORDS = 80, 250
NAME = re.compile(rf"\b(?:{'|'.join((*lexicon.GIRLS, *lexicon.BOYS))})\b")
ROLES = ("hero", "friend", "rival", "helper", "elder", "boy")
CHANCE_OF_OPTIONAL_BEAT = 0.6
CHANCE_OF_OTHER_GENDER = 0.75
DEFAULT_THINGS = {"thing": "metal,cloth,toy", "thing2": "patch", "thing3": "cloth", "guard": "guard", "goods": "goods"}


@dataclass(frozen=True)
class Plot:
    """What happens: paragraphs of beats; a beat is (optional, variants)."""

    name: str
    slots: dict[str, str]
    paragraphs: tuple[tuple[tuple[bool, tuple[str, ...]], ...], ...]


def load_plots() -> tuple[Plot, ...]:
    """All plots, parsed from their text."""
    modules = (plots_search, plots_making, plots_courage, plots_friends)
    sources = "=====\n".join(module.PLOTS.strip("\n") + "\n" for module in modules)
    return tuple(_parse_plot(text) for text in sources.split("=====\n"))


def _parse_plot(text: str) -> Plot:
    head, body = text.strip().split("\n", 1)
    name, *settings = head.split()
    paragraphs = []
    for paragraph in re.split(r"^---$", body, flags=re.MULTILINE):
        beats = []
        for block in re.split(r"\n\s*\n", paragraph.strip()):
            # "?" in place of the first "-" makes a beat of its own that may be left out.
            for part in re.split(r"\n(?=\?)", block):
                optional = part.startswith("?")
                (variants,) = parse_variants("-" + part[1:])
                beats.append((optional, variants))
        paragraphs.append(tuple(beats))
    return Plot(name, dict(setting.split("=") for setting in settings), tuple(paragraphs))


PLOTS = load_plots()


def story(seed: int, index: int) -> str:
    """Story ``index`` of ``seed``: paragraphs parted by an empty line, 80 to 250 words, no name only once."""
    rng = random.Random(f"{seed}/{index}")
    while True:
        text = _tell(rng.choice(PLOTS), rng)
        passers_by = [name for name, count in Counter(NAME.findall(text)).items() if count == 1]
        if MIN_WORDS <= len(text.split()) <= MAX_WORDS and not passers_by:
            return text


def stories(count: int, seed: int, start: int = 0) -> Iterator[str]:
    """``count`` stories of ``seed``, from number ``start`` on."""
    return (story(seed, index) for index in range(start, start + count))


def write_stories(path: Path, texts: Iterator[str]) -> None:
    """Writes stories to a text file, xz-compressed if the name ends in ``.xz``."""
    body = f"\n{DOCUMENT_END}\n".join(texts) + "\n"
    data = body.encode()
    path.write_bytes(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME) if path.suffix == ".xz" else data)


def _tell(plot: Plot, rng: random.Random) -> str:
    realizer = Realizer(_cast(plot, rng))
    used: set[str] = set()
    paragraphs = []
    for beats in plot.paragraphs:
        told = []
        for optional, variants in beats:
            if not optional or rng.random() < CHANCE_OF_OPTIONAL_BEAT:
                told.append(expand(rng.choice(variants), PHRASES, rng, used))
        paragraphs.append(realizer.paragraph(" ^".join(told)))
    return "\n\n".join(paragraphs)


def _cast(plot: Plot, rng: random.Random) -> dict[str, Slot]:
    season = rng.choice(plot.slots.get("season", "spring,summer,autumn,winter").split(","))
    days, sights, months = lexicon.SEASONS[season]
    first_month, second_month = rng.sample(months.split(), 2)
    first_sight, second_sight = rng.sample(sights, 2)
    lairs = rng.sample(lexicon.LAIRS, 2)
    spots = rng.sample([spot for spot in lexicon.SPOTS if spot not in lairs], 3)
    slots: dict[str, Slot] = {
        "season": season, "day": rng.choice(days.split()), "sight": first_sight,
        "sight2": second_sight, "month": first_month, "month2": second_month,
        "time": rng.choice(("morning", "afternoon", "morning")),
        "region": rng.choice(lexicon.REGIONS), "fear": rng.choice(lexicon.FEARS), "water": rng.choice(lexicon.WATERS),
        "summer_sight": rng.choice(lexicon.SUMMER), "petname": rng.choice(lexicon.PET_NAMES),
        "craftname": rng.choice(lexicon.CRAFT_NAMES), "nook": rng.choice(lexicon.NOOKS),
    }  # fmt: skip
    slots |= _characters(rng)
    for names, table in ((("place", "place2"), lexicon.PLACES), (("land", "land2"), lexicon.LANDS)):
        chosen = rng.sample(table, len(names))
        slots |= {name: Place(*entry.split(":")) for name, entry in zip(names, chosen, strict=True)}
    slots |= dict(zip(("spot", "spot2", "spot3", "lair", "lair2"), (*spots, *lairs), strict=True))
    slots |= dict(zip(("dig", "dig2"), rng.sample(lexicon.DIGS, 2), strict=True))
    first, second = (Activity(phrase) for phrase in rng.sample(lexicon.ACTIVITIES, 2))
    slots |= {
        "act": first,
        "act2": second,
        "out": Activity(rng.choice([*lexicon.OUTINGS, *lexicon.OUTINGS_OF_SEASON[season]])),
    }
    slots["eve"] = Activity(rng.choice(lexicon.EVENINGS))
    nouns: set[str] = set()
    for name, categories in (DEFAULT_THINGS | {"snack": "snack", "meal": "meal"} | plot.slots).items():
        if name != "season":
            slots[name] = _thing(categories, rng, nouns)
    kinds = {character.kind for character in slots.values() if isinstance(character, Character)}
    animals = [creature for creature in lexicon.CREATURES if creature not in kinds]
    slots["creature"] = Thing(rng.choice(animals), rng.choice("tiny little thin grey brown fluffy small".split()))
    return slots


def _thing(categories: str, rng: random.Random, taken: set[str]) -> Thing:
    groups = [group for category in categories.split(",") for group in lexicon.THINGS[category]]
    adjectives, nouns = rng.choice(groups)
    noun = rng.choice([noun for noun in nouns.split() if noun not in taken])
    taken.add(noun)
    number = {"*": "many", "~": "mass"}.get(noun[-1], "one")
    return Thing(noun.rstrip("*~").replace("_", " "), rng.choice(adjectives.split()), number)


def _characters(rng: random.Random) -> dict[str, Character]:
    names = {"f": rng.sample(lexicon.GIRLS, 5), "m": rng.sample(lexicon.BOYS, 6)}
    hero_gender = rng.choice("fm")
    other = "m" if hero_gender == "f" else "f"
    kinds = rng.sample(list(lexicon.ANIMALS), 3)
    adjectives = rng.sample(lexicon.HERO_ADJECTIVES, 3)

    def animal_or_child(gender: str, kind: str, adjective: str) -> Character:
        name = names[gender].pop()
        if rng.random() < 0.4:
            return Character(name, gender, kind, adjective, lexicon.ANIMALS[kind][0], _home(kind, rng))
        child = "girl" if gender == "f" else "boy"
        return Character(name, gender, child, adjective, home=rng.choice(lexicon.HOUSES))

    def other_gender() -> str:
        return other if rng.random() < CHANCE_OF_OTHER_GENDER else hero_gender

    hero = animal_or_child(hero_gender, kinds[0], adjectives[0])
    friend = animal_or_child(other_gender(), kinds[1], adjectives[1])
    rival = animal_or_child(other_gender(), kinds[2], adjectives[2])
    helper_gender = other_gender()
    helper_kind = rng.choice([*(kind for kind in lexicon.ANIMALS if kind not in kinds), *lexicon.PEOPLE])
    helper = Character(
        names[helper_gender].pop(), helper_gender, helper_kind.replace("_", " "),
        rng.choice([word for word in lexicon.HELPER_ADJECTIVES if word not in adjectives]),
        lexicon.ANIMALS.get(helper_kind, ("hand",))[0],
    )  # fmt: skip
    elder_gender = other_gender()
    title = rng.choice(lexicon.TITLES[elder_gender])
    kin = {"Grandma": "grandmother", "Grandpa": "grandfather", "Aunt": "aunt", "Uncle": "uncle"}[title]
    elder_name = f"{title} {names[elder_gender].pop()}"
    elder = Character(elder_name, elder_gender, kin, "old", hero.hand)
    boy = Character(names["m"].pop(), "m", "boy", "small")
    return {"hero": hero, "friend": friend, "rival": rival, "helper": helper, "elder": elder, "boy": boy}


def _home(kind: str, rng: random.Random) -> str:
    return rng.choice(lexicon.ANIMALS[kind][1].split("/"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: writes stories to a file."""
    parser = argparse.ArgumentParser(prog="python -m eqat_train.demo.stories", description="Write short stories.")
    parser.add_argument("--stories", type=int, default=1000, help="how many (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other stories (default: 0)")
    parser.add_argument("--out", type=Path, required=True, help="text file; .xz compresses")
    options = parser.parse_args(arguments)
    write_stories(options.out, stories(options.stories, options.seed))


if __name__ == "__main__":
    main()
