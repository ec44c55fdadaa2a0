import pytest
import torch


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Run `repkern ...` in this process, as in a pipe, from an empty folder: exit code, standard output, error."""
    from typer.testing import CliRunner

    from repkern.cli.main import app

    monkeypatch.chdir(tmp_path)

    def run(*words):
        result = CliRunner().invoke(app, list(words), prog_name="repkern")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.stdout, result.stderr

    return run


@pytest.fixture
def small_recipe(monkeypatch):
    """small_recipe("quickstart", changes): the command trains a network small enough for a test."""
    from repkern.train import recipe_files

    real = recipe_files.load_recipe
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what the command takes by default; two would wait for each other on a busy machine
    small = {}

    def load(source, changes=(), **options):
        return real(source, [*small.get(source, ()), *changes], **options)

    monkeypatch.setattr(recipe_files, "load_recipe", load)
    yield small.__setitem__
    torch.set_num_threads(threads)
