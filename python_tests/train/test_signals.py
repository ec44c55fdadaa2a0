"""Signals to a training in a process of its own: it saves and says so, and what is resumed equals a whole run."""

import os
import signal
import threading

import pytest
from small_training import EPOCHS, STEPS, assert_same, make_trainer

from repkern.train.signals import StopRequest, stop_requests

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")


@pytest.fixture(autouse=True)
def _not_ignored():
    """As it is unless a shell began these tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def whole():
    trainer = make_trainer()
    trainer.fit()
    return trainer


@pytest.mark.parametrize(
    ("number", "moment", "last"),
    [
        (signal.SIGTERM, "step 3", "interrupted by SIGTERM at 4, step_00000004"),
        (signal.SIGINT, "testing", f"interrupted by SIGINT at {STEPS}, step_{STEPS:08d}"),
        (signal.SIGUSR1, "saved step_00000004", "interrupted by SIGUSR1 at 5, step_00000005"),
        (signal.SIGTERM, f"step {EPOCHS * STEPS}", "interrupted by SIGTERM at 18, step_00000018"),
    ],
)
def test_it_is_saved_and_resumes(tmp_path, worker, whole, number, moment, last):
    assert worker.run(tmp_path, moment, number)[-1] == last
    resumed = make_trainer(tmp_path, checkpoint={"every_steps": 4})
    assert resumed.resume().step == int(last.rpartition("_")[2])
    resumed.fit()
    assert_same(whole, resumed)


def test_at_the_last_checkpoint_nothing_is_left_to_interrupt(tmp_path, worker):
    assert worker.run(tmp_path, "saved step_00000018", signal.SIGTERM)[-1].startswith("done at 18,")


def test_a_second_ctrl_c_ends_it_at_once_with_what_was_saved(tmp_path, worker, whole):
    lines = worker.run(tmp_path, "step 6", signal.SIGINT, signal.SIGINT, then="again")
    assert lines[-1] == "interrupted by SIGINT at 6, step_00000004"
    resumed = make_trainer(tmp_path, checkpoint={"every_steps": 4})
    assert resumed.resume().step == 4
    resumed.fit()
    assert_same(whole, resumed)


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    with stop_requests() as request:
        assert not request
        os.kill(os.getpid(), signal.SIGUSR1)
        assert request.name == "SIGUSR1"
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.name == "SIGTERM"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before


def test_the_second_ctrl_c_is_a_keyboard_interrupt():
    with stop_requests() as request:
        os.kill(os.getpid(), signal.SIGINT)
        assert request.name == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_requests() as request:
            os.kill(os.getpid(), signal.SIGINT)
            assert not request
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_nothing_is_installed():
    before, found = signal.getsignal(signal.SIGTERM), []

    def work():
        with stop_requests() as request:
            found.append((signal.getsignal(signal.SIGTERM), bool(request)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(before, False)]
    assert not StopRequest()
