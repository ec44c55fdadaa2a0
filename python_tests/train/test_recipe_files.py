import pytest

from repkern.train.recipe import Recipe
from repkern.train.recipe_files import RecipeError, list_recipes, load_recipe, recipe_from_text, recipe_path
from repkern.train.recipe_schema import fields_of, find_field, suggestion


def problems(text, changes=()):
    with pytest.raises(RecipeError) as caught:
        recipe_from_text(text, "my.yaml", changes)
    return [str(problem) for problem in caught.value.problems]


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def made(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return made


def test_every_problem_is_listed_with_file_line_and_field():
    text = "train: {epochs: 3, epoch: 4}\noptimizer:\n  learning_rate: 0.1\n  name: sdg\n  lr: 1e-2\nlr: 3\n"
    assert problems(text) == [
        "my.yaml:1: train.epoch: there is no such field; did you mean train.epochs?",
        "my.yaml:3: optimizer.learning_rate: there is no such field; did you mean optimizer.lr?",
        "my.yaml:4: optimizer.name: must be 'sgd', 'adamw', 'rmsprop', 'repsgd' or 'repadamw', got 'sdg'; "
        "did you mean sgd?",
        "my.yaml:6: lr: there is no such field; did you mean optimizer.lr?",
    ]


def test_values_of_another_kind_are_refused():
    text = (
        "train:\n  epochs: '3'\n  batch_size: true\n  clip_norm: .nan\nmodel:\n  freeze: stem\n  options: 3\n"
        "  sync_norm: 1\nema: {decay: 2}\nname: 7\n"
    )
    assert problems(text) == [
        "my.yaml:2: train.epochs: must be a valid integer, got '3'",
        "my.yaml:3: train.batch_size: must be a valid integer, got True",
        "my.yaml:4: train.clip_norm: must be a finite number, got nan",
        "my.yaml:6: model.freeze: must be a list, got 'stem'",
        "my.yaml:7: model.options: must be a mapping of fields, got 3",
        "my.yaml:8: model.sync_norm: must be a valid boolean, got 1",
        "my.yaml:9: ema.decay: must be less than 1, got 2",
        "my.yaml:10: name: must be a text, got 7",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "my.yaml: a recipe is a mapping of sections (train:, model:, ...), got nothing"),
        ("- 1", "my.yaml: a recipe is a mapping of sections (train:, model:, ...), got a list"),
        ("3.5", "my.yaml: a recipe is a mapping of sections (train:, model:, ...), got a number"),
        ("about: a\nabout: b", "my.yaml:2: about is there twice (first in my.yaml:1)"),
        ("train:\n  epochs: 1\n  epochs: 2", "my.yaml:3: epochs is there twice (first in my.yaml:2)"),
        ("about: [1, 2", "my.yaml:1: is not YAML: expected ',' or ']', but got '<stream end>'"),
        ("\tabout: x", "my.yaml:1: is not YAML: found character '\\t' that cannot start any token"),
        ("about: a\n---\nabout: b", "my.yaml:2: is not YAML: but found another document"),
        ("about: a\x00b", "my.yaml: is not YAML: special characters are not allowed"),
        ("a: " + "[" * 5000, "my.yaml: is nested too deep"),
        ("a: &me [*me]", "my.yaml: is nested too deep"),
        ("1: 2", "my.yaml:1: names of fields are texts; put other ones in quotes"),
        ("? [a]\n: 3", "my.yaml:1: names of fields are texts; put other ones in quotes"),
        ("about: !!python/name:os.system", "my.yaml:1: the tag 'tag:yaml.org,2002:python/name:os.system' is"),
        ("about: !!binary aGVsbG8=", "my.yaml:1: the tag 'tag:yaml.org,2002:binary' is not allowed"),
        ("train: {seed: !!int x}", "my.yaml:1: 'x' is no int"),
        ("optimizer: 3", "my.yaml:1: optimizer: must be a mapping of fields, got 3"),
        ("version: 2\nfuture: {}", "my.yaml:1: version: 2 is newer than this repkern, which reads recipes of"),
        ("version: '1'", "my.yaml:1: version: must be 1, got '1'"),
        ("optimizer: {name: repsgd}", "my.yaml:1: optimizer.name repsgd needs optimizer.scales, a file of scales"),
        ("paper: {top1: 70}", "my.yaml:1: paper.source: is missing"),
        ("paper: {source: x, top1: 170}", "my.yaml:1: paper.top1: must be less than or equal to 100, got 170"),
        ("train: {epochs: -0x1}", "my.yaml:1: train.epochs: must be a valid integer, got '-0x1'"),
    ],
)  # fmt: skip
def test_what_is_no_recipe_is_named(text, expected):
    assert len(found := problems(text)) == 1
    assert found[0].startswith(expected)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (
            "[{name: crop},\n {name: flip,\n horizontl: 1}]",
            "my.yaml:4: data.augment.1.flip.horizontl: there is no such field; did you mean data.augment.1.flip.horiz",
        ),
        (
            "[\n{name: crop,\n padding: -1}]",
            "my.yaml:4: data.augment.0.crop.padding: must be greater than or equal to 1",
        ),
        ("[{name: flipp}]", "my.yaml:2: data.augment.0: name must be one of 'flip', 'crop'"),
        ("[{name: flipp}]", "got 'flipp'; did you mean flip?"),
        ("[{padding: 3}]", "my.yaml:2: data.augment.0: needs a name: what it is, got {'padding': 3}"),
        ("[flip]", "my.yaml:2: data.augment.0: must be a mapping of fields, got 'flip'"),
        ("[{name: flip, xyz: 1}]", "my.yaml:2: data.augment.0.flip.xyz: there is no such field"),
    ],
)
def test_steps_of_augmentation(steps, expected):
    assert expected in problems(f"data:\n  augment: {steps}\n")[0]


def test_small_files_that_would_become_huge_are_refused():
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    assert "has more than 10000 values" in problems("\n".join(levels))[0]
    assert "is larger than 1048576 bytes" in problems_of_file("#" * (1 << 20) + "\n")


def problems_of_file(text, tmp="large.yaml"):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / tmp
        path.write_text(text)
        with pytest.raises(RecipeError) as caught:
            load_recipe(path)
    return str(caught.value)


def test_scalars_are_those_of_yaml_1_2():
    recipe = recipe_from_text(
        "about: no\nmodel: {options: {a: 1e-3, b: 1:30, c: 2001-01-01, d: yes, e: 007, f: ~, g: -2, h: true, i: 1.}}"
    )
    assert recipe.about == "no"
    assert recipe.model.options == {
        "a": 1e-3, "b": "1:30", "c": "2001-01-01", "d": "yes", "e": "007", "f": None, "g": -2, "h": True, "i": 1.0,
    }  # fmt: skip
    assert recipe_from_text("optimizer: {lr: 1, betas: [0.5, 0.9]}").optimizer.betas == (0.5, 0.9)


def test_a_base_is_merged_field_by_field_and_lists_are_replaced(write):
    write(
        "low.yaml", "name: low\nabout: low\npaper: {source: x}\ntrain: {epochs: 7, batch_size: 32}\nema: {every: 3}\n"
    )
    write(
        "sub/mid.yaml",
        "base: ../low.yaml\nmodel: {options: {a: 1, b: {c: 2}}, freeze: [stem.*]}\nschedule: {milestones: [1, 2]}\n",
    )
    top = write(
        "top.yaml",
        "base: sub/mid.yaml\nmodel: {options: {b: {d: 3}}, freeze: []}\ntrain: {epochs: 9}\nema: null\n"
        "schedule: {milestones: [5]}\n",
    )
    recipe = load_recipe(top)
    assert (recipe.train.epochs, recipe.train.batch_size, recipe.ema) == (9, 32, None)
    assert recipe.model.options == {"a": 1, "b": {"c": 2, "d": 3}}
    assert (recipe.model.freeze, recipe.schedule.milestones) == ((), (5.0,))
    assert (recipe.name, recipe.about, recipe.paper) == ("top", "", None)  # not those of another recipe


def test_a_file_may_have_nothing_but_a_base(write):
    write("low.yaml", "train: {epochs: 7}\nmodel: {options: {a: 1}}\n")
    assert load_recipe(write("same.yaml", "base: low.yaml\n")).train.epochs == 7
    assert load_recipe(write("none.yaml", "base: same.yaml\nmodel: {options: {}}\n")).model.options == {}


def test_problems_name_the_file_of_the_value(write):
    write("low.yaml", "train: {epochs: 7}\noptimizer:\n  lr: -1\n")
    top = write("top.yaml", "base: low.yaml\ntrain:\n  batch: 8\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(top)
    assert [str(problem) for problem in caught.value.problems] == [
        "low.yaml:3: optimizer.lr: must be greater than 0, got -1",
        "top.yaml:3: train.batch: there is no such field; did you mean train.batch_size?",
    ]
    assert str(caught.value).startswith("2 problems:\n  low.yaml:3")


def test_circles_are_named(write):
    write("a.yaml", "base: b.yaml\n")
    write("b.yaml", "base: ./c.yaml\n")
    write("c.yaml", "base: b.yaml\n")
    with pytest.raises(RecipeError, match=r"in a circle: b.yaml -> c.yaml -> b.yaml"):
        load_recipe("a.yaml")
    write("self.yaml", "base: self.yaml\n")
    with pytest.raises(RecipeError, match=r"self.yaml -> self.yaml"):
        load_recipe("self.yaml")


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("3", "bad.yaml:2: base: is the name or the path of a recipe, got 3"),
        ("''", "bad.yaml:2: base: a recipe is a name or a path, got an empty text"),
        ("nowhere.yaml", "bad.yaml:2: base: there is no file"),
        ("sub/", "bad.yaml:2: base: sub is a folder, a recipe is a file"),
        ("other", "bad.yaml:2: base: there is no recipe 'other' that comes with repkern; did you mean the file"),
        ("digits_plian", "bad.yaml:2: base: there is no recipe 'digits_plian'; did you mean digits_plain?"),
    ],
)  # fmt: skip
def test_bases_that_are_not_there(write, base, expected):
    write("other.yaml", "{}")
    write("sub/x.yaml", "{}")
    write("bad.yaml", f"about: x\nbase: {base}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe("bad.yaml")
    assert str(caught.value).replace(str(recipe_path("other.yaml").parent.resolve()) + "/", "").startswith(expected)


def test_a_newer_base_is_refused(write):
    write("new.yaml", "version: 3\n")
    write("old.yaml", "base: new.yaml\n")
    with pytest.raises(RecipeError, match=r"new.yaml:1: version: 3 is newer than this repkern.*pip install -U repkern"):
        load_recipe("old.yaml")


def test_files_that_cannot_be_read(write, tmp_path):
    with pytest.raises(RecipeError, match=r"there is no file 'none.yaml'"):
        load_recipe("none.yaml")
    with pytest.raises(RecipeError, match=r"there is no file 'a\\x00.yaml'"):
        load_recipe("a\0.yaml")
    with pytest.raises(RecipeError, match=r"is a folder, a recipe is a file"):
        load_recipe(f"{tmp_path}/")
    with pytest.raises(RecipeError, match=r"there is no recipe 'resnet'"):
        load_recipe("resnet")
    (tmp_path / "latin.yaml").write_bytes(b"about: caf\xe9\n")
    with pytest.raises(RecipeError, match=r"latin.yaml: is not UTF-8 \(byte 10\)"):
        load_recipe("latin.yaml")


def test_changes_are_laid_over_the_file(write):
    path = write("my.yaml", "optimizer: {lr: 0.5, layer_lr: {head.*: 2}}\ntrain: {epochs: 3}\n")
    recipe = load_recipe(
        path,
        [
            "optimizer.lr=0.05",
            "optimizer.layer_lr.stages.0.*=0.1",
            "model.options.block_options.scaling=scalar",
            "ema.decay=0.9",
            "data.root=",
            "schedule.milestones=[30, 60]",
            "train.epochs=5",
            "about=a=b",
            "model.replace={block: OREPAConv2d, preserve: true}",
        ],
    )
    assert recipe.optimizer.lr == 0.05
    assert recipe.optimizer.layer_lr == {"head.*": 2.0, "stages.0.*": 0.1}
    assert recipe.model.options == {"block_options": {"scaling": "scalar"}}
    assert recipe.ema.decay == 0.9
    assert recipe.schedule.milestones == (30.0, 60.0)
    assert (recipe.train.epochs, recipe.about, recipe.data.root) == (5, "a=b", "")
    assert recipe.model.replace.preserve is True
    assert recipe.name == "my"


def test_later_changes_win():
    assert recipe_from_text("{}", changes=["train.seed=1", "train.seed=2"]).train.seed == 2


def test_changes_that_cannot_be_are_named():
    changes = [
        "optimizer.lrr=1", "foo", "lr=2", "=3", "optimizer.lr.x=1", "optimizer.name=sgd", "train={",
        "base=digits_plain",
    ]  # fmt: skip
    assert problems("{}", changes) == [
        "--set optimizer.lrr=1: optimizer.lrr: there is no such field; did you mean optimizer.lr?",
        "--set foo: needs a field and a value: --set optimizer.lr=0.05",
        "--set lr=2: lr: there is no such field; did you mean optimizer.lr?",
        "--set =3: needs a field and a value: --set optimizer.lr=0.05",
        "--set optimizer.lr.x=1: optimizer.lr.x: there is no such field; did you mean optimizer.lr?",
        "--set train={: is not YAML: expected the node content, but found '<stream end>'",
        "--set base=digits_plain: base: there is no such field",
    ]
    assert problems("{}", ["optimizer.lr=abc"]) == [
        "--set optimizer.lr=abc: optimizer.lr: must be a valid number, got 'abc'"
    ]
    assert problems("{}", ["train.epochs=1.5"])[0].startswith("--set train.epochs=1.5: train.epochs: must be")
    assert problems("train: {epochs: 3}", ["train=4"]) == ["--set train=4: train: must be a mapping of fields, got 4"]


def test_the_name_is_that_of_the_file(write):
    assert load_recipe(write("mine.yaml", "{}")).name == "mine"
    assert load_recipe(write("mine.yaml", "name: called\n")).name == "called"


def test_a_recipe_survives_being_written():
    recipe = recipe_from_text("optimizer: {lr: 0.3}\nema: {decay: 0.9}\nschedule: {milestones: [3]}")
    assert Recipe.model_validate_json(recipe.to_json(), strict=True) == recipe
    assert recipe_from_text(recipe.to_json()) == recipe  # JSON is YAML


def test_every_field_can_be_found_and_is_suggested():
    names = [field.name for field in fields_of(Recipe)]
    assert {"train.epochs", "ema.decay", "model.replace.preserve", "paper.top1", "optimizer"} <= set(names)
    for name in names:
        assert find_field(Recipe, name.split(".")) == name.split(".")
    assert suggestion(Recipe, ["model", "replace", "preserved"]) == "model.replace.preserve"
    assert suggestion(Recipe, ["xyzzy"]) == ""


def test_names_of_recipes_are_listed():
    names = list_recipes()
    assert names == sorted(names)
    assert "digits_plain" in names
    assert not any(name.startswith("_") for name in names)
    assert set(names) < set(list_recipes(hidden=True))
