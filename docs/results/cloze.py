#!/usr/bin/env python3
"""What a model still knows and finds again: endings chosen among four, for docs/conversion.md.

    python3 docs/results/cloze.py SCORE MODEL FILE

SCORE is the example `score` as built. Every text is scored with each of its endings, and the ending
that makes it likeliest is the model's choice; chance is a quarter. FILE gets the right choices of each
kind, as JSON. Python's standard library alone.
"""

import json
import os
import random
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from make import write

# The first ending is the right one.
KNOWN = [
    ("The capital of France is", ["Paris", "London", "Madrid", "Rome"]),
    ("The capital of Japan is", ["Tokyo", "Beijing", "Seoul", "Bangkok"]),
    ("The capital of Italy is", ["Rome", "Berlin", "Athens", "Vienna"]),
    ("The capital of Egypt is", ["Cairo", "Nairobi", "Lagos", "Tunis"]),
    ("Water freezes and becomes", ["ice", "wood", "sand", "smoke"]),
    ("Fire is hot, and snow is", ["cold", "loud", "sweet", "tall"]),
    ("At night the sky is", ["dark", "green", "square", "wet"]),
    ("The sun rises in the", ["east", "north", "kitchen", "evening"]),
    ("A baby cat is called a", ["kitten", "puppy", "calf", "chick"]),
    ("A baby dog is called a", ["puppy", "kitten", "lamb", "foal"]),
    ("Bees make", ["honey", "milk", "bread", "paper"]),
    ("Cows give", ["milk", "wool", "honey", "eggs"]),
    ("Hens lay", ["eggs", "bricks", "milk", "roads"]),
    ("Fish live in the", ["water", "trees", "desert", "fire"]),
    ("Birds fly with their", ["wings", "tails", "feet", "ears"]),
    ("We see with our", ["eyes", "hands", "knees", "hair"]),
    ("We hear with our", ["ears", "teeth", "feet", "eyes"]),
    ("The heart pumps", ["blood", "air", "sand", "light"]),
    ("There are seven days in a", ["week", "year", "minute", "month"]),
    ("There are twelve months in a", ["year", "week", "day", "hour"]),
    ("There are sixty seconds in a", ["minute", "week", "year", "day"]),
    ("The day after Monday is", ["Tuesday", "Friday", "Sunday", "Saturday"]),
    ("The month after January is", ["February", "October", "July", "December"]),
    ("One, two, three, four,", ["five", "nine", "two", "eleven"]),
    ("Two plus two is", ["four", "seven", "nine", "thirty"]),
    ("The opposite of up is", ["down", "over", "blue", "fast"]),
    ("The opposite of hot is", ["cold", "warm", "red", "dry"]),
    ("The opposite of old is", ["young", "tall", "slow", "grey"]),
    ("Grass is usually", ["green", "purple", "white", "orange"]),
    ("A banana is", ["yellow", "blue", "black", "silver"]),
    ("The planet closest to the Sun is", ["Mercury", "Saturn", "Neptune", "Jupiter"]),
    ("The largest planet of the Solar System is", ["Jupiter", "Mars", "Venus", "Mercury"]),
    ("Romeo and Juliet was written by William", ["Shakespeare", "Newton", "Lincoln", "Wallace"]),
    ("The first president of the United States was George", ["Washington", "Bush", "Harrison", "Clooney"]),
    ("Albert Einstein was a famous", ["physicist", "boxer", "painter", "sailor"]),
    ("Plants need water and", ["sunlight", "money", "music", "glass"]),
    ("A doctor works in a", ["hospital", "forest", "bakery", "mine"]),
    ("Children learn to read at", ["school", "sea", "war", "midnight"]),
    ("The boy was hungry, so he ate a", ["sandwich", "chair", "river", "song"]),
    ("It was raining, so she took her", ["umbrella", "sunglasses", "piano", "ladder"]),
]

THINGS = ["ship", "village", "horse", "inn", "street", "river", "school", "garden"]
NAMES = ["Aurora", "Bramble", "Cordelia", "Dunmore", "Elmstead", "Falcon", "Greyfriars", "Hollow"]
FILLER = [
    "The road went on through fields and small woods.",
    "In the afternoon a light wind came up from the river.",
    "Somebody had left a newspaper on the bench by the door.",
    "The shops in the main street were already closed.",
    "There was a smell of fresh bread from the house at the corner.",
    "An old clock on the tower struck the hour, a little late.",
    "The children had gone home, and the square was quiet again.",
    "A train could be heard far away, and then nothing more.",
]
# Sentences between what is said and what is asked.
DISTANCES = [0, 8, 24]
ITEMS_PER_DISTANCE = 16


def recall(sentences):
    """A thing and its name, something else, and the question how it is called: a name out of four, of which
    only the right one was mentioned."""
    draw = random.Random(sentences)
    for _ in range(ITEMS_PER_DISTANCE):
        thing, names = draw.choice(THINGS), draw.sample(NAMES, 4)
        said = f"The name of the {thing} was"
        between = [draw.choice(FILLER) for _ in range(sentences)]
        yield " ".join([f"{said} {names[0]}.", *between, said]), names


def main():
    program, model, out = sys.argv[1:]
    kinds = {"known": KNOWN} | {f"recall, {d} sentences": list(recall(d)) for d in DISTANCES}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:

        def nll(place, text):
            file = Path(folder, f"{place}.txt")
            file.write_text(text)
            command = [program, "--model", model, "--text", file]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            tokens = int(re.search(r"tokens scored\s+(\d+)", printed)[1])
            return tokens * float(re.search(r"log-likelihood\s+([\d.]+)", printed)[1])

        def right(place, item):
            text, endings = item
            losses = [nll(f"{place}-{i}", f"{text} {ending}.") for i, ending in enumerate(endings)]
            return min(losses) == losses[0]

        found = {}
        for kind, items in kinds.items():
            chosen = list(pool.map(right, range(len(items)), items))
            found[kind] = {"right": sum(chosen), "of": len(items)}
            print(kind, found[kind], flush=True)
    write(Path(out), json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
