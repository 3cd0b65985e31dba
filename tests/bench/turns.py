"""Contestants take turns: each turn is a fresh process, one at a time, and the figures of a contestant are the medians over its turns.
In: contestants, each a name and an environment. Out: per contestant a dict of medians, or why it did not run; a table on the screen.
Next: train.py
"""

import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass

from nanomind.cli import ALLOCATOR


@dataclass(frozen=True)
class Contestant:
    name: str
    what: str  # for the table
    tuned: bool = True  # with the allocator's settings that our own commands start themselves with (nanomind/cli.py)


def chosen(parser, contestants, only):
    """Those that --only names, separated by commas; all when it names none."""
    names = [contestant.name for contestant in contestants]
    wanted = only.split(",") if only else names
    unknown = [name for name in wanted if name not in names]
    if unknown:
        parser.error(f"--only {','.join(unknown)}: expected {', '.join(names)}")
    return [contestant for contestant in contestants if contestant.name in wanted]


def alternate(script, contestants, rounds, flags):
    """Run `script --turn NAME flags` for every contestant, `rounds` times over, so that a machine that is busy for a while is busy for all.

    A turn prints one JSON object as its last line. -> {name: {figure: median} or {"missing": why}}.
    """
    results = {contestant.name: [] for contestant in contestants}
    plain = {name: value for name, value in os.environ.items() if name not in ALLOCATOR}
    for number in range(rounds):
        for contestant in contestants:
            if any("missing" in result for result in results[contestant.name]):
                continue
            environment = {**plain, **ALLOCATOR} if contestant.tuned else plain
            done = subprocess.run([sys.executable, str(script), "--turn", contestant.name, *flags], env=environment, capture_output=True, text=True)
            if done.returncode:
                lines = done.stderr.strip().splitlines() or ["no message"]
                results[contestant.name].append({"missing": lines[-1][:150]})
            else:
                results[contestant.name].append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(f"round {number + 1} {contestant.what}: {results[contestant.name][-1]}", file=sys.stderr, flush=True)
    return {name: next((result for result in turns if "missing" in result), None) or
            {figure: statistics.median(turn[figure] for turn in turns) for figure in turns[0]} for name, turns in results.items()}


def table(contestants, results, reference, columns):
    """Print a row per contestant and how many times its rate the contestant `reference` reaches. columns: {figure: (heading, format)}."""
    ours = results[reference].get("rate")
    headings = [heading for heading, _ in columns.values()] + [f"{reference} / this"]
    print("| " + " | ".join(["", *headings]) + " |\n|" + "---|" * (len(headings) + 1))
    for contestant in contestants:
        result = results[contestant.name]
        if "missing" in result:
            cells = [f"did not run: {result['missing']}"] + [""] * len(columns)
        else:
            cells = [form.format(result[figure]) for figure, (_, form) in columns.items()]
            cells.append(f"{ours / result['rate']:.2f}" if ours else "")
        print("| " + " | ".join([contestant.what, *cells]) + " |")
