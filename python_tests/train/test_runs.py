import pytest

from repkern.data import DataRecipe
from repkern.train import Recipe
from repkern.train.recipe import CheckpointRecipe, RunRecipe
from repkern.train.runs import RunError, open_run, read_recipe

A = Recipe(train=RunRecipe(epochs=5))
B = Recipe(train=RunRecipe(epochs=6))


def run(base, recipe=A, mode="auto", *, finish=False, given=()):
    with open_run(base, recipe, mode, given) as opened:
        if finish:
            opened.finish({})
        return opened


def test_first_run_takes_the_name_itself(tmp_path):
    opened = run(tmp_path / "deep" / "run")
    assert opened.path == tmp_path / "deep" / "run"
    assert not opened.resumed
    assert read_recipe(opened.path, Recipe) == A


def test_unfinished_is_continued_finished_is_not(tmp_path):
    base = tmp_path / "run"
    run(base)
    again = run(base, finish=True)
    assert (again.path, again.resumed) == (base, True)
    third = run(base)
    assert (third.path, third.resumed) == (tmp_path / "run-2", False)
    assert run(base).path == tmp_path / "run-2"


def test_other_settings_get_their_own_folder_and_leave_the_first_alone(tmp_path):
    base = tmp_path / "run"
    run(base, A)
    other = run(base, B, finish=True)
    assert other.path == tmp_path / "run-2"
    assert any("epochs 5, not 6" in note for note in other.notes)
    back = run(base, A)
    assert (back.path, back.resumed) == (base, True)


def test_where_and_how_often_it_is_saved_does_not_make_another_run(tmp_path):
    run(tmp_path / "run", A)
    often = A.model_copy(update={"checkpoint": CheckpointRecipe(every_steps=3)})
    assert run(tmp_path / "run", often).resumed


def test_fresh_never_continues(tmp_path):
    run(tmp_path / "run")
    assert run(tmp_path / "run", mode="fresh").path == tmp_path / "run-2"


def test_resume_takes_the_stored_settings(tmp_path):
    run(tmp_path / "run", A)
    opened = run(tmp_path / "run", B, "resume")
    assert opened.resumed
    assert opened.recipe == A


def test_resume_against_given_settings_is_an_error(tmp_path):
    run(tmp_path / "run", A)
    with pytest.raises(RunError, match=r"epochs 5, not 6; leave that option out"):
        run(tmp_path / "run", B, "resume", given=["train.epochs"])


def test_resume_may_be_elsewhere(tmp_path):
    run(tmp_path / "run", A)
    there = A.model_copy(
        update={"data": DataRecipe(root="there", workers=2, memory=0.5), "train": RunRecipe(epochs=7, threads=3)}
    )
    given = ["data.root", "data.workers", "train.threads"]
    for settings in (given, []):  # the second time it is remembered
        opened = run(tmp_path / "run", there, "resume", given=settings)
        assert opened.resumed
        assert (opened.recipe.data.root, opened.recipe.data.workers, opened.recipe.data.memory) == ("there", 2, 1.0)
        assert (opened.recipe.train.threads, opened.recipe.train.epochs) == (3, 5)


def test_workers_do_not_make_another_run(tmp_path):
    run(tmp_path / "run", A)
    opened = run(tmp_path / "run", A.model_copy(update={"data": DataRecipe(workers=2)}))
    assert (opened.resumed, opened.recipe.data.workers) == (True, 2)
    assert not run(tmp_path / "run", A.model_copy(update={"data": DataRecipe(root="there")})).resumed


def test_resume_needs_an_unfinished_run(tmp_path):
    with pytest.raises(RunError, match="no unfinished run"):
        run(tmp_path / "run", mode="resume")
    run(tmp_path / "run", finish=True)
    with pytest.raises(RunError, match="no unfinished run"):
        run(tmp_path / "run", mode="resume")


def test_a_foreign_folder_is_not_written_to(tmp_path):
    base = tmp_path / "run"
    base.mkdir()
    (base / "thesis.txt").write_text("years of work")
    assert run(base).path == tmp_path / "run-2"
    assert [path.name for path in base.iterdir()] == ["thesis.txt"]


def test_an_empty_folder_is_used(tmp_path):
    (tmp_path / "run").mkdir()
    assert run(tmp_path / "run").path == tmp_path / "run"


def test_a_file_in_the_way_is_an_error(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(RunError, match="is a file"):
        run(tmp_path / "run")


def test_names_that_only_look_like_a_number_are_not_ours(tmp_path):
    (tmp_path / "run-02").mkdir()
    (tmp_path / "run-two").mkdir()
    run(tmp_path / "run", finish=True)
    assert run(tmp_path / "run").path == tmp_path / "run-2"


def test_damaged_settings_are_left_alone_and_named(tmp_path):
    run(tmp_path / "run")
    (tmp_path / "run" / "recipe.json").write_text("{")
    opened = run(tmp_path / "run")
    assert opened.path == tmp_path / "run-2"
    assert "recipe.json" in opened.notes[0]


def test_two_processes_never_share_a_folder(tmp_path):
    pytest.importorskip("fcntl")
    with open_run(tmp_path / "run", A) as first, open_run(tmp_path / "run", A) as second:
        assert first.path != second.path
        with pytest.raises(RunError, match="another process is working"), open_run(tmp_path / "run", A, "resume"):
            pass
