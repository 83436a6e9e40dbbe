#!/usr/bin/env python3
"""Every table and figure of docs/results.md and docs/conversion.md, made from what lies beside this file.

    python3 docs/results/make.py            # write the tables and the figures
    python3 docs/results/make.py --check    # fail if they are not what the runs give
    python3 docs/results/make.py --add NAME DIR   # take in the runs of `compare --out DIR`

A table stands between `<!-- made: NAME -->` and `<!-- end -->`, and `made` makes it, the figures and
their links. Python's standard library alone.
"""

import argparse
import json
import math
import os
import random
import re
import statistics
import sys
from collections import defaultdict
from html import escape
from pathlib import Path

HERE = Path(__file__).resolve().parent
RUNS = HERE / "runs"
CONVERSION = HERE / "conversion"
DISTILLATION = HERE / "distillation"
CLOZE = HERE / "cloze"
# What the bench `inference` measured of the converted models.
TIMES = HERE / "converted.json"
PAGE = HERE.parent / "results.md"
CONVERSION_PAGE = HERE.parent / "conversion.md"

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
        self.name = f"{rate_name(config['learning_rate'])}/{self.method}/{self.seed}"
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
        # Per validation: tokens read, loss of the held-out windows.
        self.curve = [
            (self.steps * e["epoch"] // config["epochs"] * self.tokens_per_step, e["valid"])
            for e in found["epochs"]
        ]
        self.rest = rest(config)

    def halfway(self):
        """The loss when half of the tokens were read."""
        half = self.steps * self.tokens_per_step / 2
        return next((loss for tokens, loss in self.curve if tokens == half), math.nan)


def rest(config):
    """What runs of one table have in common: all but the method, the seed and what is tuned."""
    config = json.loads(json.dumps(config))
    for key in ("seed", "learning_rate"):
        del config[key]
    for key in ("plan", "n_kv_heads", "init_std", "fusion_init", "ffn_size"):
        del config["model"][key]
    # What is not set is as it was before there was anything to set.
    for part in (config, config["model"]):
        for key in [key for key, value in part.items() if value is None]:
            del part[key]
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
        """The rate of the lowest mean, of those with as many seeds as any has; none without runs.

        A rate at which a run diverged is not the best."""
        rates = self.rates(method, std)
        most = max(map(len, rates.values()), default=0)
        means = {
            rate: statistics.mean(run.loss for run in seeds.values())
            for rate, seeds in rates.items()
            if len(seeds) == most and not any(run.diverged for run in seeds.values())
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


def over_documents(runs, base, documents):
    """The 95 % interval of the mean difference to `base` were other documents held out: percentiles
    over documents drawn again, those of one draw for every seed. Empty without their losses."""
    if documents is None:
        return ""
    found = documents["runs"]
    pairs = [(found.get(r.name), found.get(base[s].name)) for s, r in runs.items() if s in base]
    if not pairs or any(None in pair for pair in pairs):
        return ""
    targets = documents["targets"]
    sums = [statistics.mean(ours[d] - theirs[d] for ours, theirs in pairs) for d in range(len(targets))]
    draw = random.Random(0)
    means = []
    for _ in range(10000):
        drawn = draw.choices(range(len(targets)), k=len(targets))
        means.append(sum(sums[d] for d in drawn) / sum(targets[d] for d in drawn))
    cuts = statistics.quantiles(means, n=40)
    return f"[{cuts[0]:+.3f}, {cuts[-1]:+.3f}]"


def finished(runs):
    return [run for run in runs.values() if not run.diverged]


# ---- tables ----------------------------------------------------------------------------------------


def table(heading, rows):
    """None of no rows."""
    if not rows:
        return None
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
        # Another with each round of the colours, so that no two lines look alike.
        dash = DASHES[(number + number // len(COLOURS)) % len(DASHES)]
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


def drawn(title, x, y, curves, **axes):
    """A chart of curves by name, each the points of a line and dots beside it."""
    points = [p for line, dots in curves.values() for p in [*line, *dots]]
    chart = Chart(title, x, y, [x for x, _ in points], [y for _, y in points], **axes)
    for number, (name, (line, dots)) in enumerate(curves.items()):
        chart.curve(name, line, number, dots)
    return chart.svg()


def ticks(low, high):
    """About six round numbers."""
    span = high - low
    step = 10 ** math.floor(math.log10(span / 5))
    step = next(step * m for m in (1, 2, 5, 10) if span / (step * m) <= 7)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(n * step, 10) for n in range(first, last + 1)]


# ---- the page --------------------------------------------------------------------------------------

STEPS = 300  # 0.61 million tokens
LONG = 3000  # 6.1 million

# Where there are no runs for a table.
NOTHING = "*No runs of this yet.*"

# Plans of controls.json, and n of Lite at its least.
CONTROLS = [
    "fused-kv-lite:n=1",
    "own-keys-v1",
    "own-values-k1",
    "own-keys-v1-top",
    "own-keys-v2-top",
    "own-keys-v3-top",
    "own-keys-v4-top",
    "value-residual-0",
    "value-residual-0.5",
    "value-residual-1",
    "key-residual-1",
]


def tuned(runs, method):
    """The runs of a method at its best rate; of one that was not tuned, at the rate it has."""
    rate = runs.best_rate(method)
    return rate, runs.at(method, rate)


def rates_table(runs):
    """Validation loss by learning rate and initial deviation; the best of each row is bold."""
    deviations = sorted({d for _, _, d in runs.cells})
    methods = [(m, d) for m in MAIN for d in deviations if runs.rates(m, d)]
    rates = sorted({rate for m, d in methods for rate in runs.rates(m, d)})
    rows = []
    for method, deviation in methods:
        found = runs.rates(method, deviation)
        best = runs.best_rate(method, deviation)
        cells = [method, f"{deviation:g}"]
        for rate in rates:
            seeds = found.get(rate, {})
            losses = [run.loss for run in finished(seeds)]
            cell = f"{spread(losses)} ({len(losses)})" if losses else "–"
            if len(losses) < len(seeds):
                cell += f", {len(seeds) - len(losses)} diverged"
            cells.append(f"**{cell}**" if rate == best else cell)
        tried = list(found)
        cells.append("no" if best in (None, tried[0], tried[-1]) else "yes")
        rows.append(cells)
    return table(["method", "init_std", *map(rate_name, rates), "bracketed"], rows)


def comparison(runs, methods, documents):
    """Losses of methods, each at its best rate, and paired differences to standard; none of one."""
    _, base = tuned(runs, "standard")
    rows = []
    for method in methods:
        rate, found = tuned(runs, method)
        if not found:
            continue
        losses = [run.loss for run in finished(found)]
        some = next(iter(found.values()))
        rows.append(
            [
                method,
                f"{rate_name(rate)} of {sum(len(s) == len(found) for s in runs.rates(method).values())}",
                len(losses),
                spread(losses),
                spread([math.exp(loss) for loss in losses], 1),
                "" if found is base else interval(paired(found, base)),
                "" if found is base else over_documents(found, base, documents),
                "" if found is base else interval(paired(found, base, Run.halfway)),
                some.parameters,
                some.cache,
            ]
        )
    heading = ["method", "rate, of those with as many seeds", "seeds", "validation loss", "perplexity"]
    heading += ["difference to standard [95 %]", "over documents", "halfway"]
    heading += ["parameters", "cache bytes/token"]
    return table(heading, rows if len(rows) > 1 else [])


def against_table(corpora):
    """Differences of FusedKV to the methods with as large a cache, by the name of a corpus."""
    others = ["gqa", "cla", "yoco", "fused-kv-lite"]
    rows = []
    for other in others:
        found = [paired(tuned(runs, "fused-kv")[1], tuned(runs, other)[1]) for runs in corpora.values()]
        if any(found):
            rows.append([other, *(cell for d in found for cell in (len(d), interval(d)))])
    heading = ["FusedKV minus"]
    for name in corpora:
        heading += ["seeds", f"{name} [95 %]"]
    return table(heading, rows)


def repeats_table(runs, methods):
    """Differences to standard, by what the window held of the target before."""
    _, base = tuned(runs, "standard")
    if not finished(base):
        return None
    kinds = ["pair", "token", "none"]
    rows = []
    for method in methods:
        _, found = tuned(runs, method)
        found = {s: r for s, r in found.items() if r.repeats}
        if not found:
            continue
        cells = [method, len(found)]
        for kind in kinds:
            loss = lambda run, kind=kind: run.repeats[kind]["loss"]
            if method == "standard":
                cells.append(spread([loss(run) for run in finished(found)]))
            else:
                cells.append(interval(paired(found, base, loss)))
        rows.append(cells)
    if not rows:
        return None
    targets = {k: r["targets"] for k, r in next(iter(base.values())).repeats.items()}
    total = sum(targets.values())
    heading = ["method", "seeds"] + [f"{k} ({100 * targets[k] / total:.0f} %)" for k in kinds]
    return table(heading, rows)


def loss_figure(runs):
    """Mean validation loss over the tokens read, each method at its best rate; of methods with two
    seeds at least, and none of fewer than two methods."""
    curves = {}
    for method in MAIN:
        _, found = tuned(runs, method)
        done = finished(found)
        if len(done) > 1:
            points = zip(*(run.curve for run in done))
            means = [(p[0][0] / 1e6, statistics.mean(loss for _, loss in p)) for p in points]
            dots = [(run.curve[-1][0] / 1e6, run.loss) for run in done]
            curves[f"{method} ({len(done)})"] = (means, dots)
    if len(curves) < 2:
        return None
    title = "Validation loss over training (number of seeds; dots: each seed's end)"
    return drawn(title, "tokens read, millions", "validation loss, nats per token", curves)


def rates_figure(runs):
    """Validation loss by learning rate; dots are runs. Of methods with two seeds at three rates at
    least, and none of fewer than two methods."""
    curves = {}
    for method in MAIN:
        rates = runs.rates(method)
        if sum(len(finished(seeds)) > 1 for seeds in rates.values()) > 2:
            dots = [(r * 1e3, run.loss) for r, s in rates.items() for run in finished(s)]
            means = [
                (r * 1e3, statistics.mean(run.loss for run in finished(s)))
                for r, s in rates.items()
                if finished(s)
            ]
            curves[method] = (means, dots)
    if len(curves) < 2:
        return None
    return drawn(
        "Validation loss by learning rate (dots: runs; lines: their means)",
        "highest learning rate, 1e-3",
        "validation loss, nats per token",
        curves,
        log_x=True,
        x_ticks=sorted({x for _, dots in curves.values() for x, _ in dots}),
    )


def documents_of(task, name="documents"):
    """Losses by held-out document, as documents.py found them; None if it has not been run."""
    path = RUNS / task / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def made():
    """What stands between the marks of the page, and the figures: text by name."""
    found = load()
    runs, longer = Runs(found, "kernel", STEPS), Runs(found, "kernel", LONG)
    prose = Runs(found, "prose", STEPS)
    documents = documents_of("kernel")
    tables = {
        "rates": rates_table(runs),
        "main": comparison(runs, MAIN, documents),
        "controls": comparison(runs, ["standard", *CONTROLS], documents),
        "repeats": repeats_table(runs, MAIN + CONTROLS),
        "prose": comparison(prose, MAIN, documents_of("prose")),
        "prose-repeats": repeats_table(prose, MAIN),
        "against": against_table({"first corpus": runs, "second corpus": prose}),
        "long": comparison(longer, MAIN, documents_of("kernel", "documents-long")),
        "long-rates": rates_table(longer),
        "long-repeats": repeats_table(longer, MAIN),
        "long-against": against_table({"ten times as long": longer}),
    }
    blocks = {name: text or NOTHING for name, text in tables.items()}
    figures = {}
    for block, title, name, svg in [
        ("rates", "validation loss by learning rate", "rates", rates_figure(runs)),
        ("main", "validation loss over training", "loss", loss_figure(runs)),
        ("long", "validation loss over longer training", "loss-long", loss_figure(longer)),
    ]:
        if svg:
            figures[name] = svg
            blocks[block] += f"\n\n![{title}](results/{name}.svg)"
    return blocks, figures


# ---- conversion ------------------------------------------------------------------------------------


# The report whose layers are shown one by one.
LAYERS = "fused_kv-15-of-65536"


def plan_name(plan):
    """The method; the custom plans of these reports were chosen by `--plan auto`."""
    return "auto" if plan["method"] == "custom" else plan["method"]


def storing(plan, layers):
    """Layers that keep keys and values under a plan of so many layers."""
    if "layers" in plan:
        return sum("store" in layer for layer in plan["layers"])
    return -(-layers // plan["factor"]) if "factor" in plan else plan["storage_layers"]


def stored(report):
    """Layers that keep keys and values, of how many."""
    layers = 1 + max(fit["layer"] for stage in report["stages"] for fit in stage.get("layers", []))
    return storing(report["plan"], layers), layers


def conversion_table(reports):
    """Perplexity after each stage; the fewer layers store, the higher."""
    found = sorted(reports.items(), key=lambda item: (stored(item[1]), item[0]))
    rows = []
    for name, report in found:
        after = {stage["stage"]: stage["perplexity"] for stage in report["stages"]}
        kept, layers = stored(report)
        cells = [f"{after[s]:.1f}" if s in after else "–" for s in ("weights", "blends", "layers")]
        read = [report["calibration_tokens"], report["held_out_tokens"]]
        read.append(f"{report['standard_perplexity']:.1f}")
        rows.append([plan_name(report["plan"]), f"{kept} of {layers}", *read, *cells])
    heading = ["plan", "layers that store", "tokens fitted on", "tokens scored", "standard"]
    return table(heading + ["weights", "blends", "layers"], rows)


def layers_table(report):
    """What each layer's two fits did to the residual stream."""
    fits = next(stage["layers"] for stage in report["stages"] if stage["stage"] == "layers")
    rows = [
        [fit["layer"] + 1]
        + [f"{fit[half][when]:.3f}" for half in ("attention", "feed_forward") for when in ("before", "after")]
        for fit in fits
    ]
    heading = ["layer", "after attention", "fitted", "after feed-forward", "fitted"]
    return table(heading, rows)


def made_conversion():
    """What stands between the marks of the page on conversion. Reports of one table are of one text."""
    paths = sorted(CONVERSION.glob("*.json"))
    reports = {path.stem: json.loads(path.read_text()) for path in paths}
    distilled = {p.stem: json.loads(p.read_text()) for p in sorted(DISTILLATION.glob("*.json"))}
    texts = {(r["scored_tokens"], r["teacher_perplexity"]) for r in distilled.values()}
    if len(texts) > 1:
        raise SystemExit(f"reports in {DISTILLATION} are of different texts or teachers: {texts}")
    contexts = {r["context"] for r in reports.values()}
    scored = {(r["held_out_tokens"], r["standard_perplexity"]) for r in reports.values()}
    if len(contexts) > 1 or len(scored) > len(dict(scored)):
        raise SystemExit(f"reports in {CONVERSION} are of different texts: {contexts}, {scored}")
    blocks = {
        "stages": conversion_table(reports) or NOTHING,
        "plans": plans_table(reports, distilled),
        "layers": layers_table(reports[LAYERS]) if LAYERS in reports else NOTHING,
        "distilled": distillation_table(distilled) or NOTHING,
        "cloze": cloze_table(),
    }
    figures = {}
    if svg := distillation_figure(distilled):
        figures["distillation"] = svg
        blocks["distilled"] += "\n\n![perplexity while distilling](results/distillation.svg)"
    return blocks, figures


def endings(model):
    """Right endings of a model, as cloze.py found them: the known, and names found again."""
    path = CLOZE / f"{model}.json"
    if not path.exists():
        return ["–", "–"]
    found = json.loads(path.read_text())
    count = lambda kinds, key: sum(found[kind][key] for kind in kinds)
    groups = [["known"], [kind for kind in found if kind.startswith("recall")]]
    return [f"{count(kinds, 'right')} of {count(kinds, 'of')}" for kinds in groups]


def plans_table(reports, distilled):
    """Plans of one model beside each other: what they save, and what is left of the model."""
    cases = {case["method"]: case for case in json.loads(TIMES.read_text())["cases"]}
    layers = next(iter(distilled.values()))["config"]["model"]["n_layers"]
    rows = []
    for name, case in cases.items():
        fits = [report for file, report in reports.items() if file.startswith(f"{name}-of-")]
        fitted = max(fits, key=lambda report: report["calibration_tokens"], default=None)
        taught = distilled.get(f"{name}-all-102k")
        row = [name.rsplit("-", 1)[0], f"{stored(fitted)[0] if fitted else layers} of {layers}"]
        row.append(f"{case['cache_bytes'] / 2**20:.1f}")
        row += [f"{case['ttft_s']:.2f} ({case['ttft_ratio']:.2f})"]
        row += [f"{case['tpot_s'] * 1e3:.1f} ({case['tpot_ratio']:.2f})"]
        last = fitted["stages"][-1]["perplexity"] / fitted["standard_perplexity"] if fitted else 1
        row += [f"{last:.2f}", *endings(name)]
        after = taught and taught["curve"][-1]["perplexity"] / taught["teacher_perplexity"]
        row += [f"{after:.2f}" if taught else "–", *endings(f"{name}-all-102k")]
        rows.append(row)
    heading = ["plan", "layers that store", "cache MiB", "TTFT s", "TPOT ms"]
    for when in ["fitted", "distilled"]:
        heading += [when, f"known, {when}", f"recall, {when}"]
    return table(heading, rows)


def cloze_table():
    """Right endings by model, as cloze.py found them."""
    # By file, and how it is named in the table.
    models = {
        "standard": "standard",
        "auto-15-all-102k": "auto, 15 of 30, all distilled on 102 thousand",
        "auto-15": "auto, 15 of 30, fitted on 65536 tokens",
        "fused_kv_lite-15-all-102k": "fused_kv_lite, 15 of 30, all distilled on 102 thousand",
        "cla-15": "cla, 15 of 30, fitted on 65536 tokens",
        "auto-10-all-102k": "auto, 10 of 30, all distilled on 102 thousand",
        "auto-10": "auto, 10 of 30, fitted on 32768 tokens",
        "fused_kv-24": "fused_kv, 24 of 30, fitted on 8192 tokens",
        "fused_kv-20-all-410k": "fused_kv, 20 of 30, all distilled on 410 thousand",
        "fused_kv-20-41k": "fused_kv, 20 of 30, reusing layers distilled on 41 thousand",
        "fused_kv-15": "fused_kv, 15 of 30, fitted on 65536 tokens",
        "fused_kv-15-all-410k": "fused_kv, 15 of 30, all distilled on 410 thousand",
        "fused_kv-15-all-102k": "fused_kv, 15 of 30, all distilled on 102 thousand",
        "fused_kv-15-123k": "fused_kv, 15 of 30, reusing layers distilled on 123 thousand",
        "fused_kv-15-1024k": "fused_kv, 15 of 30, reusing layers distilled on 1024 thousand",
    }
    found = {name: json.loads((CLOZE / f"{file}.json").read_text()) for file, name in models.items()}
    kinds = list(found["standard"])
    rows = [[name, *(f"{of[kind]['right']} of {of[kind]['of']}" for kind in kinds)] for name, of in found.items()]
    return table(["model", *kinds], rows)


def distillation_name(report):
    model = report["config"]["model"]
    plan = model["plan"]
    return f"{plan_name(plan)}, {storing(plan, model['n_layers'])} of {model['n_layers']}"


def what_trains(report):
    """All of the model, if a run's settings do not say what does."""
    trainable = report["config"]["trainable"] or "all"
    return trainable if isinstance(trainable, str) else ", ".join(trainable)


def distillation_table(reports):
    """Perplexity before and after, and beside the teacher's; the fewer tokens, the higher."""
    key = lambda r: (
        distillation_name(r),
        what_trains(r) == "all",
        r["curve"][-1]["tokens"],
        -r["curve"][-1]["perplexity"],
    )
    rows = []
    for report in sorted(reports.values(), key=key):
        config, curve, teacher = report["config"], report["curve"], report["teacher_perplexity"]
        tokens, after = curve[-1]["tokens"], curve[-1]["perplexity"]
        rate = f"{config['learning_rate']:.0e}".replace("e-0", "e-")
        row = [distillation_name(report), what_trains(report), config["batch_size"], rate, tokens]
        row.append(f"{tokens / report['text_tokens']:.2f}")
        row += [f"{x:.1f}" for x in (teacher, curve[0]["perplexity"], after)]
        rows.append([*row, f"{after / teacher:.2f}"])
    heading = ["student, layers that store", "layers that train", "windows a step"]
    heading += ["learning rate", "tokens read", "passes over the text"]
    heading += ["teacher", "before", "after", "after / teacher"]
    return table(heading, rows)


def distillation_figure(reports):
    """Perplexity over the tokens read; of reports of one model and what trains the longest."""
    if not reports:
        return None
    curves = {}
    for report in sorted(reports.values(), key=lambda r: r["curve"][-1]["tokens"]):
        points = [(p["tokens"] / 1e3, p["perplexity"]) for p in report["curve"]]
        name = distillation_name(report).replace(", ", " ").replace(" of ", "/")
        curves[f"{name}, {what_trains(report)}"] = (points, points)
    most = max(x for points, _ in curves.values() for x, _ in points)
    teacher = next(iter(reports.values()))["teacher_perplexity"]
    curves["teacher"] = ([(0, teacher), (most, teacher)], [])
    title = "Perplexity of held-out text while distilling, by plan and the layers that train"
    return drawn(title, "tokens read, thousands", "perplexity", curves)


# ---- files -----------------------------------------------------------------------------------------

BLOCK = re.compile(r"<!-- made: (\S+) -->\n.*?<!-- end -->", re.DOTALL)


def page(path, blocks):
    """A page with its tables made anew."""
    text = path.read_text()
    named = [match[1] for match in BLOCK.finditer(text)]
    if sorted(named) != sorted(blocks):
        raise SystemExit(f"{path} has the tables {named}; expected {list(blocks)}, each once")
    block = lambda match: f"<!-- made: {match[1]} -->\n\n{blocks[match[1]]}\n\n<!-- end -->"
    return BLOCK.sub(block, text)


def write(path, text):
    """Whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def add(name, directory):
    """Takes in the finished runs of a comparison, without what the page has no use for."""
    for path in sorted(directory.glob("runs/*/result.json")):
        result = json.loads(path.read_text())
        # Speeds beside other programs say nothing.
        del result["tokens_per_second"]
        target = RUNS / name / path.parent.name
        target.mkdir(parents=True, exist_ok=True)
        write(target / "result.json", json.dumps(result, indent=1) + "\n")
    mark = json.loads((directory / "comparison.json").read_text())
    write(RUNS / name / "comparison.json", json.dumps(mark, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail if it differs")
    parser.add_argument("--add", nargs=2, metavar=("NAME", "DIR"), help="take in runs")
    args = parser.parse_args()
    if args.add:
        add(args.add[0], Path(args.add[1]))
        return
    blocks, figures = made()
    converted, more = made_conversion()
    figures |= more
    files = {PAGE: page(PAGE, blocks), CONVERSION_PAGE: page(CONVERSION_PAGE, converted)}
    files |= {HERE / f"{name}.svg": text for name, text in figures.items()}
    differing = [p for p, text in files.items() if not p.exists() or p.read_text() != text]
    unmade = sorted(set(HERE.glob("*.svg")) - set(files))
    if unmade:
        raise SystemExit(f"no runs make {', '.join(map(str, unmade))}")
    if args.check:
        if differing:
            names = ", ".join(str(path) for path in differing)
            raise SystemExit(f"not what the runs give: {names}; python3 docs/results/make.py")
        return
    for path in differing:
        write(path, files[path])
        print(path)


if __name__ == "__main__":
    main()
