#!/usr/bin/env python3
"""Every table and figure of docs/results.md, made from the runs beside this file.

    python3 docs/results/make.py            # write the tables and the figures
    python3 docs/results/make.py --check    # fail if they are not what the runs give
    python3 docs/results/make.py --add NAME DIR   # take in the runs of `compare --out DIR`

A table stands between `<!-- made: NAME -->` and `<!-- end -->`, and is made by the function of that
name in TABLES; a figure NAME.svg by that in FIGURES. Python's standard library alone.
"""

import argparse
import json
import math
import os
import re
import statistics
import sys
from collections import defaultdict
from html import escape
from pathlib import Path

HERE = Path(__file__).resolve().parent
RUNS = HERE / "runs"
PAGE = HERE.parent / "results.md"

# Two-sided 95 % quantiles of Student's t, by degrees of freedom.
T95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]

# The methods of the paper's comparison, in the order of its table.
MAIN = [
    "standard",
    "gqa",
    "cla",
    "yoco",
    "fused-kv-lite-reversed",
    "fused-kv-lite",
    "fused-kv-lite-learnable",
    "fused-kv",
]


# ---- runs ------------------------------------------------------------------------------------------


class Run:
    """One training, as its `result.json` has it."""

    def __init__(self, path):
        self.path = path
        found = json.loads(path.read_text())
        config = found["config"]
        self.setting = path.parent.parent.relative_to(RUNS)
        self.method = found["method"]
        self.seed = config["seed"]
        self.rate = config["learning_rate"]
        self.std = config["model"]["init_std"]
        self.steps = config["steps"]
        self.tokens = found["tokens"]
        self.tokens_per_step = config["batch_size"] * config["context"]
        self.parameters = found["parameters"]
        self.cache = found["cache_bytes_per_token"]
        self.diverged = found["diverged"] is not None
        self.loss = math.nan if self.diverged else found["valid_loss"]
        self.repeats = {r["repeat"]: r for r in found["repeats"]}
        self.accuracy = found["accuracy"]
        # Per validation: tokens read, loss of the held-out windows, gradient norms by layer.
        self.curve = [
            (self.steps * e["epoch"] // config["epochs"] * self.tokens_per_step, e["valid"])
            for e in found["epochs"]
        ]
        self.norms = [e["gradient_norms"]["layers"] for e in found["epochs"]]
        self.rest = rest(config)


def rest(config):
    """What runs of one table have in common: all but the method, the seed and what is tuned."""
    config = json.loads(json.dumps(config))
    for key in ("seed", "learning_rate"):
        del config[key]
    for key in ("plan", "n_kv_heads", "init_std", "fusion_init", "ffn_size"):
        del config["model"][key]
    return json.dumps(config, sort_keys=True)


def load():
    """All runs, checked: those of one folder of RUNS are of one data set."""
    runs = [Run(path) for path in sorted(RUNS.glob("*/*/*/result.json"))]
    data = {}
    for run in runs:
        mark = json.loads((RUNS / run.setting / "comparison.json").read_text())["data"]
        task = run.setting.parts[0]
        if data.setdefault(task, mark) != mark:
            raise SystemExit(f"{run.path}: other data than the other runs of {task}")
    return runs


class Runs:
    """Runs that may stand in one table, by method, learning rate and initial deviation."""

    def __init__(self, runs, task, steps):
        chosen = [r for r in runs if r.setting.parts[0] == task and r.steps == steps]
        if len({r.rest for r in chosen}) > 1:
            raise SystemExit(f"runs of {task}, {steps} steps differ in more than what is compared")
        self.cells = defaultdict(dict)
        for run in chosen:
            seeds = self.cells[run.method, run.rate, run.std]
            if run.seed in seeds:
                raise SystemExit(f"{run.path}: a second run of this seed")
            seeds[run.seed] = run

    def rates(self, method, std=0.02):
        """Learning rate to runs by seed, ascending."""
        found = {r: s for (m, r, d), s in self.cells.items() if m == method and d == std}
        return dict(sorted(found.items()))

    def best_rate(self, method, std=0.02):
        """The rate of the lowest mean over the seeds that every rate has; none without runs.

        A rate at which a run diverged is not the best."""
        rates = self.rates(method, std)
        if not rates:
            return None
        shared = set.intersection(*(set(seeds) for seeds in rates.values()))
        means = {
            rate: statistics.mean(seeds[s].loss for s in shared)
            for rate, seeds in rates.items()
            if shared and not any(run.diverged for run in seeds.values())
        }
        return min(means, key=means.get) if means else None

    def at(self, method, rate, std=0.02):
        return self.cells.get((method, rate, std), {})


# ---- statistics ------------------------------------------------------------------------------------


def spread(values, digits=3):
    """`mean ± standard deviation` of the sample; of one value, the value."""
    if not values:
        return "–"
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values):.{digits}f}"


def interval(differences):
    """Mean of paired differences and the 95 % interval of Student's t around it."""
    n = len(differences)
    if n == 0:
        return "–"
    mean = statistics.mean(differences)
    if n == 1:
        return f"{mean:+.3f}"
    half = T95[n - 2] * statistics.stdev(differences) / math.sqrt(n)
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"


def paired(runs, base, value=lambda run: run.loss):
    """Differences to `base`, seed by seed, where both have it."""
    shared = [s for s in runs if s in base and not (runs[s].diverged or base[s].diverged)]
    return [value(runs[s]) - value(base[s]) for s in shared]


def finished(runs):
    return [run for run in runs.values() if not run.diverged]


# ---- tables ----------------------------------------------------------------------------------------


def table(heading, rows):
    lines = ["| " + " | ".join(heading) + " |", "|" + "---|" * len(heading)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def rate_name(rate):
    return f"{rate * 1e3:g}e-3"


# ---- figures ---------------------------------------------------------------------------------------

# Distinguishable without colour vision (Okabe and Ito), and by their dashes and marks.
COLOURS = ["#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F"]
DASHES = ["", "7 3", "2 3", "9 3 2 3"]


class Chart:
    """Axes with lines and points on them, as SVG."""

    WIDTH, HEIGHT = 860, 480
    LEFT, RIGHT, TOP, BOTTOM = 70, 230, 40, 60

    def __init__(self, title, x, y, xs, ys, log_x=False, x_ticks=None):
        """Titles of chart and axes, and ranges that all points are in."""
        self.log_x = log_x
        self.parts = []
        self.legend = []
        self.x_range = tuple(map(self.place, (min(xs), max(xs))))
        margin = 0.05 * (max(ys) - min(ys)) or 0.1
        self.y_range = (min(ys) - margin, max(ys) + margin)
        margin = 0.03 * (self.x_range[1] - self.x_range[0]) or 0.1
        self.x_range = (self.x_range[0] - margin, self.x_range[1] + margin)
        self.frame(title, x, y, x_ticks or ticks(min(xs), max(xs)))

    def place(self, x):
        return math.log(x) if self.log_x else x

    def x(self, value):
        low, high = self.x_range
        width = self.WIDTH - self.LEFT - self.RIGHT
        return self.LEFT + width * (self.place(value) - low) / (high - low)

    def y(self, value):
        low, high = self.y_range
        height = self.HEIGHT - self.TOP - self.BOTTOM
        return self.TOP + height * (high - value) / (high - low)

    def frame(self, title, x_title, y_title, x_ticks):
        left, bottom = self.LEFT, self.HEIGHT - self.BOTTOM
        right = self.WIDTH - self.RIGHT
        self.text((left + right) / 2, 24, title, size=15, anchor="middle")
        for tick in ticks(*self.y_range):
            y = self.y(tick)
            self.line([(left, y), (right, y)], "#DDDDDD", 1)
            self.text(left - 8, y + 4, f"{tick:g}", anchor="end")
        for tick in x_ticks:
            x = self.x(tick)
            self.line([(x, bottom), (x, bottom + 5)], "#000000", 1)
            self.text(x, bottom + 20, f"{tick:g}", anchor="middle")
        corners = [(left, self.TOP), (left, bottom), (right, bottom)]
        self.line(corners, "#000000", 1)
        self.text((left + right) / 2, self.HEIGHT - 14, x_title, anchor="middle")
        middle = (self.TOP + bottom) / 2
        self.text(18, middle, y_title, anchor="middle", turn=f"rotate(-90 18 {middle:.0f})")

    def text(self, x, y, text, size=13, anchor="start", turn=None):
        turn = f' transform="{turn}"' if turn else ""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"{turn}>'
            f"{escape(text)}</text>"
        )

    def line(self, points, colour, width=2, dash=""):
        dash = f' stroke-dasharray="{dash}"' if dash else ""
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(
            f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="{width}"{dash}/>'
        )

    def dot(self, x, y, colour, radius=3.5, hollow=False):
        fill = "#FFFFFF" if hollow else colour
        self.parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{fill}" stroke="{colour}"/>'
        )

    def curve(self, name, points, number, dots=()):
        """A line through points of the axes, a legend entry, and dots beside it."""
        colour = COLOURS[number % len(COLOURS)]
        dash = DASHES[number % len(DASHES)]
        places = [(self.x(x), self.y(y)) for x, y in points]
        self.line(places, colour, dash=dash)
        for x, y in dots:
            self.dot(self.x(x), self.y(y), colour, 2.5)
        self.legend.append((places[-1][1], name, colour, dash))

    def svg(self):
        x = self.WIDTH - self.RIGHT + 16
        # In the order in which the lines end.
        for row, (_, name, colour, dash) in enumerate(sorted(self.legend, key=lambda e: e[0])):
            y = self.TOP + 12 + 20 * row
            self.line([(x, y), (x + 30, y)], colour, dash=dash)
            self.text(x + 38, y + 4, name)
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.WIDTH} {self.HEIGHT}"'
            f' width="{self.WIDTH}" height="{self.HEIGHT}" font-family="sans-serif">'
        )
        back = f'<rect width="{self.WIDTH}" height="{self.HEIGHT}" fill="#FFFFFF"/>'
        return "\n".join([head, back, *self.parts, "</svg>"]) + "\n"


def ticks(low, high):
    """About six round numbers."""
    span = high - low
    step = 10 ** math.floor(math.log10(span / 5))
    step = next(step * m for m in (1, 2, 5, 10) if span / (step * m) <= 7)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(n * step, 10) for n in range(first, last + 1)]
