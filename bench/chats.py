"""Write conversations for a benchmark: most of their tokens have a loss, as in instruction data. Out: a JSONL file.

    python bench/chats.py FILE [--count 3000]

The text is random words. A conversation has one to four turns. A question has 5 to 60 words, an answer 40 to 400, evenly
spread. The same count writes the same file.
"""

import argparse
import json
import random
from pathlib import Path

QUESTION, ANSWER, TURNS = (5, 60), (40, 400), (1, 4)
WORDS = (
    "the",
    "of",
    "and",
    "model",
    "data",
    "layer",
    "token",
    "weight",
    "loss",
    "step",
    "time",
    "rate",
    "batch",
    "node",
    "link",
)


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--count", type=int, default=3000)
    options = parser.parse_args()
    source = random.Random(0)
    options.file.parent.mkdir(parents=True, exist_ok=True)
    with options.file.open("w") as file:
        for _ in range(options.count):
            file.write(json.dumps({"messages": _conversation(source)}) + "\n")


def _conversation(source: random.Random) -> list[dict[str, str]]:
    messages = []
    for _ in range(source.randint(*TURNS)):
        messages.append({"role": "user", "content": _text(source, *QUESTION)})
        messages.append({"role": "assistant", "content": _text(source, *ANSWER)})
    return messages


def _text(source: random.Random, least: int, most: int) -> str:
    return " ".join(source.choices(WORDS, k=source.randint(least, most)))


if __name__ == "__main__":
    main()
