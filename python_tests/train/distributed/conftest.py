"""Trainings in several processes, started as a user starts them: by torchrun."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import repkern

HERE = Path(__file__).parent
LONGEST = 240  # seconds; a machine that is busy with other things is slow to import torch
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


def environment():
    paths = [str(Path(repkern.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    # Processes of a test that wait for each other must not wait for torch's usual ten minutes.
    ours = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1", "REPKERN_TIMEOUT_MINUTES": "2"}
    return {**os.environ, **ours}


class Launched:
    """A launcher and its processes. A context manager that leaves none of them behind."""

    def __init__(self, *arguments):
        self._process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)  # torchrun ends its processes, which have sessions of their own
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.communicate(timeout=60)
        self._process.kill()

    def send(self, number):
        self._process.send_signal(number)

    @property
    def running(self):
        return self._process.poll() is None

    def end(self):
        """(exit code, stderr)."""
        _, err = self._process.communicate(timeout=LONGEST)
        return self._process.returncode, err


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """Start `worker.py` with jobs (see there) by torchrun, or by other arguments of Python."""

    def begin(jobs, out, processes=2, launcher=None, options=()):
        plan = tmp_path_factory.mktemp("plan") / "jobs.json"
        plan.write_text(json.dumps(jobs))
        launch = (*TORCHRUN, str(processes), *options) if launcher is None else launcher
        return Launched(*launch, HERE / "worker.py", plan, out)

    return begin


@pytest.fixture
def launched():
    """Start what follows torchrun's own options, in two processes."""
    return lambda *arguments: Launched(*TORCHRUN, "2", *arguments)


@pytest.fixture(scope="session")
def run(start):
    """Run jobs to their end; returns what came of each, by name: one dict for each rank."""

    def to_the_end(jobs, out, **how):
        with start(jobs, out, **how) as launched:
            code, err = launched.end()
        assert code == 0, err
        assert "terminate called" not in err
        return results(out, [job["name"] for job in jobs])

    return to_the_end


def results(out, names):
    return {name: json.loads((Path(out) / f"{name}.json").read_text()) for name in names}


def beside(name):
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def training():
    """The module training.py."""
    return beside("training")


@pytest.fixture(scope="session")
def jobs_module():
    """The module jobs.py."""
    return beside("jobs")


@pytest.fixture(scope="session")
def alone(training):
    """The same trainings in this process alone."""

    def one(job):
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return training.train(**{key: value for key, value in job.items() if key not in ("name", "own_group")})
        finally:
            torch.set_num_threads(before)

    return one
