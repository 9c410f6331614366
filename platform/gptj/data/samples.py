"""Built-in data for a first run: `sample://NAME` for training and `sample://NAME/evaluation`.

    documentation  text: Python's own language reference, as `pydoc` shows it
    reviews        text, label: made-up sentences, positive or negative
    questions      SQuAD's columns: made-up facts about people, and questions about them

The made-up ones are the same on every machine, and small enough for training a tiny model from
scratch in a minute or two on a CPU.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

from gptj.storage.addresses import SAMPLE

SEED = 2021
SIZES = {"reviews": (2000, 400), "questions": (3000, 300)}  # training and evaluation rows
EVALUATION_EVERY = 5  # every fifth topic of the documentation is held out for evaluation


def read(address: str) -> Iterator[dict[str, Any]]:
    """The rows of a sample; ValueError if the name is unknown."""
    name, _, part = address.removeprefix(SAMPLE).partition("/")
    if name not in _SAMPLES or part not in ("", "evaluation"):
        known = ", ".join(f"{SAMPLE}{name}[/evaluation]" for name in _SAMPLES)
        raise ValueError(f"{address} is not a built-in sample; there are {known}")
    return _SAMPLES[name](part == "evaluation")


def documentation(evaluation: bool) -> Iterator[dict[str, Any]]:
    from pydoc_data.topics import topics  # half a megabyte: import only when needed

    # Some topics have two names.
    texts = list(dict.fromkeys(topics[name] for name in sorted(topics)))
    for number, text in enumerate(texts, 1):
        if (number % EVALUATION_EVERY == 0) == evaluation:
            yield {"text": text}


def reviews(evaluation: bool) -> Iterator[dict[str, Any]]:
    return _part("reviews", _review, lambda row: row["text"], evaluation)


def questions(evaluation: bool) -> Iterator[dict[str, Any]]:
    return _part("questions", _question, lambda row: row["context"], evaluation)


def _part(
    name: str,
    make: Callable[[random.Random], dict[str, Any]],
    key: Callable[[dict[str, Any]], str],
    evaluation: bool,
) -> Iterator[dict[str, Any]]:
    """The training or the evaluation rows; no text is in both."""
    generator = random.Random(SEED)
    seen: set[str] = set()
    train, held_out = SIZES[name]
    while len(seen) < train + held_out:
        row = make(generator)
        if key(row) in seen:
            continue
        seen.add(key(row))
        if (len(seen) > train) == evaluation:
            yield row


def _review(generator: random.Random) -> dict[str, Any]:
    """One to three clauses of one sentiment, sometimes after a concession to the other."""
    label = generator.choice(("positive", "negative"))
    other = "negative" if label == "positive" else "positive"
    clauses = [_clause(generator, label) for _ in range(generator.choice((1, 1, 2, 2, 3)))]
    text = generator.choice((", and ", "; ", ", while ")).join(clauses)
    if generator.random() < 0.2:
        # The verdict follows the "but", as in real reviews.
        text = f"{_clause(generator, other)}, but {text}"
    if generator.random() < 0.3:
        text = f"{generator.choice(_OPENINGS)} {text}"
    return {"text": text + generator.choice((".", "!", "", " .")), "label": label}


def _clause(generator: random.Random, label: str) -> str:
    words = _OPINIONS[label]
    noun = generator.choice(_ASPECTS)
    match generator.randrange(4):
        case 0:
            degree = generator.choice(_DEGREES)
            return f"the {noun} is {degree} {generator.choice(words['adjectives'])}"
        case 1:
            kind = generator.choice(words["adjectives"])
            article = "an" if kind[0] in "aeiou" else "a"
            return f"it has {article} {kind} {noun}"
        case 2:
            return f"the {noun} {generator.choice(words['verbs'])}"
        case _:
            return f"i {generator.choice(words['feelings'])} the {noun}"


def _question(generator: random.Random) -> dict[str, Any]:
    """Some facts about a person, in random order, and a question about one of them."""
    name = f"{generator.choice(_FIRST_NAMES)} {generator.choice(_LAST_NAMES)}"
    kinds = generator.sample(sorted(_FACTS), generator.randint(3, 5))
    asked = generator.choice(kinds)
    context, answer, start = "", "", 0
    for number, kind in enumerate(kinds):
        sentence, question, values = _FACTS[kind]
        value = generator.choice(values)
        if kind == "year":
            value = str(generator.randint(1900, 1999))
        before, after = sentence.split("{}")
        subject = name if number == 0 else generator.choice((name, name.split()[0]))
        context += f"{' ' if context else ''}{subject} {before}"
        if kind == asked:
            answer, start = value, len(context)
            asking = question.format(generator.choice((name, name.split()[0])))
        context += value + after
    return {
        "question": asking,
        "context": context,
        "answers": {"text": [answer], "answer_start": [start]},
    }


_SAMPLES = {"documentation": documentation, "reviews": reviews, "questions": questions}

_OPENINGS = ("overall ,", "in short ,", "to be honest ,", "as expected ,", "after an hour ,")
_DEGREES = ("very", "quite", "really", "simply", "often", "always", "utterly")
_ASPECTS = (
    "plot story acting cast script ending music camera dialogue pace humour direction scenery "
    "opening villain hero soundtrack editing premise finale costume design romance chase"
).split()
_OPINIONS: dict[str, dict[str, list[str]]] = {
    "positive": {
        "adjectives": (
            "brilliant charming moving clever fresh gripping warm elegant stunning witty "
            "delightful superb graceful tender inspired thrilling"
        ).split(),
        "verbs": ["shines", "works well", "never fails", "wins you over", "lingers in the mind"],
        "feelings": ["loved", "enjoyed", "adored", "admired", "was moved by"],
    },
    "negative": {
        "adjectives": (
            "dull clumsy boring tired shallow lifeless awful predictable messy stale "
            "annoying bland hollow tedious sloppy forgettable"
        ).split(),
        "verbs": ["falls flat", "drags on", "makes no sense", "goes nowhere", "wears you out"],
        "feelings": ["hated", "disliked", "endured", "regretted", "was bored by"],
    },
}

_FIRST_NAMES = "Anna Ben Clara David Emma Felix Grace Henry Ida Jonas Karin Leo Mia Noah".split()
_LAST_NAMES = "Adler Brook Castle Dale Ebner Frost Grant Hill Iris Jansen Keller Lund".split()
_FACTS: dict[str, tuple[str, str, list[str]]] = {  # a sentence, a question, the answers
    "city": (
        "lives in {}.",
        "Where does {} live?",
        ["Paris", "Rome", "Oslo", "Vienna", "New York", "Lima", "Cape Town", "Kyoto", "Cairo"],
    ),
    "job": (
        "works as a {}.",
        "What does {} work as?",
        ["baker", "teacher", "pilot", "tax lawyer", "nurse", "bus driver", "painter", "farmer"],
    ),
    "pet": (
        "keeps a {} at home.",
        "Which animal does {} keep?",
        ["dog", "grey parrot", "cat", "rabbit", "brown horse", "hamster", "snake", "turtle"],
    ),
    "food": (
        "likes to eat {} for lunch.",
        "What does {} like to eat?",
        ["rice", "fried noodles", "soup", "bread", "apple pie", "salad", "beans", "fish"],
    ),
    "year": (
        "was born in {}.",
        "When was {} born?",
        ["1900"],
    ),
    "instrument": (
        "plays the {} on Sundays.",
        "Which instrument does {} play?",
        ["piano", "violin", "bass guitar", "flute", "drums", "harp", "cello", "trumpet"],
    ),
}
