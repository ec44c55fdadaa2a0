"""What a person sees while a network is trained."""

import io
import re

import pytest
from rich.console import Console

from repkern.cli import _progress
from repkern.cli._progress import training_progress
from repkern.train import Callback
from repkern.train.build import build_data, build_trainer
from repkern.train.meters import metrics_so_far
from repkern.train.recipe_files import load_recipe

pytest.importorskip("sklearn")

CHANGES = (
    "model.options={widths: [4, 8], blocks: 1}", "data.augment=[]", "data.limit=256", "train.epochs=2",
    "train.threads=1", "train.device=cpu",
)  # fmt: skip


def train(console, *callbacks, changes=()):
    recipe = load_recipe("digits_plain", [*CHANGES, *changes])
    with (
        training_progress(console) as progress,
        build_trainer(recipe, build_data(recipe), callbacks=[progress("train"), *callbacks]) as trainer,
    ):
        return trainer.fit()


def made(terminal, width=200):
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None, highlight=False)


def test_a_pipe_gets_a_line_an_epoch():
    console = made(False)
    rows = train(console)
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 2
    pattern = r"train  epoch  2/2  train loss \d\.\d{4}  test loss \d\.\d{4}  test accuracy +\d+\.\d\d %  \d+\.\d s"
    assert re.fullmatch(pattern, lines[1])
    assert f"{rows[1]['train_loss']:.4f}" in lines[1]


def test_epochs_without_a_test():
    console = made(False)
    train(console, changes=["train.eval_every=2"])
    first, second = console.file.getvalue().splitlines()
    assert "test" not in first
    assert "test accuracy" in second


def test_a_long_epoch_gets_lines(monkeypatch):
    monkeypatch.setattr(_progress, "_LINE", 0.0)  # every step is a minute
    console = made(False)
    train(console)
    lines = [line for line in console.file.getvalue().splitlines() if "step" in line]
    assert len(lines) == 8
    pattern = (
        r"train  epoch  1/2  step 3/4  loss \d\.\d{4}  accuracy \d+\.\d\d %  [\d,]+ images/s  \d+\.\d GB  \d+ s left"
    )
    assert re.fullmatch(pattern, lines[2])
    assert lines[-1].endswith(" 0 s left")


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr(_progress, "_REFRESH", 0.0)
    console = made(True)
    rows = train(console)
    text = console.file.getvalue()
    assert f"epoch  2/2  loss {rows[-1]['train_loss']:.4f}" in text
    assert f"test {100 * rows[-1]['test_accuracy']:.2f} %" in text
    assert "images/s" in text
    assert "GB" in text


def test_the_figures_of_a_running_epoch_are_those_of_its_end():
    class Look(Callback):
        seen = ()

        def on_step_end(self, trainer):
            if trainer.step == trainer.steps_per_epoch:
                self.seen = metrics_so_far(trainer.task, trainer.meters_state())

    look = Look()
    row = train(made(False), look)[0]
    assert look.seen == {name: row[name] for name in ("train_loss", "train_accuracy")}
    assert metrics_so_far(None, {}) == {}


def test_times():
    assert [_progress._time(s) for s in (0.2, 59, 61, 3599, 12_000)] == [
        "0 s",
        "59 s",
        "1 min",
        "1 h 0 min",
        "3 h 20 min",
    ]
