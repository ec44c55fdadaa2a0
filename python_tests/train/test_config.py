import dataclasses
import json

import pytest

from repkern.train import TrainConfig
from repkern.train.quickstart import QuickstartConfig


def test_round_trip(tmp_path):
    config = QuickstartConfig(epochs=3, widths=(4, 8), seed=5)
    config.save(tmp_path / "config.json")
    assert QuickstartConfig.load(tmp_path / "config.json") == config


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("epochs", 0, "at least 1"),
        ("batch_size", -1, "at least 1"),
        ("threads", 0, "at least 1"),
        ("learning_rate", 0.0, "positive"),
        ("learning_rate", float("nan"), "positive"),
        ("momentum", 1.0, "in [0, 1)"),
        ("label_smoothing", -0.1, "in [0, 1)"),
        ("weight_decay", -1.0, "zero or more"),
        ("seed", -1, "zero or more"),
    ],
)
def test_impossible_values_are_named(name, value, wanted):
    with pytest.raises(ValueError) as caught:
        TrainConfig(**{name: value})
    assert str(caught.value) == f"{name} must be {wanted}, got {value}"


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"epoch": 3}', '{"epochs": "three"}', '{"epochs": 0}'])
def test_a_file_with_something_else_is_an_error_with_its_path(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"config.json does not hold the settings of a run"):
        TrainConfig.load(path)


def test_unknown_settings_are_named():
    with pytest.raises(ValueError, match=r"unknown setting epoch; there are: batch_size, device"):
        TrainConfig.from_dict({"epoch": 3})


def test_differences_name_both_values(tmp_path):
    stored = QuickstartConfig.from_dict(json.loads(json.dumps(QuickstartConfig(epochs=24).to_dict())))
    assert stored.differences(QuickstartConfig(epochs=3)) == ["epochs 24, not 3"]
    assert stored.differences(QuickstartConfig(epochs=24)) == []


@pytest.mark.parametrize(
    "text",
    [
        '{"widths": 3}', '{"widths": ["a"]}', '{"widths": [[1]]}', '{"device": 5}', '{"epochs": true}',
        '{"epochs": 1.5}',
        '{"epochs": [1]}', '{"learning_rate": "fast"}', '{"learning_rate": Infinity}', '{"threads": null}', "null", "3",
        "[" * 100_000, '{"a":' * 100_000,
    ],
)  # fmt: skip
def test_settings_of_other_kinds_are_an_error_with_the_path(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"config.json does not hold the settings of a run"):
        QuickstartConfig.load(path)


@dataclasses.dataclass(frozen=True)
class Own(TrainConfig):
    """Settings of a user's own."""

    note: str | None = None


def test_optional_settings_and_whole_numbers_are_fine():
    assert Own.from_dict({"note": None, "learning_rate": 1}).learning_rate == 1
    assert Own.from_dict({"note": "a"}).note == "a"
    with pytest.raises(TypeError, match=r"note must be .*None.*, got 3"):
        Own.from_dict({"note": 3})
