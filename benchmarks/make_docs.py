"""Write docs/performance.md, docs/backends.md and the tables of docs/evidence.md from results/*.csv.

--check: exit code 1 when they are stale.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from repkern.bench.equivalence import BOUNDS
from repkern.bench.evidence import read_evidence
from repkern.bench.evidence_page import with_tables
from repkern.bench.results import read_rows
from repkern.bench.targets import accuracy_targets

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs"
EVIDENCE = "evidence.csv"
NOTICE = "<!-- Written by benchmarks/make_docs.py from benchmarks/results. Do not edit. -->\n"
Row = dict[str, str]

PERFORMANCE_HEAD = """# Performance

Every row was checked against the float64 reference before it was timed. Times are medians; ratios are medians over
neighbouring samples of one run (A B A B …), with the 20th and 80th percentile in brackets. "eager" is the published
multi-branch formulation written in torch calls, "compile" the same under `torch.compile` (a compiled function a layer).
"conv2d" is the convolution that the kernel feeds (batch 32, a ResNet's feature map size): ours costs that much less.
Percent of peak refers to the fastest large matrix product or convolution of torch, timed in turn with ours. That is a
lower bound of the FMA peak, which a clock above the nominal one raises: an "ok" against it does not prove the target.
Commits with "+" had uncommitted changes. How to measure again: benchmarks/README.md.
"""
BLOCKS_HEAD = """### Multi-branch blocks

A training step (forward, loss, backward, SGD with momentum) of a network of our blocks; ratio to the same network with
a torch module per convolution and norm; "recompute" is `recompute="cheap"`. Gradients were compared in float64 and
float32 first; a DBB then pads as the published one does, and is timed as it is by default. "kept for the backward" is
what the forward leaves allocated, "peak" the most of a step, parameters and momenta included.
"""
CONV_HEAD = """### 3x3 convolutions

Stride 1, padding 1, one layer by itself; the fastest of our methods, against the faster memory format of torch.conv2d
(oneDNN) and against ncnn's Winograd convolution with packed maps. "warm" calls the same weights again and again, which
the targets are about; "cold" has many copies of them in turn, so that they come from beyond the level-2 cache as in a
network. "dispatched" is what a network's layer would use, torch's own included ("layer": called as there). Methods were
chosen in samples of their own before.
"""
INFER_HEAD = """### Inference of deployed networks

Logits of a whole network with the same weights, float32, everybody with the same threads and in a process of its own,
sampled in turn; ratio of each to `repkern.optimize_for_inference`. "last" has maps in channels_last; torch.compile
freezes weights and searches longest. Memory is the resident peak of inference over the imports, of ours and of torch.
"""
ACCURACY_HEAD = """### Accuracy of deployed networks

Random images through networks with calibrated random weights, against the same weights in float64: relative L2 errors,
and how many images keep their top-1 class (`python benchmarks/accuracy.py`).
"""
OPTIMIZER_HEAD = """### RepOptimizers

A step of the optimizer alone, multipliers on every convolution, against torch's fused optimizers without any and
against the released formulation; and a training step of a plain network with RepSGD against the RepVGG it replaces, in
torch modules ("plain RepVGG") and in our blocks.
"""
EQUIVALENCE_HEAD = """### Training form and deployed form

Largest difference of the outputs of any network at full width, relative to the largest output; the bounds are 1e-10 in
float64 and 1e-5 in float32. Norms have random statistics (`python benchmarks/equivalence.py`).
"""
BACKENDS_HEAD = """# Backends

What has run where, from stored results and test runs. Where there is none, nothing is claimed.
"""
BACKENDS = {
    "reference": ("plain torch", ("cpu",)),
    "cpu": ("C++: scalar, AVX2, AVX-512", ("cpu",)),
    "cuda": ("CUDA C++", ("cuda",)),
    "triton": ("Triton", ("cuda", "cpu")),
    "simt": ("the CUDA source on the host, tests only", ("cpu",)),
}


def table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    head = list(head)
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def newest(rows: Iterable[Row], key: Callable[[Row], tuple[str, ...]]) -> dict[tuple[str, ...], Row]:
    """The last row of each key, in the order in which keys first appear."""
    answer: dict[tuple[str, ...], Row] = {}
    for row in rows:
        answer[key(row)] = row
    return answer


def machine_of(row: Row) -> tuple[str, ...]:
    where = row["gpu"] or f"{row['cpu']}, {row['threads']} threads, {row['isa']}"
    return (where, row["torch"], row["triton"], row["python"], row["repkern"])


def milliseconds(text: str) -> str:
    value = float(text)
    return f"{1e3 * value:.1f} µs" if value < 0.1 else f"{value:.3g} ms" if value < 100 else f"{value:.0f} ms"


def ratio(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{float(row['ratio']):.2f} ({float(row['ratio_p20']):.2f}–{float(row['ratio_p80']):.2f})"


def ops_section(rows: list[Row]) -> str:
    rows = [row for row in rows if row["kind"] == "ops"]
    if not rows:
        return ""
    found = newest(rows, lambda r: (r["op"], r["case"], r["what"], r["dtype"], r["backend"], r["mode"], r["baseline"]))
    lines = []
    for key in dict.fromkeys(key[:6] for key in found):
        of = {baseline: found.get((*key, baseline)) for baseline in ("", "eager", "compile", "conv2d")}
        own = of[""]
        if own is None:
            continue
        op, case, what, dtype, backend, mode = key
        name = f"{backend}, {mode}" if mode != "eager" else backend
        rate = f"{float(own['gflops']):.0f} ({float(own['peak_percent']):.0f} %)"
        lines.append([f"`{op}` {case}", what, dtype, name, milliseconds(own["ms"]), rate,
                      *(ratio(of[b]) for b in ("eager", "compile", "conv2d"))])  # fmt: skip
    rates: dict[str, list[float]] = {}
    for row in found.values():
        if row["peak_gflops"]:
            rates.setdefault(row["peak_source"], []).append(float(row["peak_gflops"]))
    peaks = [f"{source}, {min(values):.0f} to {max(values):.0f} GFLOP/s" for source, values in rates.items()]
    head = ["op, case", "pass", "dtype", "backend", "time", "GFLOP/s (of peak)", "x eager", "x compile", "x conv2d"]
    return f"### Ops\n\nPeak: {'; '.join(sorted(peaks))}.\n\n{table(head, lines)}"


def train_section(rows: list[Row]) -> str:
    steps = newest(
        [r for r in rows if r["kind"] == "train"], lambda r: (r["case"], r["device"], r["mode"], r["backend"])
    )
    if not steps:
        return ""
    lines = [
        [r["case"], r["mode"], r["backend"], milliseconds(r["ms"]), milliseconds(r["baseline_ms"]), ratio(r)]
        for r in steps.values()
    ]
    text = "### Training step\n\nForward, loss, backward, SGD with momentum; ratio to the plain network.\n\n"
    text += table(["case", "mode", "network", "time", "plain", "ratio"], lines)
    memory = [r for r in rows if r["kind"] == "memory"]
    peaks = newest(memory, lambda r: (r["case"], r["device"], r["mode"], r["backend"]))
    lines = [[r["case"], r["mode"], r["backend"], f"{float(r['extra_mib']):.1f} MiB"] for r in peaks.values()]
    if lines:
        text += "\nPeak memory of a step above the plain network's:\n\n"
        text += table(["case", "mode", "network", "extra"], lines)
    return text


def blocks_section(rows: list[Row]) -> str:
    rows = [row for row in rows if row["kind"] in ("blocks", "blocks-memory")]
    if not rows:
        return ""
    found = newest(rows, lambda r: (r["case"], r["device"], r["mode"], r["backend"], r["what"]))
    lines = []
    for key in dict.fromkeys(key[:4] for key in found):
        step, kept, peak = (found.get((*key, what)) for what in ("step", "activations", "peak"))
        times = [milliseconds(step["ms"]), milliseconds(step["baseline_ms"]), ratio(step)] if step else [""] * 3
        lines.append([key[0], key[2], key[3], *times, mebibytes(kept), mebibytes(peak)])
    head = ["case", "mode", "network", "time", "plain", "ratio", "kept for the backward", "peak"]
    return f"{BLOCKS_HEAD}\n{table(head, lines)}"


def optimizer_section(rows: list[Row]) -> str:
    rows = [row for row in rows if row["kind"] in ("optim", "repopt") and row["baseline"]]
    found = newest(rows, lambda r: (r["case"], r["what"], r["device"], r["mode"], r["baseline"]))
    lines = [
        [r["case"], r["what"] if r["mode"] == "eager" else f"{r['what']}, {r['mode']}", milliseconds(r["ms"]),
         r["baseline"], milliseconds(r["baseline_ms"]), ratio(r)]
        for r in found.values()
    ]  # fmt: skip
    head = ["case", "step", "time", "against", "its time", "x faster"]
    return f"{OPTIMIZER_HEAD}\n{table(head, lines)}" if lines else ""


def equivalence_section(rows: list[Row]) -> str:
    rows = [row for row in rows if row["kind"] == "equivalence"]
    if not rows:
        return ""
    found = newest(rows, lambda r: (r["case"], r["op"], r["dtype"]))
    lines = []
    for kind in dict.fromkeys(key[0] for key in found):
        of = {dtype: [r for key, r in found.items() if key[::2] == (kind, dtype)] for dtype in ("float64", "float32")}
        failed = sum(row["verdict"] != "ok" for rows in of.values() for row in rows)
        lines.append([f"`{kind}`", str(len(of["float64"])), *map(largest_difference, of.values()), str(failed)])
    head = ["block", "networks", "float64", "float32", "beyond the bound"]
    return f"{EQUIVALENCE_HEAD}\n{table(head, lines)}"


def largest_difference(rows: list[Row]) -> str:
    """Of a precision, relative to the largest output, and in which network."""
    if not rows:
        return ""
    worst = max(rows, key=lambda row: float(row["error_over_bound"]))
    bound = next(value for dtype, value in BOUNDS.items() if str(dtype) == f"torch.{worst['dtype']}")
    return f"{float(worst['error_over_bound']) * bound:.1e} ({worst['op']})"


def mebibytes(row: Row | None) -> str:
    """Ours, the plain network's, and their ratio."""
    if row is None:
        return ""
    return f"{float(row['extra_mib']):.1f} of {float(row['limit_mib']):.1f} MiB ({float(row['ratio']):.2f})"


def conv_section(rows: list[Row]) -> str:
    rows = [row for row in rows if row["kind"] == "conv" and ": " in row["what"]]
    found = newest(rows, lambda r: (r["case"], r["dtype"], *role(r)))
    if not found:
        return ""
    lines = []
    for case, dtype in dict.fromkeys(key[:2] for key in found):
        of = {key[2:]: row for key, row in found.items() if key[:2] == (case, dtype)}
        warm = of.get(("best", "eager", "torch"))
        if warm is None:
            continue
        rest = [("best", "eager", "ncnn"), ("dispatched", "eager", "torch")]
        rest += [("best", "cold weights", "torch"), ("dispatched", "cold weights", "torch")]
        times = [milliseconds(warm["ms"]), milliseconds(warm["baseline_ms"]), ratio(warm)]
        lines.append(
            [case, dtype, warm["what"].partition(": ")[2], *times, *(short_ratio(of.get(key)) for key in rest)]
        )
    head = ["layer", "dtype", "method", "time", "torch", "x torch", "x ncnn", "dispatched x torch"]
    return f"{CONV_HEAD}\n{table([*head, 'cold: x torch', 'dispatched'], lines)}"


def role(row: Row) -> tuple[str, ...]:
    """What a row of a convolution is: best or dispatched, warm or cold, against torch (in any format) or ncnn."""
    return row["what"].partition(": ")[0], row["mode"], row["baseline"].split()[0]


def infer_section(rows: list[Row]) -> str:
    found = newest(
        [r for r in rows if r["kind"] == "infer" and r["what"] == "forward"],
        lambda r: (r["case"], r["device"], r["dtype"], r["baseline"]),
    )
    if not found:
        return ""
    memory = newest(
        [r for r in rows if r["kind"] == "infer-memory" and r["what"] == "peak"], lambda r: (r["case"], r["device"])
    )
    rivals = list(dict.fromkeys(key[3] for key in found))
    lines = []
    for key in dict.fromkeys(key[:3] for key in found):
        of = [found.get((*key, rival)) for rival in rivals]
        ours = max((row for row in of if row), key=lambda row: row["date"])
        times = [f"{milliseconds(row['baseline_ms'])}, {short_ratio(row)}" if row else "" for row in of]
        lines.append([key[0], key[2], milliseconds(ours["ms"]), *times, mebibytes(memory.get(key[:2]))])
    return f"{INFER_HEAD}\n{table(['case', 'dtype', 'repkern', *rivals, 'memory'], lines)}"


def accuracy_section(rows: list[Row]) -> str:
    found = newest([r for r in rows if r["kind"] == "accuracy"], lambda r: (r["case"], r["backend"], r["what"]))
    lines = []
    for case, backend in dict.fromkeys(key[:2] for key in found):
        of = [found.get((case, backend, what)) for what in ("logits", "worst image", "top-1")]
        lines.append([case, backend, next(filter(None, of))["pairs"], *(measured(row) if row else "" for row in of)])
    head = ["network", "implementation", "images", "error of all logits", "of the worst image", "top-1 agreement"]
    return f"{ACCURACY_HEAD}\n{table(head, lines)}" if lines else ""


def runs_section(rows: list[Row]) -> str:
    rows = [row for row in rows if row["kind"] in ("kills", "steady", "overhead")]
    found = newest(rows, lambda r: tuple(r[name] for name in ("kind", "op", "case"))).values()
    lines = [[row[name] for name in ("kind", "op", "case", "what", "verdict")] for row in found]
    return f"### Training\n\n{table(['check', 'training', 'case', 'what', 'verdict'], lines)}" if lines else ""


def short_ratio(row: Row | None) -> str:
    return f"{float(row['ratio']):.2f}" if row else ""


def targets_section(rows: list[Row]) -> str:
    rows = [row for row in rows if row["target"]]
    # Which rival is the best one may change from run to run.
    found = newest(
        rows,
        lambda r: (
            r["kind"], r["case"], r["what"], r["backend"], r["mode"],
            "" if r["kind"].startswith("infer") else r["baseline"], target_kind(r),
        ),
    )  # fmt: skip
    if not found:
        return ""
    lines = [[r["case"], r["what"], network(r), r["target"], measured(r), r["verdict"]] for r in found.values()]
    return f"### Targets\n\n{table(['case', 'pass', 'backend', 'target', 'measured', 'verdict'], lines)}"


def network(row: Row) -> str:
    """The backend, with the mode unless it is the usual one."""
    return row["backend"] if row["mode"] == "eager" else f"{row['backend']}, {row['mode']}"


def target_kind(row: Row) -> str:
    """The target without its number, which may differ from run to run (memory limits)."""
    return row["target"].split(" ", 2)[2]


def measured(row: Row) -> str:
    if row["kind"] == "memory":
        return f"{float(row['extra_mib']):.1f} MiB"
    if row["kind"] == "accuracy" and row["what"] == "top-1":
        return f"{float(row['ratio']):.4g} %"
    if row["kind"] == "accuracy":
        return f"{float(row['error_over_bound']) * accuracy_targets()[0].value:.1e}"
    if row["ratio"]:
        return f"{float(row['ratio']):.2f}"
    return f"{float(row['peak_percent']):.1f} %" if row["device"] == "cpu" else f"{1e3 * float(row['ms']):.1f} us"


def performance(rows: list[Row]) -> str:
    text = NOTICE + PERFORMANCE_HEAD
    machines = list(newest(rows, machine_of))
    for machine in machines:
        here = [row for row in rows if machine_of(row) == machine]
        where, torch, triton, python, repkern = machine
        last = here[-1]
        text += f"\n## {where}\n\ntorch {torch}, triton {triton or 'absent'}, Python {python}, repkern {repkern}; "
        text += f"last row {last['date'][:10]}, commit {last['commit'] or 'unknown'}.\n\n"
        sections = (
            targets_section, conv_section, infer_section, accuracy_section, ops_section, train_section, blocks_section,
            optimizer_section, equivalence_section, runs_section,
        )  # fmt: skip
        text += "\n".join(filter(None, (section(here) for section in sections)))
    if not any(row["device"] == "cuda" for row in rows):
        text += "\n## GPU\n\nNo figures yet: not yet run on a GPU.\n"
    return text


def backends(rows: list[Row], tests: list[Row]) -> str:
    text = NOTICE + BACKENDS_HEAD + "\n"
    lines = []
    for backend, (what, devices) in BACKENDS.items():
        for device in devices:
            where = "GPU" if device == "cuda" else "CPU (interpreter)" if backend == "triton" else "CPU"
            lines.append([f"`{backend}`", what, where, tested(backend, device, tests), timed(backend, device, rows)])
    text += table(["backend", "what it is", "on", "op tests", "benchmarks"], lines)
    text += "\n`repkern info` says which of them can run on your machine, and why each other one cannot.\n"
    return text


def tested(backend: str, device: str, tests: list[Row]) -> str:
    found = [row for row in tests if (row["backend"], row["device"]) == (backend, device)]
    if not found:
        return "not yet run on a GPU" if device == "cuda" else "no stored run"
    last = found[-1]
    machine = last["gpu"] if device == "cuda" else last["cpu"]
    counts = ", ".join(f"{last[name]} {name}" for name in ("passed", "failed", "skipped") if int(last[name]))
    return f"{counts} ({machine}, torch {last['torch']}, {last['date'][:10]}, {last['commit'] or 'commit unknown'})"


def timed(backend: str, device: str, rows: list[Row]) -> str:
    found = [row for row in rows if row["kind"] == "ops" and (row["backend"], row["device"]) == (backend, device)]
    if not found:
        return "not yet run on a GPU" if device == "cuda" else "none"
    machines = dict.fromkeys(row["gpu"] or row["cpu"] for row in found)
    return f"{', '.join(machines)}: [performance](performance.md)"


def documents(results: Path) -> dict[str, str]:
    rows = read_rows(path for path in results.glob("*.csv") if path.name not in ("tests.csv", EVIDENCE))
    tests = read_rows(path for path in [results / "tests.csv"] if path.exists())
    evidence = with_tables((DOCS / "evidence.md").read_text(), read_evidence(results / EVIDENCE))
    return {"performance.md": performance(rows), "backends.md": backends(rows, tests), "evidence.md": evidence}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--output", type=Path, default=DOCS)
    args = parser.parse_args()
    stale = []
    for name, text in documents(args.results).items():
        path = args.output / name
        if not path.exists() or path.read_text() != text:
            stale.append(name)
            if not args.check:
                path.write_text(text)
    if args.check and stale:
        print(f"{', '.join(stale)}: stale; run python benchmarks/make_docs.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
