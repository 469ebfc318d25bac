"""Generate random text that is as long as that of SQuAD: contexts, questions, answers.

In: a random.Random. Out: words, or an example {"input", "output"}.

Most words are common English words, drawn by Zipf's law, so a real tokenizer makes about as many tokens as from real
text. The other words are invented names, so a tokenizer of any vocabulary size can be trained on the text.
"""

import random
from itertools import accumulate

ENGLISH = """
the of and to in a is that for it was on are as with his they at be this from have or by one had not but what all were
when we there can an your which their said if do will each about how up out them then she many some so these would
other into has more her two like him see time could no make than first been its who now people my made over did down
only way find use may water long little very after words called just where most know get through back much before also
around another came come work three word must because does part even place well such here take why things help put
years different away again off went old number great tell men say small every found still between name should home big
give air line set own under read last never us left end along while might next sound below saw something thought both
few those always looked show large often together asked house world going want school important until form food keep
children feet land side without boy once animals life enough took four head above kind began almost live page got
earth need far hand high year mother light parts country father let night following picture being study second eyes
soon times story boys since white days ever paper hard near sentence better best across during today others however
sure means knew try told young miles sun ways thing whole hear example heard several change answer room sea against
top turned learn point city play toward five using himself usually century government university war state system
music church river
"""
COMMON = ENGLISH.split()
ONSETS = [
    "b",
    "br",
    "c",
    "ch",
    "cl",
    "d",
    "dr",
    "f",
    "fl",
    "g",
    "gr",
    "h",
    "j",
    "k",
    "l",
    "m",
    "n",
    "p",
    "pl",
    "qu",
    "r",
    "s",
    "sh",
    "st",
    "t",
    "th",
    "tr",
    "v",
    "w",
    "z",
]
VOWELS = ["a", "e", "i", "o", "u", "ai", "ea", "io", "ou", "y"]
CODAS = ["", "", "", "n", "r", "s", "l", "t", "nd", "rk", "m", "st"]
QUESTIONS = ["What", "Who", "Where", "When", "Which", "How"]
NAME_SHARE = 0.06  # fraction of a context's words that are names
CONTEXT_WORDS, CONTEXT_SPREAD = 140, 45  # mean and standard deviation; an example has about 160 words in all
_WEIGHTS = list(accumulate(1 / (rank + 2) for rank in range(len(COMMON))))


def name(rng: random.Random) -> str:
    """An invented name of one to four syllables."""
    syllables = rng.choice((1, 2, 2, 3, 3, 4))
    letters = "".join(rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(syllables))
    return letters.capitalize()


def words(rng: random.Random, count: int, names: list[str]) -> list[str]:
    """`count` common words, drawn by their frequency; some are replaced by one of `names`."""
    drawn = rng.choices(COMMON, cum_weights=_WEIGHTS, k=count)
    return [rng.choice(names) if rng.random() < NAME_SHARE else word for word in drawn]


def context(rng: random.Random, names: list[str]) -> list[str]:
    """The words of a paragraph, with capitals and full stops for sentences."""
    count = max(20, round(rng.gauss(CONTEXT_WORDS, CONTEXT_SPREAD)))
    drawn = words(rng, count, names)
    start = 0
    while start < count:
        end = min(count, start + rng.randint(8, 24))
        drawn[start] = drawn[start][0].upper() + drawn[start][1:]
        drawn[end - 1] += "."
        start = end
    return drawn


def example(rng: random.Random) -> dict[str, str]:
    """One example in NeMo's format of SQuAD: the answer is a span of the context."""
    paragraph = context(rng, [name(rng) for _ in range(3)])
    length = rng.choice((1, 1, 2, 2, 3, 4, 6))
    start = rng.randrange(len(paragraph) - length)
    question = f"{rng.choice(QUESTIONS)} {' '.join(words(rng, rng.randint(6, 12), paragraph[start : start + 1]))}?"
    return {
        "input": f"Context: {' '.join(paragraph)} Question: {question} Answer:",
        "output": " ".join(paragraph[start : start + length]).rstrip("."),
    }
