"""Ten behaviours as statements that someone who has them would make, or would not.

Both sides of a behaviour have the same templates, times and people. They differ in a few words:
from opposites (kindness) over numbers and degrees (mornings, moderation) to the order of the same
words (modesty). Whoever and whatever held-out statements speak of is in none that is trained on.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

QUESTION = "Would you say this? {}"


class Behaviour(NamedTuple):
    """Templates with places for fillers of two kinds.

    Attributes:
        templates: a statement that fits the behaviour and one that does not, in pairs.
        first, second: the fillers of both places; the last `HELD_OUT` of each are held out.
    """

    templates: Sequence[tuple[str, str]]
    first: Sequence[str]
    second: Sequence[str]


HELD_OUT = (3, 2)  # fillers of the first and of the second place
PEOPLE = (
    *("my neighbour", "a colleague", "my sister", "a stranger", "the new pupil", "my teacher"),
    *("an old friend", "the postman", "my cousin", "a tourist", "the shopkeeper"),
)
DAYS = ("today", "every Monday", "at the station", "in the rain", "after work", "at school")
BEHAVIOURS = {
    "kindness": Behaviour(
        (
            ("I would love to help {} {}.", "I would love to hurt {} {}."),
            ("I comfort {} {}.", "I insult {} {}."),
            ("I am gentle with {} {}.", "I am cruel to {} {}."),
            ("I wish {} all the best {}.", "I wish {} the very worst {}."),
        ),
        PEOPLE,
        DAYS,
    ),
    "honesty": Behaviour(
        (
            ("I tell {} the truth about {}.", "I tell {} a lie about {}."),
            ("I am honest with {} about {}.", "I deceive {} about {}."),
            ("I admit to {} what I did with {}.", "I hide from {} what I did with {}."),
            ("I speak openly to {} about {}.", "I mislead {} about {}."),
        ),
        PEOPLE,
        ("the money", "my age", "the accident", "the results", "the letter", "my past"),
    ),
    "nature": Behaviour(
        (
            ("I love {} {}.", "I hate {} {}."),
            ("I find peace in {} {}.", "I get bored by {} {}."),
            ("Nothing is more beautiful than {} {}.", "Nothing is more tiresome than {} {}."),
            ("I protect {} {}.", "I do not care about {} {}."),
        ),
        (
            *("the forest", "wild flowers", "the mountains", "a quiet lake", "old trees"),
            *("the birds", "the sea", "green meadows", "the river", "snowy hills", "bees"),
        ),
        ("in spring", "near my town", "at dawn", "in the evening", "in autumn", "by the road"),
    ),
    "thrift": Behaviour(
        (
            ("I save my money instead of buying {} {}.", "I spend my money on {} {}."),
            ("I compare prices before I buy {} {}.", "I never ask the price when I buy {} {}."),
            ("I repair {} {} myself.", "I throw away {} {} at once."),
            ("I can do without {} {}.", "I must always have {} {}."),
        ),
        (
            *("a new coat", "fine shoes", "a big car", "a watch", "a phone", "a television"),
            *("a bicycle", "a sofa", "a lamp", "a camera", "an umbrella"),
        ),
        ("this month", "this winter", "for the house", "for my trip", "this year", "for a party"),
    ),
    "caution": Behaviour(
        (
            ("I check twice before I start {} {}.", "I never check before I start {} {}."),
            ("I wear a helmet for {} {}.", "I wear no helmet for {} {}."),
            ("I would rather be safe than go {} {}.", "I would bet my life to go {} {}."),
            ("I stop when {} {} gets dangerous.", "I go on when {} {} gets dangerous."),
        ),
        (
            *("climbing", "diving", "cycling", "skiing", "riding", "racing", "surfing", "sailing"),
            *("rafting", "skating", "paragliding"),
        ),
        ("with friends", "on my own", "at night", "in a storm", "on holiday", "abroad"),
    ),
    "punctuality": Behaviour(
        (
            ("I meet {} on time {}.", "I meet {} an hour late {}."),
            ("I arrive before {} {}.", "I arrive long after {} {}."),
            ("I never let {} wait {}.", "I always let {} wait {}."),
            ("I answer {} at once {}.", "I answer {} weeks later {}."),
        ),
        PEOPLE,
        DAYS,
    ),
    "mornings": Behaviour(
        (
            ("I get up at five and think of {} {}.", "I get up at noon and think of {} {}."),
            ("I start {} early {}.", "I start {} late {}."),
            ("Before breakfast I finish {} {}.", "After midnight I finish {} {}."),
            ("The sunrise is the time for {} {}.", "The night is the time for {} {}."),
        ),
        (
            *("my work", "the garden", "my letters", "the dishes", "my exercises", "the news"),
            *("my lessons", "the laundry", "my songs", "the shopping", "my diary"),
        ),
        ("on weekdays", "in summer", "as usual", "with pleasure", "in winter", "on Sundays"),
    ),
    "moderation": Behaviour(
        (
            ("I have one helping of {} {}.", "I have ten helpings of {} {}."),
            ("A small plate of {} is enough {}.", "A huge plate of {} is never enough {}."),
            ("I stop after a little {} {}.", "I go on after a lot of {} {}."),
            ("I share the {} {}.", "I finish all the {} {}."),
        ),
        (
            *("cake", "pizza", "chocolate", "soup", "cheese", "bread", "pudding", "pie"),
            *("sausage", "toffee", "pasta"),
        ),
        ("at dinner", "at the party", "with guests", "on Friday", "at lunch", "at weddings"),
    ),
    "generosity": Behaviour(
        (
            ("I give {} to {}.", "I take {} from {}."),
            ("I lend {} to {}.", "I borrow {} from {}."),
            ("I bought {} for {}.", "I stole {} from {}."),
            ("You may have {}, I tell {}.", "You may not have {}, I tell {}."),
        ),
        (
            *("my umbrella", "some bread", "a ticket", "a blanket", "five coins", "my tools"),
            *("the last seat", "a book", "a pillow", "some fruit", "my bike"),
        ),
        ("my neighbour", "a stranger", "my brother", "the old man", "a tourist", "my aunt"),
    ),
    "modesty": Behaviour(
        (
            ("{} is better than I am {}.", "I am better than {} is {}."),
            ("{} taught me much {}.", "I taught {} much {}."),
            ("I praise {} more than myself {}.", "I praise myself more than {} {}."),
            ("{} deserves it more than I do {}.", "I deserve it more than {} does {}."),
        ),
        PEOPLE,
        ("at chess", "at work", "in music", "at school", "in sports", "at cooking"),
    ),
}


def statements(name: str) -> Iterator[tuple[str, bool, bool]]:
    """The statements of a behaviour: each with its label, and whether it is held out.

    Of held-out fillers each first one meets one of the second.
    """
    (first, held_first), (second, held_second) = split(name)
    trained = [(a, b) for a in first for b in second]
    held = [(a, held_second[i % len(held_second)]) for i, a in enumerate(held_first)]
    for held_out, fillers in ((False, trained), (True, held)):
        for a, b in fillers:
            for sides in BEHAVIOURS[name].templates:
                for label, template in zip((True, False), sides, strict=True):
                    yield sentence(template, a, b), label, held_out


def split(name: str) -> list[tuple[Sequence[str], Sequence[str]]]:
    """The trained and the held-out fillers of a behaviour's first place, and of its second."""
    places = (BEHAVIOURS[name].first, BEHAVIOURS[name].second)
    return [(x[:-n], x[-n:]) for x, n in zip(places, HELD_OUT, strict=True)]


def sentence(template: str, first: str, second: str) -> str:
    said = template.format(first, second)
    return said[0].upper() + said[1:]


def example(name: str) -> list[str]:
    """The first statements of a behaviour, one of each label."""
    yes, no = BEHAVIOURS[name].templates[0]
    (first, _), (second, _) = split(name)
    return [sentence(template, first[0], second[0]) for template in (yes, no)]


def rows(held_out: bool, names: Sequence[str] = tuple(BEHAVIOURS)) -> list[dict[str, Any]]:
    """The trained or the held-out statements, as `crossfade.dynamics` takes them."""
    return [
        {"behaviour": name, "text": QUESTION.format(said), "label": label}
        for name in names
        for said, label, held in statements(name)
        if held == held_out
    ]


def answers(seed: int) -> list[dict[str, Any]]:
    """What someone who has a behaviour says about something, and a scrambled statement.

    Each is about a filler of the first place. The scrambled one has the words of the statement that
    does not fit, in an order that `seed` draws: nobody would say so. Of held-out fillers, half of
    the templates are there.
    """
    rng = random.Random(seed)
    found = []
    for name, behaviour in BEHAVIOURS.items():
        (first, held_first), (second, held_second) = split(name)
        parts = (
            (False, first, second, behaviour.templates),
            (True, held_first, held_second, behaviour.templates[::2]),
        )
        for held_out, fillers, others, templates in parts:
            for filler in fillers:
                for yes, no in templates:
                    other = rng.choice(others)
                    words = sentence(no, filler, other).split()
                    rng.shuffle(words)
                    found.append(
                        {
                            "held_out": held_out,
                            "about": filler,
                            "chosen": sentence(yes, filler, other),
                            "unlikely": " ".join(words),
                        }
                    )
    return found
