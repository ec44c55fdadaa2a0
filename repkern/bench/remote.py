"""Contestants in processes of their own, timed in turn: thread pools of different libraries disturb one another."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from repkern.bench.timing import Workload

__all__ = ["Remote", "serve"]

# What an idle OpenMP thread may spin before it sleeps (libgomp: 300,000 pauses of up to 140 cycles).
_SETTLE_SECONDS = 0.02
# A run shorter than this is repeated once before it is timed: others have had the caches since the last sample.
_WARM_BELOW_SECONDS = 0.05
_CLOSE_SECONDS = 5.0


class Remote:
    """A process that holds one contestant: `prepare` hands it work, `sample` times it, in between it sleeps.

    maker: "module:function"; function(*arguments) is called in the new process and returns an object whose
    `prepare(*args)` answers something picklable and makes `run()` callable; other methods are reached by `call`.
    An exception there is a RuntimeError here that names the contestant and says what went wrong; so is its death.
    """

    def __init__(self, name: str, maker: str, *arguments: Any) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, maker, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Remote:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def call(self, method: str, *args: Any) -> Any:
        """The answer of contestant.method(*args)."""
        self.ask(method, *args)
        return self.answer()

    def ask(self, method: str, *args: Any) -> None:
        """Start contestant.method(*args) without waiting; `answer` fetches the result."""
        with contextlib.suppress(BrokenPipeError):  # `answer` tells how it died
            self._pipe.send((method, args))

    def answer(self) -> Any:
        """The result of what was asked last."""
        try:
            worked, result = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join(_CLOSE_SECONDS)
            raise RuntimeError(f"{self.name}: its process ended with code {self._process.exitcode}") from None
        if not worked:
            raise RuntimeError(f"{self.name}: {result}")
        return result

    def prepare(self, *args: Any) -> Any:
        """The answer of contestant.prepare(*args)."""
        return self.call("prepare", *args)

    def sample(self, inner: int) -> float:
        """Seconds a run over `inner` runs."""
        time.sleep(_SETTLE_SECONDS)
        seconds = self.call("sample", inner)
        time.sleep(_SETTLE_SECONDS)
        return seconds

    def workload(self) -> Workload:
        """What `measure_pairs` takes."""
        return Workload(lambda _: None, sample=self.sample)

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self._process.join(_CLOSE_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._pipe.close()


def serve(pipe: Connection, maker: str, arguments: tuple[Any, ...]) -> None:
    """What runs in the process of a `Remote`: answers calls until None comes or the other side is gone."""
    os.dup2(2, 1)  # libraries print; standard output belongs to the rows
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the other side ends this one
    try:
        module, _, function = maker.partition(":")
        contestant = getattr(importlib.import_module(module), function)(*arguments)
        failed = ""
    except Exception as problem:  # told at the first call
        contestant, failed = None, _words(problem)
    while True:
        try:
            request = pipe.recv()
        except EOFError:
            return
        if request is None:
            return
        method, args = request
        if failed:
            pipe.send((False, failed))
            continue
        try:
            answer = _seconds(contestant.run, *args) if method == "sample" else getattr(contestant, method)(*args)
            pipe.send((True, answer))
        except Exception as problem:
            pipe.send((False, _words(problem)))


def _seconds(run: Callable[[], Any], inner: int) -> float:
    """Seconds a run; results are freed inside of the clock, as whoever calls a network does."""
    start = time.perf_counter()
    run()
    first = time.perf_counter() - start
    if inner == 1 and first > _WARM_BELOW_SECONDS:
        return first
    start = time.perf_counter()
    for _ in range(inner):
        run()
    return (time.perf_counter() - start) / inner


def _words(problem: Exception) -> str:
    text = str(problem).strip().splitlines()
    return f"{type(problem).__name__}: {text[0] if text else ''}"
