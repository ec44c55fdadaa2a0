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
def small_quickstart(monkeypatch):
    """`repkern quickstart` on a network small enough for a test."""
    import dataclasses

    from repkern.train import quickstart

    @dataclasses.dataclass(frozen=True)
    class Small(quickstart.QuickstartConfig):
        epochs: int = 2
        widths: tuple = (6, 8)
        blocks: int = 1
        batch_size: int = 256

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what the command takes by default; two would wait for each other on a busy machine
    monkeypatch.setattr(quickstart, "QuickstartConfig", Small)
    yield
    torch.set_num_threads(threads)
