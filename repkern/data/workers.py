"""Processes that read pieces ahead, in order, and live across epochs; or none, with the same results to the bit."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from repkern.data.errors import DataWorkerError, ImageSizeError, MissingExtraError
from repkern.data.reading import Piece, Read, Reader

__all__ = ["WorkerPool", "one_thread"]

_Result = TypeVar("_Result")
# Ctrl-C and a scheduler's warning reach the whole process group; what follows is the main process's affair.
_GROUP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGUSR1") if hasattr(signal, name)]
_AHEAD = 2  # pieces that each worker reads ahead


class WorkerPool:
    """Reads pieces with `workers` processes, which are started when they are first needed.

    They stay for the next call when a call is read to its end, and are ended when it is not. Calls at the same time
    have workers of their own.
    """

    def __init__(self, reader: Reader, workers: int) -> None:
        if workers < 0:
            raise ValueError(f"workers must be 0 or more, got {workers}")
        self._reader, self._workers = reader, workers
        self._idle: _Workers | None = None

    def read(self, pieces: Iterable[Piece], count: int) -> Iterator[Read]:
        """What is read for the `count` pieces, in their order. DataWorkerError when a process ends by itself."""
        if count == 0:
            return
        if self._workers == 0:
            for piece in pieces:
                with one_thread():
                    found = self._reader[piece]
                yield found
            return
        workers: _Workers | None = self._idle or _Workers(self._reader, self._workers)
        self._idle = None
        assert workers is not None
        try:
            for number, found in enumerate(workers.read(pieces), 1):
                if number == count and self._idle is None:  # before the last one: nobody may come back after it
                    self._idle, workers = workers, None
                yield found
                if workers is None:
                    return
        finally:
            if workers is not None:
                workers.close()

    def close(self) -> None:
        """End the processes; they are started again when they are needed."""
        if self._idle is not None:
            self._idle.close()
            self._idle = None


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread, as workers do: sums are rounded differently by another number. Costs below 1 us."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Workers:
    """A DataLoader whose sampler hands out the pieces of whoever reads from it."""

    def __init__(self, reader: Reader, count: int) -> None:
        self._count = count
        self._plan = _Plan()
        self._loader: DataLoader[Any] = DataLoader(
            _Pieces(reader),
            batch_size=None,
            sampler=self._plan,
            num_workers=count,
            collate_fn=_as_it_is,
            persistent_workers=True,
            prefetch_factor=_AHEAD,
            worker_init_fn=functools.partial(_begin_worker, os.getpid()),
            generator=torch.Generator(),  # else a number is drawn from the global one, which belongs to the model
        )
        self._processes: list[BaseProcess] = []
        self._iterator: Iterator[Any] = iter(())

    def read(self, pieces: Iterable[Piece]) -> Iterator[Read]:
        """What is read for the pieces, in their order."""
        self._plan.pieces = pieces
        self._guarded(self._begin)
        while (found := self._guarded(self._next)) is not None:
            if isinstance(found, Exception):
                raise found
            yield found

    def _begin(self) -> None:
        """Start the processes, or give them new pieces; then take out the signal handler that torch installs.

        It would raise in whatever line the main thread is when a worker ends, in the middle of a training step too.
        Here the next batch is where that is noticed.
        """
        # Windows has no such signal, and only the main thread may set handlers.
        child = getattr(signal, "SIGCHLD", None) if threading.current_thread() is threading.main_thread() else None
        before = None if child is None else signal.getsignal(child)
        with _group_signals_held():  # processes inherit that, and so hear none before they can ignore them
            self._iterator = iter(self._loader)
        self._processes = list(getattr(self._iterator, "_workers", ()))
        if child is not None and before is not None:
            signal.signal(child, before)

    def _next(self) -> Read | Exception | None:
        return next(self._iterator, None)

    def _guarded(self, call: Callable[[], _Result]) -> _Result:
        try:
            return call()
        except (RuntimeError, OSError, EOFError) as problem:
            if not isinstance(problem, RuntimeError):  # a connection broke: who ended can be told a moment later
                self._await_end()
            if not any(process.exitcode is not None for process in self._processes):
                raise
            text = str(problem) or type(problem).__name__
        raise DataWorkerError(self._why(text))

    def _await_end(self) -> None:
        ready = multiprocessing.connection.wait([process.sentinel for process in self._processes], timeout=1)
        for process in self._processes:
            if process.sentinel in ready:
                process.join(timeout=1)

    def _why(self, problem: str) -> str:
        ended = [process for process in self._processes if process.exitcode is not None]
        how = ", ".join(f"process {process.pid} {_exit(process.exitcode)}" for process in ended)
        return (
            f"{len(ended)} of {self._count} data workers ended: {how}. "
            "Often memory ran out (SIGKILL) or the shared memory in /dev/shm did (SIGBUS): use fewer workers "
            f"(data.workers, now {self._count}), smaller batches or images; 0 workers read in the main process. "
            f"The first sign of it: {problem.splitlines()[0]}"
        )

    def close(self) -> None:
        """End the processes: they finish what they are at. Who does not within seconds is killed."""
        # By name: an exception on its way, such as Ctrl-C, can hold the iterator and so delay its end.
        shut = getattr(self._iterator, "_shutdown_workers", None)
        if shut is not None:
            shut()
        self._plan.pieces, self._iterator = (), iter(())
        for process in self._processes:
            if process.is_alive():
                process.kill()
            process.join()
        self._processes = []


class _Plan:
    """A sampler that can be given new pieces."""

    def __init__(self) -> None:
        self.pieces: Iterable[Piece] = ()

    def __iter__(self) -> Iterator[Piece]:
        return iter(self.pieces)


class _Pieces(Dataset[Any]):
    """The reader as a data set. Errors that say all there is to say come back as they are, others with a traceback."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def __getitem__(self, piece: Piece) -> Read | Exception:
        try:
            return self._reader[piece]
        except (ImageSizeError, MissingExtraError) as problem:
            return problem


def _as_it_is(found: Any) -> Any:
    return found


def _begin_worker(parent: int, _: int) -> None:
    # torch's workers watch the parent that they have after this, and would never end when theirs is gone before.
    if multiprocessing.get_start_method() == "fork" and os.getppid() != parent:
        os._exit(1)
    for number in _GROUP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def _group_signals_held() -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _GROUP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _exit(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exited with status {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
