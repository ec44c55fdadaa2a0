"""Worker processes: they stay, they go when nobody needs them, and their death is an error that says what to do."""

import gc
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import repkern
from repkern.data import DataRecipe, DataWorkerError, ImageSource, Shard, open_data

pytestmark = [
    pytest.mark.usefixtures("no_process_is_left"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),  # on machines of fewer cores
]


@pytest.fixture
def make_source(make_set):
    sources = []

    def make(**options):
        sources.append(
            ImageSource(make_set(50), make_set(13), **({"batch_size": 5, "seed": 0, "workers": 2} | options))
        )
        return sources[-1]

    yield make
    for source in sources:
        source.close()


def children():
    return {process.pid for process in multiprocessing.active_children()}


def test_workers_stay_from_epoch_to_epoch_and_for_tests(make_source):
    source = make_source()
    assert not children()
    list(source.train_batches(0))
    started = children()
    assert len(started) == 2
    list(source.test_batches())
    list(source.train_batches(1))
    assert children() == started
    source.close()
    assert not children()
    assert len(list(source.train_batches(0))) == 10


def test_workers_stay_when_nobody_asks_for_more_than_the_last_batch(make_source):
    source = make_source()
    batches = source.train_batches(0)
    for _ in range(10):
        next(batches)
    batches.close()
    started = children()
    assert len(started) == 2
    list(source.test_batches())
    assert children() == started


def test_workers_end_when_an_epoch_is_left_in_its_middle(make_source):
    source = make_source()
    batches = source.train_batches(0)
    next(batches)
    assert len(children()) == 2
    del batches
    assert not children()


def test_workers_end_with_their_source(make_set):
    source = ImageSource(make_set(50), make_set(13), batch_size=5, seed=0, workers=1)
    list(source.train_batches(0))
    assert len(children()) == 1
    del source
    gc.collect()
    assert not children()


def test_nothing_to_read_starts_no_workers(make_source):
    assert list(make_source().train_batches(0, 10)) == []
    assert not children()


def test_a_test_in_the_middle_of_an_epoch_has_workers_of_its_own(make_source):
    source = make_source()
    expected = [batch.labels.tolist() for batch in make_source(workers=0).train_batches(0)]
    batches = source.train_batches(0)
    found = [next(batches).labels.tolist()]
    assert sum(len(batch.labels) for batch in source.test_batches()) == 13
    found += [batch.labels.tolist() for batch in batches]
    assert found == expected


def test_a_killed_worker_is_named_with_what_to_do(make_source):
    source = make_source(batch_size=1)
    batches = source.train_batches(0)
    next(batches)
    victim = min(children())
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(DataWorkerError, match=rf"process {victim} was killed by SIGKILL.*data.workers, now 2"):
        list(batches)
    assert not children()
    assert len(list(source.train_batches(0))) == 50  # new ones


def test_a_worker_killed_between_epochs_is_an_error_of_the_next(make_source):
    source = make_source(workers=1)
    list(source.train_batches(0))
    (victim,) = children()
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(DataWorkerError, match=f"1 of 1 data workers ended: process {victim}"):
        next(source.train_batches(1))


def failing(images, draws):
    raise RuntimeError("no such colour")


def test_an_error_of_an_augmentation_comes_with_its_traceback(make_source):
    with pytest.raises(RuntimeError, match=r"in failing(.|\n)*no such colour"):
        list(make_source(augment=failing).train_batches(0))


@pytest.mark.parametrize("name", ["SIGINT", "SIGUSR1"])
def test_signals_to_the_whole_group_do_not_end_workers(make_source, name):
    source = make_source()
    batches = source.train_batches(0)
    next(batches)
    for pid in children():
        os.kill(pid, getattr(signal, name))
    assert len(list(batches)) == 9


def test_torchs_handler_of_dead_children_is_taken_out(make_source):
    before = signal.getsignal(signal.SIGCHLD)
    batches = make_source().train_batches(0)
    next(batches)
    assert signal.getsignal(signal.SIGCHLD) == before
    batches.close()


def test_what_workers_get_can_be_sent_to_another_process():
    recipe = DataRecipe(augment=({"name": "flip"},), mix={"mixup": 0.2})
    source = open_data(recipe, batch_size=16, seed=0)
    reader = source._pool._reader
    piece = next(source._train_pieces(0, 0, Shard()))
    again = pickle.loads(pickle.dumps(reader))[piece]
    assert torch.equal(again.batch.images, reader[piece].batch.images)


_SPAWNING = """
import multiprocessing, torch
from repkern.data import DataRecipe, open_data

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    found = []
    for workers in (0, 1):
        recipe = DataRecipe(augment=({"name": "flip"}, {"name": "crop", "padding": 1}), workers=workers)
        source = open_data(recipe, batch_size=32, seed=0)
        found.append(torch.cat([batch.images for epoch in (0, 1) for batch in source.train_batches(epoch)]))
        source.close()
    print(torch.equal(*found))
"""


def test_workers_that_are_not_forked_give_the_same_bits(run_python, tmp_path):
    pytest.importorskip("sklearn")
    script = tmp_path / "spawning.py"
    script.write_text(_SPAWNING)
    found = run_python("-W", "ignore", script)
    assert (found.stdout, found.stderr) == ("True\n", "")


_WAITING = """
import sys, time, torch
from repkern.data import ImageSource, MemoryData
images = MemoryData(torch.zeros(400, 1, 4, 4, dtype=torch.uint8), torch.arange(400) % 10)
source = ImageSource(images, images, batch_size=4, seed=0, workers=2)
batches = source.train_batches(0)
next(batches)
import multiprocessing
print(*[process.pid for process in multiprocessing.active_children()], flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")
def test_no_worker_survives_the_main_process():
    environment = {**os.environ, "PYTHONPATH": str(Path(repkern.__file__).parents[1])}
    command = [sys.executable, "-W", "ignore", "-c", _WAITING]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    mains = [subprocess.Popen(command, env=environment, **pipes) for _ in range(3)]
    workers = [int(pid) for main in mains for pid in main.stdout.readline().split()]
    assert len(workers) == 6
    for main, number in zip(mains, (signal.SIGINT, signal.SIGTERM, signal.SIGKILL), strict=True):
        main.send_signal(number)
    for main in mains:
        main.wait(timeout=60)
        main.stdout.close()
    end = time.monotonic() + 60  # torch's workers look for their parent every five seconds
    while any(_state(pid) != "Z" for pid in workers):
        assert time.monotonic() < end, "a worker is still there"
        time.sleep(0.1)


def _state(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"
