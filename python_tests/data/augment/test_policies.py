"""What RandAugment, AutoAugment and TrivialAugment choose, how often, and how strong."""

import sys
from collections import Counter

import numpy
import pytest
import torch
from scipy import stats

from repkern.data.augment import AutoAugment, Jitter, RandAugment, TrivialAugment, build, policies
from repkern.data.augment._policies import POLICIES
from repkern.data.augment._spaces import AUTOAUGMENT, RANDAUGMENT, TRIVIAL_WIDE
from repkern.data.draws import Draws
from repkern.data.errors import MissingExtraError

pytest.importorskip("kornia")

COUNT = 2000


@pytest.fixture
def rounds(monkeypatch):
    """The operations of every round, as they are applied."""
    seen = []
    real = policies.apply_operations

    def apply(images, chosen, **options):
        seen.append(chosen)
        return real(images, chosen, **options)

    monkeypatch.setattr(policies, "apply_operations", apply)
    return seen


def run(step, channels=1, seed=0):
    images = torch.rand(COUNT, channels, 3, 4, generator=torch.Generator().manual_seed(0))
    return step(images, Draws(seed, 0, torch.arange(COUNT)))


def by_name(chosen):
    arguments = {}
    for operation in chosen:
        arguments.setdefault(operation.name, []).append(operation.argument)
    return arguments


def evenly(counts, parts=None):
    parts = parts or len(counts)
    assert len(counts) == parts
    return stats.chisquare(list(counts)).pvalue > 1e-4


@pytest.mark.parametrize(("space", "operations"), [("paper", 14), ("timm", 15), ("repvgg", 16)])
def test_randaugment_draws_evenly_in_every_round(rounds, space, operations):
    run(RandAugment(count=3, space=space))
    assert len(rounds) == 3
    for chosen in rounds:
        assert evenly(Counter(operation.name for operation in chosen).values(), operations)
    # Rounds are independent: the pairs of operations are even, too.
    pairs = Counter((a.name, b.name) for a, b in zip(rounds[0], rounds[1], strict=True))
    table = [[pairs[a, b] for b in RANDAUGMENT[space]] for a in RANDAUGMENT[space]]
    assert stats.chi2_contingency(table).pvalue > 1e-4


def test_strengths_of_the_paper_go_from_nothing_to_the_ranges_end(rounds):
    strongest = {
        "identity": {0.0}, "autocontrast": {0.0}, "equalize": {0.0}, "posterize": {4}, "solarize": {0.0},
        "rotate": {-30.0, 30.0}, "shear_x": {-0.3, 0.3}, "shear_y": {-0.3, 0.3},
        "translate_x": {-150 / 331, 150 / 331}, "translate_y": {-150 / 331, 150 / 331},
        **{key: {1 - 0.9, 1.9} for key in ("color", "contrast", "brightness", "sharpness")},
    }  # fmt: skip
    weakest = {
        **{key: {0.0} for key in strongest}, "posterize": {8}, "solarize": {256},
        **{key: {1.0} for key in ("color", "contrast", "brightness", "sharpness")},
    }  # fmt: skip
    for magnitude, expected in ((10, strongest), (30, strongest), (0, weakest)):
        rounds.clear()
        run(RandAugment(count=1, magnitude=magnitude))
        got = {name: {round(value, 9) for value in values} for name, values in by_name(rounds[0]).items()}
        assert got == {name: {round(value, 9) for value in values} for name, values in expected.items()}


def test_magnitude_zero_of_the_paper_changes_nothing_but_what_has_no_strength():
    images = torch.rand(COUNT, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    got = RandAugment(count=1, magnitude=0)(images, Draws(0, 0, torch.arange(COUNT)))
    changed = sum(float((a - b).abs().max()) > 1e-5 for a, b in zip(got, images, strict=True))
    # Equalize leaves images of fewer than 255 pixels alone, so autocontrast only: 1 operation of 14.
    assert stats.binomtest(changed, COUNT, 1 / 14).pvalue > 1e-4


def test_raug15_has_whole_magnitudes_from_0_to_14_which_are_not_cut_off(rounds):
    run(RandAugment(count=2, magnitude=15, below=True, space="repvgg"))
    turns = Counter(round(abs(value) / 3) for value in by_name(rounds[0] + rounds[1])["rotate"])
    assert set(turns) == set(range(15))
    assert evenly(turns.values())
    got = by_name(rounds[0] + rounds[1])
    assert {round(value, 9) for value in got["brightness"]} == {round(0.1 + 0.18 * level, 9) for level in range(15)}
    assert set(got["solarize"]) == {int(25.6 * level) for level in range(15)}
    assert set(got["solarize_add"]) == {11 * level for level in range(15)}
    assert set(got["posterize"]) == {0, 1, 2, 3, 4, 5}
    assert {round(224 * value) for value in got["cutout"]} == {2, *range(4, 57, 4)}
    assert set(got["invert"]) == {0.0}


def test_increasing_operations_of_timm_at_magnitude_9(rounds):
    run(RandAugment(count=1, magnitude=9, space="timm", probability=0.5))
    got = {name: {round(value, 9) for value in values} for name, values in by_name(rounds[0]).items()}
    assert got == {
        "identity": {0.0}, "autocontrast": {0.0}, "equalize": {0.0}, "invert": {0.0}, "rotate": {-27.0, 27.0},
        "posterize": {1}, "solarize": {26}, "solarize_add": {99}, "shear_x": {-0.27, 0.27}, "shear_y": {-0.27, 0.27},
        "translate_x": {-0.405, 0.405}, "translate_y": {-0.405, 0.405},
        **{key: {0.19, 1.81} for key in ("color", "contrast", "brightness", "sharpness")},
    }  # fmt: skip
    left = sum(operation.name == "identity" for operation in rounds[0])
    assert stats.binomtest(left, COUNT, 0.5).pvalue > 1e-4


def test_deviation_of_the_magnitude_is_normal_and_cut_off_at_the_strongest(rounds):
    for _ in range(2):
        run(RandAugment(count=8, magnitude=9, deviation=0.5))
    magnitudes = numpy.array([abs(value) / 3 for chosen in rounds[:8] for value in by_name(chosen)["rotate"]])
    assert magnitudes.max() <= 10
    # A normal number above 2 deviations is cut off.
    below = magnitudes[magnitudes < 9.99]
    assert stats.binomtest(len(magnitudes) - len(below), len(magnitudes), stats.norm.sf(1.98)).pvalue > 1e-4
    assert stats.kstest((below - 9) / 0.5, stats.truncnorm(-30, 1.98).cdf).pvalue > 1e-4


def test_signs_are_even(rounds):
    run(RandAugment(count=4, magnitude=10))
    values = by_name([operation for chosen in rounds for operation in chosen])["shear_x"]
    assert stats.binomtest(sum(value > 0 for value in values), len(values)).pvalue > 1e-4


def test_a_larger_count_begins_with_the_same_operations(rounds):
    run(RandAugment(count=2))
    run(RandAugment(count=5))
    assert rounds[:2] == rounds[2:4]


@pytest.mark.parametrize("policy", ["imagenet", "cifar10"])
def test_autoaugment_draws_pairs_evenly_and_parts_as_often_as_they_say(rounds, policy):
    run(AutoAugment(policy=policy))
    table = POLICIES[policy]
    expected = Counter()
    for first, second in table:
        for name, probability, _ in (first, second):
            expected[name] += probability / len(table) * COUNT
    got = Counter(operation.name for chosen in rounds for operation in chosen)
    left = got.pop("identity")
    assert left + sum(got.values()) == 2 * COUNT
    for name, count in expected.items():
        # Sums of probabilities up to 1 per image vary less than a binomial count of the same mean.
        assert abs(got[name] - count) < 5 * count**0.5, name
    # What comes second when nothing came first does not hang together with it.
    both = [[0, 0], [0, 0]]
    for first, second in zip(rounds[0], rounds[1], strict=True):
        both[first.name == "identity"][second.name == "identity"] += 1
    assert min(both[0] + both[1]) > 0


@pytest.mark.parametrize(("policy", "name"), [("imagenet", "imagenet_policy"), ("cifar10", "cifar10_policy")])
def test_policies_are_those_of_kornia(policy, name):
    from kornia.augmentation.auto.autoaugment import autoaugment as theirs

    def plain(part):
        operation, probability, magnitude = part
        operation = operation.replace("auto_contrast", "autocontrast")
        # Kornia leaves magnitudes that mean nothing out.
        strength = None if operation in ("autocontrast", "equalize", "invert") else magnitude
        return operation, probability, strength

    ours = [[plain(part) for part in pair] for pair in POLICIES[policy]]
    assert ours == [[plain(part) for part in pair] for pair in getattr(theirs, name)]


def test_magnitudes_of_autoaugment_are_ten_even_ones_over_the_ranges():
    even = numpy.linspace(0, 1, 10)
    for name, end in (("rotate", 30), ("shear_x", 0.3), ("translate_y", 150 / 331)):
        numpy.testing.assert_allclose([AUTOAUGMENT[name](value, -1) for value in even], -numpy.linspace(0, end, 10))
    numpy.testing.assert_allclose([AUTOAUGMENT["color"](value, -1) for value in even], numpy.linspace(0.1, 1.9, 10))
    numpy.testing.assert_allclose([AUTOAUGMENT["solarize"](value, 1) for value in even], numpy.linspace(256, 0, 10))
    assert [AUTOAUGMENT["posterize"](value, 1) for value in even] == numpy.round(numpy.linspace(8, 4, 10)).tolist()


def test_trivialaugment_draws_one_operation_and_one_of_31_strengths(rounds):
    run(TrivialAugment())
    assert len(rounds) == 1
    got = by_name(rounds[0])
    assert evenly([len(values) for values in got.values()], 14)
    steps = Counter(round(abs(value) / 135 * 30) for value in got["rotate"] + got["rotate"])
    assert set(steps) <= set(range(31))
    strengths = [round(abs(got_value) / end * 30) for name, end in (("rotate", 135), ("shear_x", 0.99), ("shift_x", 32))
                 for got_value in got[name]]  # fmt: skip
    assert evenly(numpy.bincount(strengths, minlength=31), 31)
    assert set(got["posterize"]) == {2, 3, 4, 5, 6, 7, 8}
    assert min(got["color"]) >= 1 - 0.99 - 1e-9
    assert max(got["color"]) <= 1.99 + 1e-9
    assert set(TRIVIAL_WIDE) == set(got)


@pytest.mark.parametrize("step", [RandAugment(), AutoAugment(), AutoAugment(policy="cifar10"), TrivialAugment()])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_stay_in_their_range_and_move(step, channels):
    images = torch.rand(128, channels, 32, 32, generator=torch.Generator().manual_seed(0))
    got = step(images, Draws(0, 0, torch.arange(128)))
    assert 0 <= float(got.min()) <= float(got.max()) <= 1
    changed = sum(not torch.equal(a, b) for a, b in zip(got, images, strict=True))
    assert changed > 64


def test_nothing_is_copied_when_nothing_is_chosen():
    images = torch.rand(4, 3, 8, 8)
    assert RandAugment(probability=0)(images, Draws(0, 0, torch.arange(4))) is images


@pytest.mark.parametrize("step", [RandAugment(), AutoAugment(), TrivialAugment(), Jitter()])
def test_other_channels_are_an_error(step):
    with pytest.raises(ValueError, match="1 or 3 channels here, got 4"):
        step(torch.rand(2, 4, 8, 8), Draws(0, 0, torch.arange(2)))


def test_without_kornia_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia.enhance", None)
    monkeypatch.setitem(sys.modules, "kornia", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'repkern\[train\]'"):
        build([RandAugment()])(torch.rand(64, 3, 8, 8), Draws(0, 0, torch.arange(64)))
