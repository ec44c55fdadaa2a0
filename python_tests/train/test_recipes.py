"""The recipes that come with repkern, and the page about them."""

import importlib.util
from pathlib import Path

import pytest
import torch

from repkern.train.build import build_model
from repkern.train.optimizers import make_optimizer
from repkern.train.preview import DataOutline, outline_of
from repkern.train.recipe_files import list_recipes, load_recipe
from repkern.train.recipe_list import recipe_lines, schema_lines

ROOT = Path(__file__).resolve().parents[2]
NAMES = list_recipes()


def generator():
    spec = importlib.util.spec_from_file_location("make_recipe_docs", ROOT / "benchmarks" / "make_recipe_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current():
    made = generator()
    assert made.PAGE.read_text(encoding="utf-8") == made.page(), "python benchmarks/make_recipe_docs.py writes it anew"


def test_every_recipe_and_every_field_is_on_the_page():
    text = generator().page()
    for name in NAMES:
        assert text.count(f"| `{name}` |") == 1
    for _, _, fields in schema_lines():
        for field in fields:
            assert f"| `{field.name.rpartition('.')[2]}` |" in text


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_says_where_it_comes_from(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert (recipe.paper is None) == bool(recipe.about), "a row of a table has its source, any other recipe a text"
    assert (recipe.data.name in ("digits", "fashion_mnist")) == (recipe.paper is None and name != "finetune_folder")
    assert recipe.about or name.split("_")[0] in recipe.paper.source.lower()


def test_lines_say_what_is_trained():
    (line,) = recipe_lines("orepa_table3_scalar")
    assert (line.network, line.block, line.data, line.epochs) == ("resnet18", "orepa (scaling scalar)", "imagenet", 120)
    assert (line.source, line.top1) == ("OREPA (2204.00826), table 3", 72.04)
    (line,) = recipe_lines("repvgg_table7_dirac")
    assert line.block == "conv_bn, DiracConv2d"
    assert [line.name for line in recipe_lines("repvgg_table5_*")] == [
        "repvgg_table5_b2g4", "repvgg_table5_b3", "repvgg_table5_b3g4",
    ]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_builds(name):
    """On the meta device: names, blocks, options and patterns exist; the data section is one that can be opened."""
    recipe = load_recipe(name)
    data = known_outline(recipe)
    # The weights a recipe begins with are a file that its user has.
    model = recipe.model.model_copy(update={"checkpoint": ""})
    with torch.device("meta"):
        network = build_model(recipe.model_copy(update={"model": model}), data).eval()
        scores = network(torch.empty(2, data.channels, data.image_size, data.image_size))
    assert scores.shape == (2, len(data.classes))
    if recipe.model.replace is not None:
        assert any(type(module).__name__ == recipe.model.replace.block for module in network.modules())
    frozen = [name for name, parameter in network.named_parameters() if not parameter.requires_grad]
    constant = recipe.model.block == "csla"  # scales that are not trained
    assert bool(frozen) == bool(recipe.model.freeze) or constant
    if recipe.optimizer.layer_lr and not recipe.optimizer.scales:
        make_optimizer(network, recipe)


def known_outline(recipe):
    if recipe.data.name == "folder":
        return DataOutline(tuple("abc"), 3, recipe.data.image_size)
    return outline_of(recipe)
