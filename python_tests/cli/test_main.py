import pytest

import repkern


def test_version(command):
    assert command("--version") == (0, f"repkern {repkern.__version__}\n", "")


def test_help_names_every_command_and_the_exit_codes(command):
    code, out, _ = command("--help")
    assert code == 0
    for text in ("quickstart", "info", "bench", "0 done, 1 failed, 2 wrong use, 130"):
        assert text in out


@pytest.mark.parametrize("name", ["quickstart", "info"])
def test_help_of_a_command_shows_examples(command, name):
    code, out, _ = command(name, "--help")
    assert code == 0
    assert "Examples" in out
    assert out.count(f"repkern {name}") >= 2


@pytest.mark.parametrize(
    "words",
    [
        ["nonsense"],
        ["--nonsense"],
        ["info", "extra"],
        ["quickstart", "--epochs", "0"],
        ["quickstart", "--epochs", "many"],
        ["quickstart", "--threads", "0"],
        ["quickstart", "--seed", "-1"],
        ["quickstart", "--seed", "4294967296"],
        ["quickstart", "--device", "tpu"],
    ],
)
def test_wrong_use_is_exit_code_2(command, words):
    code, out, err = command(*words)
    assert code == 2
    assert out == ""
    assert "Error" in err


@pytest.mark.parametrize("module", ["repkern", "repkern.cli.main"])
def test_the_module_runs_as_a_script(run_python, module):
    done = run_python("-m", module, "--help")
    assert "Usage: repkern [OPTIONS] COMMAND" in done.stdout
    done = run_python("-m", module, "--version")
    assert (done.returncode, done.stdout) == (0, f"repkern {repkern.__version__}\n")
