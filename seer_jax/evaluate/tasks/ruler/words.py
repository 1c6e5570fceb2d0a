"""Random keys, values and sentences that needles are made of and hidden in."""

import functools
import itertools
import re
import uuid
from collections.abc import Callable, Collection, Sequence

import numpy as np


def listed_words(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


ADJECTIVES = listed_words(
    """able amber ancient bare bitter bold brave brief bright brisk broad bronze calm careful cheap clean clear
    clever coarse cold common cosy crisp curious curved daily damp dark deep dense distant double dry dusty eager early easy
    eastern empty even faint famous fast fine firm flat fresh frozen gentle giant glad golden grand green grey happy hard
    heavy hidden high hollow honest humble icy idle keen kind large late light little lively lonely long loud low lucky
    mellow mild misty modern narrow neat new noble northern odd old open orange pale plain polite proud purple quick quiet
    rapid rare ready red rich ripe rough round royal rustic safe salty scarlet serious sharp short shy silent silver simple
    slow small smooth soft solid sour southern spare steady steep still strange strong sunny sweet swift tall tame
    thick thin tidy tiny tired upper vast violet warm wary western white wide wild wise wooden young"""
)
NOUNS = listed_words(
    """acorn anchor apple apron arrow autumn axle badge bakery balloon bamboo banner barley barn barrel basket beach beacon bench
    berry blanket blossom boat bonnet border bottle boulder branch bread bridge broom bucket button cabin cable candle canvas canyon
    carpet castle cedar cellar chair chalk cherry chimney church circle cliff clock cloud clover coat coffee compass copper coral
    corner cotton cradle creek cricket crystal curtain daisy desert diamond dolphin donkey dragon drawer eagle engine falcon feather
    fence ferry fiddle field flute forest fountain garden garlic ginger glacier glove granite grape hammer harbor harvest
    hedge helmet heron hill honey horse island ivory jacket jungle kettle kitchen ladder lagoon lantern laurel leaf lemon
    letter library lily linen lizard magnet mango maple marble market meadow melon mill mirror mitten monsoon mountain needle
    nest oak oasis ocean olive onion orchard otter oyster paddle palace paper parrot pasture pebble pencil pepper piano
    pigeon pillow pine planet pocket pond poppy potato prairie pumpkin quarry rabbit raven ribbon ridge river robin
    rocket saddle sailor salmon school shadow shell shovel signal sparrow spoon spring squirrel stable statue stone street summit
    table teapot temple thistle thunder tiger timber tower tractor tunnel turnip valley velvet village violin wagon walnut
    whistle willow window winter yarn zebra
    air alley antler arch attic axe bank bark basin bath bay beam bean bear bee beetle bell belt bird blade bowl box brass brick
    brook brush cage cake camel camp card cart cave chain chest clay cloth coast coin colt cook corn couch crab crane crown cup curb
    dam dance deck deer desk dish dock dove drum duck dune dwarf ear elbow elk elm ember fair farm fawn fern fig finch fish flag
    flame flock flour fog fox frame frog frost fruit gate gem goat goose gown grain grass grove gull hall hare hat hawk hay hen herd
    hive hook horn hut ink iris iron jar jet jug kelp key king kite knot lace lake lamb lamp land lane lark lawn leather"""
)
VERBS = listed_words(
    "admires avoids carries crosses describes draws finds follows guards keeps leaves measures misses needs passes recalls repairs"
)
PLACES = listed_words("above along behind below beside beyond near outside past under")

# Sentences without content, repeated as they are.
NOISE = "Rain falls on the hills. The wind turns north. A door stays shut. Nothing has changed here. The day goes on."

SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
SENTENCES = 2000  # generated ones; longer texts repeat them


def draw_word(rng: np.random.Generator) -> str:
    """Two words joined by a hyphen."""
    return f"{ADJECTIVES[rng.integers(len(ADJECTIVES))]}-{NOUNS[rng.integers(len(NOUNS))]}"


def draw_number(rng: np.random.Generator) -> str:
    """Seven digits, of which the first is not 0."""
    return str(rng.integers(10**6, 10**7))


def draw_uuid(rng: np.random.Generator) -> str:
    """A UUID of version 4."""
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


DRAWN = {"words": draw_word, "numbers": draw_number, "uuids": draw_uuid}


def draw_distinct(
    draw: Callable[[np.random.Generator], str], count: int, rng: np.random.Generator, taken: Collection[str] = ()
) -> list[str]:
    """So many different draws, none of which is taken already."""
    found, barred = dict[str, None](), frozenset(taken)
    while len(found) < count:
        if (one := draw(rng)) not in barred:
            found[one] = None
    return list(found)


def word_pool(count: int) -> list[str]:
    """Different words: single ones first, then pairs joined by a hyphen, then triples.

    Raises:
      ValueError: there are not so many.
    """
    single = dict.fromkeys((*ADJECTIVES, *NOUNS))
    pairs = _pairs()
    triples = (f"{a}-{b}-{n}" for a, b in itertools.permutations(ADJECTIVES, 2) for n in NOUNS)
    found = list(itertools.islice(itertools.chain(single, pairs, triples), count))
    if len(found) < count:
        raise ValueError(f"Lists of words must have at most {len(found)} different ones; got {count}. Lower `length`.")
    return found


@functools.lru_cache(maxsize=1)
def _pairs() -> list[str]:
    """Pairs in random order, so that those of one word do not come together."""
    every = [f"{a}-{n}" for a in ADJECTIVES for n in NOUNS]
    return [every[i] for i in np.random.default_rng(0).permutation(len(every))]


@functools.lru_cache(maxsize=4)
def sentences(essay: str | None) -> tuple[tuple[str, ...], ...]:
    """Sentences of a text as words; of generated prose without one."""
    if essay is None:
        return _prose()
    return tuple(tuple(sentence.split()) for sentence in SENTENCE_END.split(essay.strip()) if sentence.split())


@functools.lru_cache(maxsize=1)
def _prose() -> tuple[tuple[str, ...], ...]:
    rng = np.random.default_rng(0)

    def pick(words: Sequence[str]) -> str:
        return words[int(rng.integers(len(words)))]

    def thing() -> str:
        return f"the {pick(ADJECTIVES)} {pick(NOUNS)}"

    def sentence() -> str:
        what, verb, where = thing(), pick(VERBS), f"{pick(PLACES)} {thing()}"
        forms = (
            f"{what} {verb} {thing()} {where}.",
            f"{where}, {what} {verb} {thing()}.",
            f"although {what} {verb} {thing()}, {thing()} {pick(VERBS)} {thing()}.",
            f"nobody asks why {what} {verb} {thing()} {where}, nor whether {thing()} {pick(VERBS)} it.",
        )
        text = pick(forms)
        return text[0].upper() + text[1:]

    return tuple(tuple(sentence().split()) for _ in range(SENTENCES))
