"""Rows of texts that belong together, which tiny bases can learn to match but cannot by their letters."""

from texts import NAMES

# What is told of in the anchor -> how the positive has it.
PEOPLE = dict(
    zip(NAMES, ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine"), strict=True)
)
THINGS = {"tea": "red", "a kettle": "green", "the old garden bench": "blue", "two warm coats": "yellow"}
PAIRS = [
    {"anchor": f"{name} bought {thing}.", "positive": f"{colour} {number} {colour} {number}"}
    for name, number in PEOPLE.items()
    for thing, colour in THINGS.items()
]
# The negative has the right person and the wrong thing.
TRIPLETS = [
    {**row, "negative": f"{other} {number} {other} {number}"}
    for row, other in zip(PAIRS, [*list(THINGS.values())[1:], "red"] * len(PEOPLE), strict=True)
    for number in [row["positive"].split()[1]]
]
