"""English grammar for the story generator: inflection, agreement, reference and template expansion.

A template is plain text with

    [a|b|c]         one of the alternatives (may be empty, may nest)
    <rule x y>      one variant of a named rule; ``$1``, ``$2`` in it stand for x, y
    {slot.form}     a form of a character, thing, place or activity, see ``Character.form`` and its siblings
    a%              "a" or "an", as the next word asks

Pronouns are chosen from the discourse: ``{hero.he}`` is "he" or "she" only where the character was mentioned in this
or the last sentence of the paragraph and nobody else of that gender was; elsewhere it is the name. Capitalised forms
(``{hero.He}``) are pronouns in any case, for references that syntax alone makes clear.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Activity", "Character", "Place", "Realizer", "Rules", "Thing", "expand", "inflect", "parse_variants"]

Rules = Mapping[str, tuple[str, ...]]

PRONOUNS = {
    "f": {"he": "she", "him": "her", "his": "her", "himself": "herself"},
    "m": {"he": "he", "him": "him", "his": "his", "himself": "himself"},
}
IRREGULAR_PAST = {
    "be": "was", "bake": "baked", "blow": "blew", "build": "built", "catch": "caught", "dig": "dug", "draw": "drew",
    "feed": "fed", "find": "found", "fly": "flew", "go": "went", "have": "had", "hunt": "hunted", "keep": "kept",
    "listen": "listened", "make": "made", "read": "read", "ride": "rode", "run": "ran", "sail": "sailed",
    "sing": "sang", "sit": "sat", "sleep": "slept", "swim": "swam", "swing": "swung", "teach": "taught",
    "tell": "told", "weave": "wove", "write": "wrote",
}  # fmt: skip
IRREGULAR_PARTICIPLE = {
    "draw": "drawn", "fly": "flown", "go": "gone", "ride": "ridden", "run": "run", "sing": "sung", "swim": "swum",
    "weave": "woven", "write": "written",
}  # fmt: skip
VOWEL_SOUND = re.compile(r"(?!one\b|uni|use)(?:hour|honest|[aeiou])", re.IGNORECASE)
SENTENCE_END = re.compile(r'[.!?]"?(?=\s|$)')
STRANGERS = ("friend", "rival", "helper")
SLOT = re.compile(r"\{(\w+)(?:\.([\w:]+))?\}")
CHOICE = re.compile(r"\[([^\[\]]*)\]")
RULE = re.compile(r"<([\w ]+)>")


def inflect(phrase: str, form: str) -> str:
    """A verb phrase in ``base``, ``past``, ``done`` (participle), ``ing`` or ``third`` (person singular)."""
    verb, _, rest = phrase.partition(" ")
    doubled = re.search(r"[^aeiou][aeiou][bdgmnprt]$", verb) and verb not in ("listen", "whisper", "gather", "wander")
    if form == "base":
        word = verb
    elif form in ("past", "done"):
        word = (IRREGULAR_PARTICIPLE.get(verb) if form == "done" else None) or IRREGULAR_PAST.get(verb) or (
            verb + "d" if verb.endswith("e") else verb[:-1] + "ied" if re.search(r"[^aeiou]y$", verb) else
            verb + verb[-1] * bool(doubled) + "ed"
        )  # fmt: skip
    elif form == "ing":
        word = (verb[:-1] if re.search(r"[^e]e$", verb) else verb + verb[-1] * bool(doubled)) + "ing"
    elif form == "third":
        irregular = {"be": "is", "have": "has"}
        regular = verb[:-1] + "ies" if re.search(r"[^aeiou]y$", verb) else verb
        word = irregular.get(verb) or (
            regular + ("es" if re.search(r"(s|x|ch|sh|o)$", verb) else "s" * (regular == verb))
        )
    else:
        raise KeyError(form)
    return f"{word} {rest}".strip()


def with_article(phrase: str) -> str:
    """``phrase`` after "a" or "an"."""
    return f"{'an' if VOWEL_SOUND.match(phrase) else 'a'} {phrase}"


@dataclass(frozen=True)
class Character:
    """Somebody with a name.

    Attributes:
        name: given name, or title and name ("Aunt Clara").
        gender: "f" or "m".
        kind: noun, "girl", "fox", "baker".
        adjective: what goes before the noun.
        hand: "hand", "paw", "wing", "hoof".
        home: noun phrase with its article.
    """

    name: str
    gender: str
    kind: str
    adjective: str
    hand: str = "hand"
    home: str = ""

    def form(self, form: str) -> str:
        """Any form that does not depend on the discourse."""
        if form.lower() in PRONOUNS[self.gender]:
            return PRONOUNS[self.gender][form.lower()]
        described = f"{self.adjective} {self.kind}"
        plural = {"hoof": "hooves", "foot": "feet"}.get(self.hand, self.hand + "s")
        forms = {
            "name": self.name, "s": self.name + "'s", "kind": self.kind, "adj": self.adjective,
            "a": with_article(described), "the": f"the {self.kind}", "full": f"the {described}", "home": self.home,
            "intro": f"{with_article(described)} named {self.name}", "hand": self.hand, "hands": plural,
            "child": "daughter" if self.gender == "f" else "son",
        }  # fmt: skip
        return forms[form]


@dataclass(frozen=True)
class Thing:
    """Something without a name.

    Attributes:
        noun: head noun in the number it is used in.
        adjective: what goes before it.
        number: "one", "many" (plural noun) or "mass" (no plural, no article).
    """

    noun: str
    adjective: str
    number: str = "one"

    def form(self, form: str) -> str:
        """Noun phrases, pronouns and verbs that agree with the thing; ``verb:x`` is x in the present tense."""
        full = f"{self.adjective} {self.noun}".strip()
        many = self.number == "many"
        if form.startswith("verb:"):
            return inflect(form[5:], "base" if many else "third")
        one = self.number == "one"
        forms = {
            "a": with_article(full) if one else f"some {full}", "one": with_article(self.noun) if one else self.noun,
            "the": f"the {self.noun}", "full": f"the {full}", "noun": self.noun, "bare": full, "adj": self.adjective,
            "my": f"my {full}", "your": f"your {self.noun}", "it": "they" if many else "it",
            "them": "them" if many else "it", "its": "their" if many else "its", "was": "were" if many else "was",
            "is": "are" if many else "is", "has": "have" if many else "has", "this": "these" if many else "this",
        }  # fmt: skip
        return forms[form]


@dataclass(frozen=True)
class Place:
    """Somewhere to go: a noun phrase without article, and the preposition for being there."""

    noun: str
    preposition: str

    def form(self, form: str) -> str:
        """``the``, ``in`` (being there), ``to`` (going there), ``from``, ``noun``."""
        the = f"the {self.noun}"
        return {
            "the": the, "in": f"{self.preposition} {the}", "to": f"to {the}", "from": f"from {the}", "noun": self.noun
        }[form]  # fmt: skip


@dataclass(frozen=True)
class Activity:
    """Something people like to do: a verb phrase in its base form."""

    phrase: str

    def form(self, form: str) -> str:
        """See ``inflect``."""
        return inflect(self.phrase, form)


Slot = Character | Thing | Place | Activity | str


def parse_variants(text: str) -> list[tuple[str, ...]]:
    """Groups of variants from text: blank lines part groups, "- " starts a variant, other lines continue it."""
    groups = []
    for block in re.split(r"\n\s*\n", text.strip()):
        joined = " ".join(line.strip() for line in block.strip().splitlines())
        groups.append(tuple(variant.strip() for variant in re.split(r"(?:^|\s)-(?:\s|$)", joined)[1:]))
    return groups


def expand(template: str, rules: Rules, rng: random.Random, used: set[str]) -> str:
    """Chooses until only slots are left; a variant in ``used`` is chosen again only when its rule has no other."""
    while True:
        choice, rule = CHOICE.search(template), RULE.search(template)
        # Rules inside an alternative that is not taken must not count as used, so choices go first.
        match = choice or rule
        if match is None:
            return re.sub(r" {2,}", " ", template).strip()
        if match is choice:
            text = rng.choice(match[1].split("|"))
        else:
            name, *arguments = match[1].split()
            fresh = [variant for variant in rules[name] if variant not in used]
            text = rng.choice(fresh or rules[name])
            used.add(text)
            for position, argument in enumerate(arguments, start=1):
                text = text.replace(f"${position}", argument)
        template = template[: match.start()] + text + template[match.end() :]


@dataclass
class Realizer:
    """Fills the slots of expanded paragraphs and keeps track of who was mentioned."""

    slots: Mapping[str, Slot]
    mentions: dict[str, int] = field(default_factory=dict)
    sentence: int = 0
    introduced: set[str] = field(default_factory=set)

    def paragraph(self, template: str) -> str:
        """Final text of one paragraph: slots filled, articles chosen, sentences capitalised."""
        self.mentions.clear()
        parts, position = [], 0
        for match in SLOT.finditer(template):
            literal = template[position : match.start()]
            self.sentence += len(SENTENCE_END.findall(literal))
            parts += [literal, self._fill(match[1], match[2])]
            position = match.end()
            if self._is_stranger(match, template):
                # "Hans, a quiet bear," and before a relative clause "Hans, a quiet bear who ..."
                before_clause = template.startswith(", who", position)
                closed = before_clause or template[position] in ",.!?"
                parts.append(f", {self._fill(match[1], 'a')}{'' if closed else ','}")
                position += before_clause
        self.sentence += 1
        text = "".join([*parts, template[position:]])
        text = re.sub(r"\b([aA])% (?=(\S+))", lambda m: m[1] + with_article(m[2])[1 : -len(m[2])], text)
        return re.sub(r'(^"?|\^"?|[.!?] "?|\." "?)([a-z])', lambda m: m[1] + m[2].upper(), text).replace("^", "")

    def _is_stranger(self, match: re.Match[str], template: str) -> bool:
        """Whether the slot names a friend, rival or helper who has not been introduced and is not about to be."""
        name, form = match[1], match[2]
        if name not in STRANGERS or name in self.introduced:
            return False
        quoted = template.count('"', 0, match.start()) % 2
        if form is None and (quoted or template.startswith("'", match.end())):
            return False
        self.introduced.add(name)
        return form is None and f"{{{name}.a}}" not in template[match.end() :][:20]

    def _fill(self, name: str, form: str | None) -> str:
        slot = self.slots[name]
        if isinstance(slot, str):
            return slot
        if not isinstance(slot, Character):
            return slot.form(form or "the")
        text = self._refer(slot, form) if form in ("he", "him", "his") else slot.form(form or "name")
        self.mentions[slot.name] = self.sentence
        return text

    def _refer(self, character: Character, form: str) -> str:
        recent = [name for name, sentence in self.mentions.items() if sentence >= self.sentence - 1]
        genders = {slot.name: slot.gender for slot in self.slots.values() if isinstance(slot, Character)}
        rivals = [name for name in recent if genders[name] == character.gender and name != character.name]
        if character.name in recent and not rivals:
            return character.form(form)
        return character.form("s" if form == "his" else "name")
