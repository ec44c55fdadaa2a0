"""`repkern bench infer`: contestants in processes of their own, logits checked before timing, verdicts, memory."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from repkern.bench import infer, rivals, rss, targets
from repkern.bench.deployed import calibrated, random_images
from repkern.bench.infer import InferOptions, run_infer
from repkern.bench.remote import Remote
from repkern.bench.rivals import CONTESTANTS, OURS, Contestant, Job, Kind, missing, names_for
from repkern.bench.rivals_ncnn import NcnnNet, write_ncnn
from repkern.bench.timing import Workload, measure_pairs
from repkern.deploy import export
from repkern.models import load, save

ECHO = """
import os, time

class Echo:
    def __init__(self, *arguments):
        if arguments == ("broken",):
            raise ValueError("cannot be made")
        self.arguments, self.runs = arguments, 0

    def run(self):
        self.runs += 1
        time.sleep(0.002)

    def prepare(self, *args):
        print("not on standard output")
        return self.arguments + args

    def die(self):
        os._exit(3)

    def fail(self):
        raise KeyError("what went wrong")

    def count(self):
        return self.runs
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """Contestants set it; here they run in this process."""
    monkeypatch.setenv("REPKERN_CACHE_DIR", str(tmp_path))


@pytest.fixture
def echo(tmp_path, monkeypatch):
    (tmp_path / "echo_contestant.py").write_text(ECHO)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "echo_contestant:Echo"


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A tiny deployed network and two images, as files, and its logits in float64."""
    folder = tmp_path_factory.mktemp("job")
    network = calibrated("repvgg_a0", size=32, width=0.125)
    images = random_images(2, 32, seed=1)
    save(network, folder / "network.safetensors")
    np.save(folder / "images.npy", images.numpy())
    onnx = None
    if not missing("onnxruntime"):
        onnx = str(folder / "network.onnx")
        export(network, onnx, images, dynamic_batch=False, verify=False)
    exact = infer._exact(network, images)
    return Job(str(folder / "network.safetensors"), str(folder / "images.npy"), onnx), exact


def test_a_remote_times_its_own_work_in_turn_with_others(echo, capfd):
    with Remote("echo", echo, 1, 2) as remote:
        assert remote.prepare("a") == (1, 2, "a")
        local = Workload(lambda _: None)
        samples = measure_pairs({"remote": remote.workload(), "local": local}, pairs=2, min_sample_seconds=0.004)
        assert len(samples["remote"]) == len(samples["local"]) == 2
        assert 0.002 <= min(samples["remote"]) < 0.02  # what the sampling sleeps is not counted
        assert remote.call("count") > 6
        with pytest.raises(RuntimeError, match=r"^echo: KeyError: 'what went wrong'"):
            remote.call("fail")
        assert remote.prepare() == (1, 2)
    assert not remote._process.is_alive()
    out, err = capfd.readouterr()
    assert "not on standard output" not in out
    assert "not on standard output" in err


def test_a_remote_that_cannot_be_made_or_dies_says_so(echo):
    with (
        Remote("echo", echo, "broken") as remote,
        pytest.raises(RuntimeError, match=r"^echo: ValueError: cannot be made"),
    ):
        remote.prepare()
    with Remote("echo", echo) as remote:
        with pytest.raises(RuntimeError, match=r"^echo: its process ended with code 3"):
            remote.call("die")
        with pytest.raises(RuntimeError, match=r"^echo: its process ended with code 3"):
            remote.prepare()


@pytest.mark.parametrize("name", [name for name in CONTESTANTS if not name.startswith("compile")])
def test_every_contestant_computes_the_logits(name, job):
    if missing(name):
        pytest.skip(f"needs {', '.join(missing(name))}")
    files, exact = job
    contestant = Contestant(name, torch.get_num_threads())
    for _ in range(2):
        got = contestant.prepare(files)
        assert got.dtype == np.float64
        assert np.linalg.norm(got - exact) <= infer._RIVAL_ALLOWED["fp32"] * np.linalg.norm(exact)
    assert bool(contestant.chosen()) == (name == OURS)


def test_calibrated_networks_keep_their_scale_and_tell_images_apart():
    network = calibrated("repvgg_b1", size=32, width=0.25)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    with torch.no_grad():
        features = network.forward_features(random_images(16, 32, seed=9))
        logits = network.forward_head(features)
    assert 0.05 < float(features.std()) < 20
    assert len(set(logits.argmax(1).tolist())) > 2
    again = calibrated("repvgg_b1", size=32, width=0.25)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))
    images = random_images(2, 64, seed=3)
    assert 0.3 < float(images.std()) < 3
    assert torch.equal(images, random_images(2, 64, seed=3))


@pytest.mark.skipif(bool(missing("ncnn")), reason="needs ncnn")
def test_ncnn_runs_residual_networks_too():
    network = calibrated("resnet18", size=64, width=0.125)
    images = random_images(2, 64, seed=1)
    got = NcnnNet(*write_ncnn(network, images[:1]), 1)(images.numpy())
    exact = infer._exact(network, images)
    assert np.linalg.norm(got - exact) <= 1e-4 * np.linalg.norm(exact)


def options(**changes):
    base = {
        "rivals": ["eager"], "batches": (2,), "size": 32, "width": 0.125, "threads": 1, "pairs": 2,
        "min_sample_seconds": 0.0, "memory": False,
    }  # fmt: skip
    return InferOptions(**(base | changes))


class Inline:
    """A Remote without a process, for what is decided around it."""

    def __init__(self, name, maker, *arguments):
        self.contestant = Contestant(*arguments)

    def __enter__(self):
        return self

    def __exit__(self, *problem):
        return None

    def prepare(self, job):
        try:
            return self.contestant.prepare(job)
        except Exception as problem:
            raise RuntimeError(f"inline: {problem}") from None

    def ask(self, method, *args):
        self.asked = method, args

    def answer(self):
        method, args = self.asked
        return getattr(self, method)(*args)

    def call(self, method):
        return getattr(self.contestant, method)()

    def workload(self):
        return Workload(lambda _: self.contestant.run())


def inline(monkeypatch, **kinds):
    monkeypatch.setattr(infer, "Remote", Inline)
    for name, make in kinds.items():
        monkeypatch.setitem(CONTESTANTS, name, Kind(make))
    rows, said = [], []
    failures = run_infer(["repvgg_a0"], options(rivals=["eager", *kinds]), rows.append, said.append)
    return failures, rows, said


def test_rows_and_verdict_against_the_best_rival(monkeypatch):
    def instant(job, threads):
        logits = rivals._eager(torch.contiguous_format)(job, threads)()
        return lambda: logits

    failures, rows, said = inline(monkeypatch, instant=instant)
    assert failures == []
    assert [(row.what, row.baseline) for row in rows] == [
        ("forward", "eager"), ("forward", "instant"), ("forward, best rival", "instant"),
    ]  # fmt: skip
    for row in rows:
        assert row.case == "repvgg_a0_n2_32"
        assert 0 < row.ms_p20 <= row.ms <= row.ms_p80
        assert 0 < row.error_over_bound < 1
    assert [row.target for row in rows] == ["", "", ">= 1.7 x best rival"]
    assert rows[2].verdict.startswith("short by ")
    assert rows[2].verdict.endswith("(without eager-last, compile, compile-last, onnxruntime, openvino, ncnn)")
    assert any(" x " in text for text in said)


def test_a_wrong_or_broken_rival_is_left_out_and_named(monkeypatch):
    def wrong(job, threads):
        logits = rivals._eager(torch.contiguous_format)(job, threads)()
        return lambda: logits * 1.001

    def broken(job, threads):
        raise ValueError("does not know this network")

    failures, rows, said = inline(monkeypatch, wrong=wrong, broken=broken)
    assert failures == []
    assert {row.baseline for row in rows} == {"eager"}
    assert any("wrong: logits are off by 1.00e-03, allowed 1e-04; not timed" in text for text in said)
    assert any("does not know this network: left out" in text for text in said)


def test_wrong_logits_of_ours_are_a_failure_and_nothing_is_timed(monkeypatch):
    def wrong(job, threads):
        logits = rivals._eager(torch.contiguous_format)(job, threads)()
        return lambda: logits + 1e-4 * logits.norm()

    monkeypatch.setitem(CONTESTANTS, OURS, Kind(wrong))
    failures, rows, _ = inline(monkeypatch)
    assert len(failures) == 1
    assert "repvgg_a0_n2_32, repkern: logits are off by" in failures[0]
    assert rows == []


def test_missing_rivals_are_named_not_fatal(monkeypatch):
    monkeypatch.setattr(infer, "missing", lambda name: ["openvino"] if name == "openvino" else [])
    said = []
    assert infer._installed(options(rivals=["eager", "openvino"]), said.append) == ["eager"]
    assert said == ["openvino is left out: openvino not installed (pip install 'repkern[rivals]')"]


def test_targets():
    assert [str(targets.infer_target("cpu", f"repvgg_{name}")) for name in ("a0", "a2", "b1")] == [
        ">= 1.7 x best rival", ">= 1.6 x best rival", ">= 1.6 x best rival",
    ]  # fmt: skip
    assert targets.infer_target("cuda", "repvgg_a0") is None
    assert set(targets.INFER_RIVALS) == set(CONTESTANTS) - {OURS}
    assert names_for("cuda") == [OURS, "eager", "eager-last", "compile", "compile-last"]


@pytest.mark.skipif(not rss.measured_here(), reason="the system does not reset high-water marks")
def test_high_water_mark_sees_what_was_freed_and_forgets_it():
    rss.reset_high_water()
    before = rss.high_water_bytes()
    torch.ones(64 << 20, dtype=torch.uint8)
    assert 60 << 20 < rss.high_water_bytes() - before < 80 << 20
    rss.reset_high_water()
    assert rss.high_water_bytes() - before < 16 << 20


@pytest.mark.skipif(not rss.measured_here(), reason="the system does not reset high-water marks")
def test_memory_of_a_process_holds_the_weights(job):
    files, _ = job
    weights = sum(parameter.numel() * 4 for parameter in load(files.network).parameters())
    with Remote("eager", "repkern.bench.rss:MemoryContestant", "eager", 1) as remote:
        peak, preparation = remote.prepare(files)
    assert weights < peak < weights + (64 << 20)
    assert preparation >= weights


def test_memory_rows_compare_with_the_leaner_format(monkeypatch):
    bytes_of = {OURS: (30 << 20, 50 << 20), "eager": (25 << 20, 26 << 20), "eager-last": (24 << 20, 40 << 20)}

    class Told(Inline):
        def __init__(self, name, maker, *arguments):
            assert maker == "repkern.bench.rss:MemoryContestant"
            self.name = name

        def prepare(self, job):
            return bytes_of[self.name]

    monkeypatch.setattr(infer, "Remote", Told)
    monkeypatch.setattr(rss, "measured_here", lambda: True)
    rows = []
    infer._measure_memory(infer._Case("repvgg_a0", 1, options()), None, rows.append, print)
    peak, preparation = rows
    assert (peak.what, peak.baseline, peak.extra_mib, peak.limit_mib) == ("peak", "eager-last", 30.0, 24.0)
    assert (peak.ratio, peak.target, peak.verdict) == (1.25, "<= 1.5 x eager", "ok")
    assert (preparation.what, preparation.baseline, preparation.target) == ("peak of preparation", "eager", "")


def test_command(monkeypatch):
    from repkern.cli.bench import app

    monkeypatch.setattr(infer, "Remote", Inline)
    words = "repvgg_a0 --size 32 --batch 1 --rivals eager --pairs 1 --json --no-memory"
    answer = CliRunner().invoke(app, ["infer", *words.split()])
    assert answer.exit_code == 0, answer.output
    rows = [json.loads(line) for line in answer.stdout.splitlines()]
    assert [row["what"] for row in rows] == ["forward", "forward, best rival"]
    assert {row["case"] for row in rows} == {"repvgg_a0_n1_32"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no_such_net"], "`repkern models` lists them"),
        (["--rivals", "tvm"], "onnxruntime, openvino, ncnn"),
        (["--precision", "tf32"], "must be one of fp32"),
        (["--device", "tpu"], "cpu or cuda"),
    ],
)
def test_wrong_use_is_exit_code_2(words, message):
    from repkern.cli.bench import app

    answer = CliRunner().invoke(app, ["infer", *words], env={"COLUMNS": "200"})
    assert answer.exit_code == 2
    assert message in answer.stderr


def test_the_files_of_a_job_hold_the_network(job):
    files, exact = job
    with torch.no_grad():
        got = load(files.network).eval().double()(torch.from_numpy(np.load(files.images)).double())
    assert torch.equal(got, torch.from_numpy(exact)) or float((got - torch.from_numpy(exact)).abs().max()) < 1e-12
    assert importlib.util.find_spec("onnx") is None or files.onnx is not None
