"""What the tests of this folder share: the import of `small_training`, and a process that trains."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import repkern

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))


class WorkerProcess:
    """A Python process that trains what it is told to; starting one takes longer than all of its trainings."""

    def __init__(self):
        environment = {**os.environ, "PYTHONPATH": str(Path(repkern.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(HERE / "training_worker.py")]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, folder, moment="", *numbers, then="stop"):
        """What it says about a training in `folder` that gets the first signal at the line `moment`."""
        print(folder, moment, then, sep="\t", file=self.process.stdin, flush=True)
        lines, left = [], list(numbers)
        while (line := self.process.stdout.readline().rstrip("\n")) != "end":
            assert self.process.poll() is None, "the process that trains ended"
            lines.append(line)
            if left and line in (moment, "heard"):
                self.process.send_signal(left.pop(0))
        assert not left, f"{moment} was never said"
        return lines


@pytest.fixture(scope="session")
def worker():
    if os.name == "nt":
        pytest.skip("POSIX signals")
    found = WorkerProcess()
    yield found
    found.process.kill()  # the end of its input may never come: other processes, forked since, hold the pipe
    found.process.wait()
    found.process.stdin.close()
    found.process.stdout.close()
