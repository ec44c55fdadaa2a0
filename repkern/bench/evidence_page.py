"""docs/evidence.md: means, paired differences with their intervals, and what may be said about them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from repkern.bench.evidence import ARMS, COMPARED, INT8, QUESTION

__all__ = ["LEAST_PAIRS", "Comparison", "compare", "evidence_tables", "finding", "with_tables"]

#: With fewer pairs nothing is said about a difference.
LEAST_PAIRS = 5

Row = Mapping[str, str]


class Comparison(NamedTuple):
    """Of paired values: how many pairs, the mean difference, and half of its 95 % interval (NaN below two pairs)."""

    pairs: int
    mean: float
    half: float


def compare(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Comparison:
    """Differences of values with the same key (the seed), and Student's interval of their mean."""
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    count = len(differences)
    if count == 0:
        return Comparison(0, math.nan, math.nan)
    mean = math.fsum(differences) / count
    if count == 1:
        return Comparison(1, mean, math.nan)
    from scipy.stats import t

    deviation = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (count - 1))
    return Comparison(count, mean, float(t.ppf(0.975, count - 1)) * deviation / math.sqrt(count))


def finding(found: Comparison) -> str:
    """What a comparison shows, in words."""
    if found.pairs < LEAST_PAIRS:
        return f"{found.pairs} of {LEAST_PAIRS} pairs"
    if abs(found.mean) <= found.half:
        return "no difference seen"
    return "higher" if found.mean > 0 else "lower"


def with_tables(text: str, rows: Sequence[Row]) -> str:
    """The page with its tables drawn anew, each between two marks. ValueError when a mark is missing."""
    for name, arms in (("table", [row for arm in COMPARED for row in ARMS[arm].rows]), ("question", QUESTION)):
        begin, end = f"<!-- {name}: written by benchmarks/make_docs.py -->\n", f"<!-- end of {name} -->\n"
        if begin not in text or end not in text:
            raise ValueError(f"the page has no marks {begin.strip()} and {end.strip()}")
        head, rest = text.split(begin, 1)
        text = head + begin + evidence_tables(rows, arms) + "\n" + end + rest.split(end, 1)[1]
    return text


def evidence_tables(rows: Sequence[Row], arms: Sequence[str]) -> str:
    """A table for each setting and network: the arms of these names that have rows, if there are two."""
    text = ""
    for setting, network in dict.fromkeys((row["setting"], row["network"]) for row in rows):
        here = [row for row in rows if (row["setting"], row["network"]) == (setting, network)]
        present = [name for name in arms if any(row["arm"] == name for row in here)]
        lines = [_line(name, here, baseline) for name in present for baseline in _baselines(name, present)]
        if len(present) > 1:
            text += f"\n### {setting}: {network}\n\n{_table(_HEAD, lines)}\n{_origin(here)}\n"
    return text


def _origin(rows: Sequence[Row]) -> str:
    machines = dict.fromkeys(f"{row['cpu']}, threads: {row['threads']}, torch {row['torch']}" for row in rows)
    commits = dict.fromkeys(row["commit"] or "unknown" for row in rows)
    days = sorted(row["date"][:10] for row in rows)
    period = days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
    return f"{'; '.join(machines)}; {period}; commits {', '.join(commits)}."


_HEAD = ("arm", "seeds", "accuracy %", "difference to", "points (95 % interval)", "finding", "training", "memory")


def _baselines(name: str, present: Sequence[str]) -> list[str]:
    """What an arm is compared with: plain, INT8 with its own network; variants of OREPA and of its start with OREPA."""
    if name.endswith(INT8):
        return [name.removesuffix(INT8)]
    variant = name.startswith("OREPA, ") or name in QUESTION[2:]
    return ["plain", *(["OREPA"] if variant and "OREPA" in present else [])]


def _line(name: str, rows: Sequence[Row], baseline: str) -> list[str]:
    own = [row for row in rows if row["arm"] == name]
    accuracies = _by_seed(own)
    cells = [name, str(len(own)), f"{math.fsum(accuracies.values()) / len(accuracies):.2f}"]
    if name == baseline:
        cells += [""] * 3
    else:
        found = compare(accuracies, _by_seed([row for row in rows if row["arm"] == baseline]))
        cells += [baseline, _difference(found), finding(found)]
    return [*cells, _seconds(own), _mean(own, "peak_mib", "MiB")]


def _by_seed(rows: Iterable[Row]) -> dict[int, float]:
    return {int(row["seed"]): float(row["accuracy"]) for row in rows}


def _difference(found: Comparison) -> str:
    if found.pairs == 0:
        return ""
    return f"{found.mean:+.2f}" if math.isnan(found.half) else f"{found.mean:+.2f} ± {found.half:.2f}"


def _seconds(rows: Sequence[Row]) -> str:
    training, search = _mean(rows, "cpu_seconds", "s"), _mean(rows, "search_seconds", "s")
    return f"{training} + {search} search" if search else training


def _mean(rows: Sequence[Row], column: str, unit: str) -> str:
    values = [float(row[column]) for row in rows if row[column]]
    return f"{math.fsum(values) / len(values):.0f} {unit}" if values else ""


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"
