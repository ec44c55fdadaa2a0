"""The evidence table: its statistics, its queue, a small run of every kind, and the page that is drawn."""

import csv
import dataclasses
import importlib.util
import io
import math
import statistics
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy.stats import ttest_1samp

from repkern.bench import evidence, evidence_data, evidence_page
from repkern.bench.evidence import ARMS, INT8, Arm, Case, EvidenceRow, Setting, append_row, pending, plan, read_evidence
from repkern.bench.evidence_data import EvidenceData
from repkern.bench.evidence_networks import NETWORKS, make_network
from repkern.bench.evidence_run import first_network, run
from repkern.bench.results import environment
from repkern.data.sets import MemoryData
from repkern.nn import OREPAConv2d, reparameterize
from repkern.train.state import Position
from repkern.train.trainer import Interrupted, TrainingDivergedError

ROOT = Path(__file__).resolve().parents[2]
SMALL = Setting(
    "tiny", "fashion_mnist", 96,
    {"train": {"epochs": 2, "batch_size": 32, "device": "cpu", "eval_every": 2}, "optimizer": {"nesterov": False},
     "schedule": {"name": "onecycle"}},
)  # fmt: skip
ROW = EvidenceRow(
    arm="plain", network="six layers", setting="tiny", seed=0, accuracy=50.0, test_loss=1.0, train_loss=1.0,
    seconds=2.0, cpu_seconds=1.0, search_seconds=None, peak_mib=10.0, parameters=5, definition="",
)  # fmt: skip


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def script():
    spec = importlib.util.spec_from_file_location("evidence_script", ROOT / "benchmarks" / "evidence.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def images(count, seed):
    """Images whose class is where they are bright."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    pixels = torch.randint(0, 60, (count, 1, 12, 12), generator=generator)
    for number, label in enumerate(labels.tolist()):
        pixels[number, 0, 3 * label : 3 * label + 3] += 150
    return MemoryData(pixels.to(torch.uint8), labels, list("abcd"))


@pytest.fixture(scope="module")
def data():
    return EvidenceData.of(images(120, 0), images(40, 1), 96)


def text_rows(values, arm="plain", **changes):
    """Stored rows of these accuracies by seed."""
    rows = []
    for seed, accuracy in values.items():
        own = dataclasses.replace(ROW, arm=arm, seed=seed, accuracy=accuracy, **changes)
        fields = {**vars(environment()), **vars(own)}
        rows.append({name: "" if value is None else str(value) for name, value in fields.items()})
    return rows


# Statistics ------------------------------------------------------------------------------------------------------


def test_the_interval_is_that_of_students_test_of_paired_values():
    ours, theirs = {0: 87.1, 1: 86.4, 2: 88.0, 3: 87.7, 4: 86.9, 9: 1.0}, {0: 86.8, 1: 86.6, 2: 87.1, 3: 87.2, 4: 86.0}
    found = evidence_page.compare(ours, theirs)
    differences = [ours[seed] - theirs[seed] for seed in range(5)]
    low, high = ttest_1samp(differences, 0).confidence_interval(0.95)
    assert found.pairs == 5
    assert found.mean == pytest.approx(statistics.mean(differences), rel=1e-12)
    assert found.mean - found.half == pytest.approx(low, rel=1e-9)
    assert found.mean + found.half == pytest.approx(high, rel=1e-9)


@pytest.mark.parametrize(
    ("differences", "words"),
    [
        ([0.5, 0.6, 0.7, 0.5, 0.6], "higher"),
        ([-0.5, -0.6, -0.7, -0.5, -0.6], "lower"),
        ([0.5, -0.6, 0.7, -0.5, 0.6], "no difference seen"),
        ([0.0] * 5, "no difference seen"),
        ([5.0, 5.1, 5.0, 5.1], "4 of 5 pairs"),
        ([], "0 of 5 pairs"),
    ],
)
def test_what_is_said_of_differences(differences, words):
    ours = {seed: 80 + difference for seed, difference in enumerate(differences)}
    assert evidence_page.finding(evidence_page.compare(ours, dict.fromkeys(range(9), 80.0))) == words


def test_fewer_than_two_pairs_have_no_interval():
    assert evidence_page.compare({1: 3.0}, {1: 1.0}).mean == 2.0
    assert math.isnan(evidence_page.compare({1: 3.0}, {1: 1.0}).half)
    assert math.isnan(evidence_page.compare({1: 3.0}, {2: 1.0}).mean)


# The queue -------------------------------------------------------------------------------------------------------


def test_the_plan_has_all_arms_of_a_seed_before_the_next():
    cases = list(plan(["six layers"], range(2), SMALL, ["plain", "OREPA"]))
    assert [(case.seed, case.arm.name) for case in cases] == [(0, "plain"), (0, "OREPA"), (1, "plain"), (1, "OREPA")]
    assert [case.arm.name for case in plan(["six layers"], [0], SMALL)] == list(evidence.COMPARED)


@pytest.mark.parametrize(("networks", "arms"), [(["resnet18"], ["plain"]), (["six layers"], ["plian"])])
def test_unknown_names_are_refused_with_those_there_are(networks, arms):
    with pytest.raises(ValueError, match=r"must be one of .*, got '(resnet18|plian)'"):
        list(plan(networks, [0], SMALL, arms))


def test_stored_rows_are_not_run_again():
    meant = evidence.definition(ARMS["plain"], "six layers", SMALL)
    cases = list(plan(["six layers"], range(3), SMALL, ["plain"]))
    stored = text_rows({0: 50.0, 1: 51.0}, definition=meant)
    stored += text_rows({0: 49.0}, arm="plain" + INT8, definition=meant)
    # Of seed 1 the INT8 row is missing.
    assert [case.seed for case in pending(cases, stored)] == [1, 2]


def test_rows_of_an_arm_that_has_changed_are_not_mixed_with_new_ones():
    stored = text_rows({0: 50.0}, definition="00000000")
    with pytest.raises(ValueError, match="definition 00000000, now it is"):
        list(pending(plan(["six layers"], [1], SMALL, ["plain"]), stored))


@pytest.mark.parametrize("change", [{"kernel": 2.0}, {"options": {"scaling": "none"}}, {"recipe": {"optimizer": {}}}])
def test_a_definition_is_that_of_arm_network_and_setting(change):
    base = evidence.definition(ARMS["OREPA"], "six layers", SMALL)
    assert evidence.definition(dataclasses.replace(ARMS["OREPA"], **change), "six layers", SMALL) != base
    assert evidence.definition(ARMS["OREPA"], "small resnet", SMALL) != base
    assert evidence.definition(ARMS["OREPA"], "six layers", dataclasses.replace(SMALL, images=64)) != base


def test_a_file_with_other_columns_is_refused(tmp_path):
    path = tmp_path / "evidence.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        append_row(path, environment(), ROW)
    assert path.read_text() == "a,b\n1,2\n"


def test_the_queue_stores_every_row_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys, data):
    queue, results = script(), tmp_path / "evidence.csv"
    monkeypatch.setitem(queue.SETTINGS, "tiny", SMALL)
    monkeypatch.setattr(queue, "open_data", lambda setting, path: data)
    common = ["--results", str(results), "--arms", "OREPA", "ACB", "--seeds", "2", "--threads", "1"]
    arguments = queue.parser().parse_args  # the choices of the parser are made when it is made
    assert arguments([*common, "--setting", "tiny"]).setting == "tiny"
    assert queue.main([*common, "--setting", "tiny", "--minutes", "-1"]) == 0
    assert "time is up, 4 runs left" in capsys.readouterr().out
    assert queue.main([*common[:-4], "--seeds", "1", "--threads", "1", "--setting", "tiny"]) == 0
    first = results.read_text()
    assert queue.main([*common, "--setting", "tiny"]) == 0
    assert results.read_text().startswith(first)
    rows = read_evidence(results)
    assert [(row["arm"], row["seed"]) for row in rows] == [("OREPA", "0"), ("ACB", "0"), ("OREPA", "1"), ("ACB", "1")]
    assert queue.main([*common, "--setting", "tiny"]) == 0
    assert "0 runs to do, 4 rows stored" in capsys.readouterr().out
    assert len(read_evidence(results)) == 4


def test_a_run_that_diverges_leaves_the_others_and_a_stop_leaves_what_is_stored(tmp_path, monkeypatch, capsys, data):
    queue, results = script(), tmp_path / "evidence.csv"
    monkeypatch.setitem(queue.SETTINGS, "tiny", SMALL)
    monkeypatch.setattr(queue, "open_data", lambda setting, path: data)

    def run(case, data):
        if case.arm.name == "ACB":
            raise TrainingDivergedError("the loss was not finite")
        if case.seed == 1:
            raise Interrupted("SIGTERM", Position(), None)
        yield dataclasses.replace(ROW, arm=case.arm.name, seed=case.seed)

    monkeypatch.setattr(queue, "run", run)
    arguments = ["--results", str(results), "--setting", "tiny", "--arms", "ACB", "OREPA", "--seeds", "2"]
    assert queue.main([*arguments, "--threads", "1"]) == 130
    told = capsys.readouterr()
    assert "seed 0, ACB: no row, the loss was not finite" in told.err
    assert "2/4 tiny, six layers, seed 0, OREPA: 50.00 %" in told.out
    assert "stopped; 1 runs left" in told.out
    assert [row["arm"] for row in read_evidence(results)] == ["OREPA"]


# A run -----------------------------------------------------------------------------------------------------------


def test_a_run_learns_and_repeats_and_is_quantized(data):
    arm = dataclasses.replace(ARMS["RepOpt"])
    first, small = run(Case(arm, "six layers", 3, SMALL), data)
    again = next(run(Case(dataclasses.replace(arm, int8=False), "six layers", 3, SMALL), data))
    assert (first.arm, small.arm, first.seed) == ("RepOpt", "RepOpt, INT8", 3)
    assert (first.accuracy, first.train_loss) == (again.accuracy, again.train_loss)
    assert first.accuracy > 60  # of four classes
    assert abs(small.accuracy - first.accuracy) <= 25
    assert small.cpu_seconds is None
    assert min(first.cpu_seconds, first.search_seconds, first.seconds) > 0
    assert first.peak_mib is None or first.peak_mib >= 0
    assert first.parameters == sum(p.numel() for p in make_network("six layers", "conv_bn", 1, 4).parameters())


def test_all_arms_of_a_seed_see_the_same_batches_and_other_seeds_others(data):
    def seen(seed):
        return torch.cat([batch.images for batch in data.source(seed, 32).train_batches(0)])

    assert torch.equal(seen(1), seen(1))
    assert not torch.equal(seen(1), seen(2))
    torch.testing.assert_close(
        torch.stack([seen(1).mean(), seen(1).std()]), torch.tensor([0.0, 1.0]), rtol=1e-3, atol=1e-3
    )
    assert sum(len(batch.labels) for batch in data.source(0, 32).test_batches()) == 40
    with pytest.raises(ValueError, match="from 1 to 40"):
        EvidenceData.of(images(40, 0), images(40, 1), 41)


def kernels(arm):
    model = first_network(Case(arm, "six layers", 0, SMALL), 1, 4)
    return [module.weight.detach() for module in model.modules() if isinstance(module, torch.nn.Conv2d)]


@pytest.mark.parametrize("block", ["conv_bn", "orepa"])
def test_a_factor_on_the_first_kernels(block):
    plain, scaled = kernels(Arm("a", block)), kernels(Arm("a", block, kernel=0.3))
    assert len(plain) == 6
    for before, after in zip(plain, scaled, strict=True):
        torch.testing.assert_close(after, 0.3 * before, rtol=1e-5, atol=1e-6)


def test_first_kernels_of_another_kind():
    network = first_network(Case(Arm("a", "orepa", start="conv_bn"), "six layers", 0, SMALL), 1, 4)
    assert sum(isinstance(module, OREPAConv2d) for module in network.modules()) == 6
    of_plain = kernels(Arm("a", start="conv_bn"))
    for ours, wanted in zip(kernels(Arm("a", "orepa", start="conv_bn")), of_plain, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)


def test_first_kernels_of_orepa_are_three_times_as_large_and_centred():
    """What docs/evidence.md says about them."""
    for own, squeezed in zip(kernels(ARMS["plain"])[1:], kernels(ARMS["OREPA"])[1:], strict=True):
        assert 2.9 < squeezed.std() / own.std() < 3.8
        assert 0.4 < squeezed[:, :, 1, 1].square().sum() / squeezed.square().sum() < 0.75


@pytest.mark.parametrize("network", list(NETWORKS))
@pytest.mark.parametrize("block", ["conv_bn", "acb", "dbb", "repvgg", "orepa"])
def test_networks_of_every_kind_have_one_deployed_form(network, block):
    def deployed(kind):
        torch.manual_seed(0)
        model = make_network(network, kind, 3, 7)
        model(torch.randn(4, 3, 13, 11))  # statistics for the norms
        plain = reparameterize(model.eval(), verify=torch.randn(2, 3, 13, 11))
        return {name: tuple(tensor.shape) for name, tensor in plain.state_dict().items()}

    assert deployed(block) == deployed("conv_bn")
    with pytest.raises(ValueError, match="network must be one of six layers, small resnet, got 'vgg'"):
        make_network("vgg", block, 3, 7)


# The images of a file --------------------------------------------------------------------------------------------


def test_jpeg_images_of_a_file(tmp_path):
    def encoded(value):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (value, value // 2, 255 - value)).save(buffer, "JPEG", quality=95)
        return buffer.getvalue()

    tensors = {}
    for part, values in (("train", (10, 120, 240)), ("test", (200,))):
        files = [encoded(value) for value in values]
        ends = torch.tensor([0, *(len(file) for file in files)]).cumsum(0)
        tensors |= {f"{part}_jpeg": torch.tensor(list(b"".join(files)), dtype=torch.uint8), f"{part}_offsets": ends}
        tensors[f"{part}_labels"] = torch.tensor([1, 0, 1][: len(files)])
    path = tmp_path / "images.safetensors"
    save_file(tensors, str(path))
    setting = dataclasses.replace(SMALL, data="cifar10_jpeg", images=2)
    read = evidence_data.open_data(setting, path)
    source = read.source(0, 2)
    assert (source.channels, source.image_size, len(read.train), len(source.classes)) == (3, 8, 2, 2)
    assert read.train.labels.tolist() == [1, 0]
    assert read.train.images[0, 0].max() < read.train.images[1, 0].min() < read.test.images[0, 0].min()
    save_file({"other": torch.zeros(1)}, str(path))
    with pytest.raises(ValueError, match="no tensor train_jpeg"):
        evidence_data.open_data(setting, path)
    with pytest.raises(FileNotFoundError, match="needs a file of JPEG images"):
        evidence_data.open_data(setting, None)


# The page --------------------------------------------------------------------------------------------------------


def test_the_table_pairs_arms_with_plain_and_int8_with_its_own_network():
    plain, repvgg = {0: 86.0, 1: 87.0, 2: 86.5, 3: 86.2, 4: 86.3}, {0: 86.5, 1: 87.6, 2: 87.0, 3: 86.7, 4: 86.7}
    rows = text_rows(plain) + text_rows(repvgg, "RepVGG", search_seconds=4.0)
    rows += text_rows({0: 86.4, 1: 87.6}, "RepVGG" + INT8, cpu_seconds=None, peak_mib=None)
    text = evidence_page.evidence_tables(rows, ["plain", "ACB", "RepVGG", "RepVGG" + INT8])
    assert "### tiny: six layers\n" in text
    assert "| plain | 5 | 86.40 |  |  |  | 1 s | 10 MiB |" in text
    assert "| RepVGG | 5 | 86.90 | plain | +0.50 ± 0.09 | higher | 1 s + 4 s search | 10 MiB |" in text
    assert "| RepVGG, INT8 | 2 | 87.00 | RepVGG | -0.05 ± 0.64 | 2 of 5 pairs |  |  |" in text
    assert "ACB" not in text


def test_the_page_keeps_its_words_and_gets_new_tables(tmp_path):
    page = (ROOT / "docs" / "evidence.md").read_text()
    empty = evidence_page.with_tables(page, [])
    rows = text_rows({0: 1.0}) + text_rows({0: 2.0}, "OREPA") + text_rows({0: 3.0}, "OREPA, initial plain")
    drawn = evidence_page.with_tables(empty, rows)
    assert evidence_page.with_tables(drawn, []) == empty
    assert drawn.count("| OREPA | 1 | 2.00 |") == 2
    assert drawn.count("| OREPA, initial plain | 1 | 3.00 | plain | +2.00 | 1 of 5 pairs |") == 1
    assert drawn.count("| OREPA, initial plain | 1 | 3.00 | OREPA | +1.00 | 1 of 5 pairs |") == 1
    with pytest.raises(ValueError, match="no marks"):
        evidence_page.with_tables("# nothing\n", rows)


def test_stored_rows_mean_what_the_arms_mean_now():
    """Else the queue could not go on."""
    rows = read_evidence(ROOT / "benchmarks" / "results" / "evidence.csv")
    assert rows
    for name, setting in evidence.SETTINGS.items():
        here = [row for row in rows if row["setting"] == name]
        networks = list(dict.fromkeys(row["network"] for row in here))
        list(pending(plan(networks, range(5), setting, list(ARMS)), here))
    keys = [(row["arm"], row["network"], row["setting"], row["seed"]) for row in rows]
    assert len(set(keys)) == len(keys)
    with (ROOT / "benchmarks" / "results" / "evidence.csv").open(newline="") as file:
        assert next(csv.reader(file)) == evidence.COLUMNS
