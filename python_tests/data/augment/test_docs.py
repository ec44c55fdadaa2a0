"""docs/augmentation.md says what there is: every step, every option with its default, and steps that can be read."""

import re
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from repkern.data.augment import Mix, Step

yaml = pytest.importorskip("yaml")
PAGE = Path(__file__).resolve().parents[3] / "docs" / "augmentation.md"
STEPS = Step.__origin__.__args__


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_every_option_is_there_with_its_default(step):
    fields = dict(step.model_fields)
    name = fields.pop("name").default
    row = next(line for line in PAGE.read_text().splitlines() if line.startswith(f"| `{name}` |"))
    said = dict(re.findall(r"`(\w+): ([^`]+)`", row))
    assert set(said) == set(fields)
    for field, text in said.items():
        value, default = yaml.safe_load(text), fields[field].default
        if isinstance(default, tuple):
            assert value == pytest.approx(default, rel=0.02)  # 1/3 and 1/0.3 are rounded on the page
        else:
            assert value == default


def test_options_of_mixing_are_there_with_their_defaults():
    text = PAGE.read_text()
    for field, info in Mix.model_fields.items():
        said = re.search(rf"`{field}: ([^`]+)`", text[text.index("`mix` is mixup") :])
        assert yaml.safe_load(said[1]) == info.default


def test_steps_of_the_recipes_can_be_read():
    read = 0
    for text in re.findall(r"\{name: [^}]+\}", PAGE.read_text()):
        TypeAdapter(Step).validate_python(yaml.safe_load(text))
        read += 1
    assert read >= 10
