"""Small trainings in a process of their own: one for every line of standard input, its steps told a line at a time.

A line is "FOLDER MOMENT THEN". At the line MOMENT it waits for the signal that the other side then sends. THEN is
"stop", "again" (it waits for another signal) or "limit" (files of more than 6 000 bytes cannot be written).
"""

import contextlib
import resource
import signal
import sys
import time
from pathlib import Path

from small_training import MemorySource, make_trainer

from repkern.train import Callback, Interrupted

PATIENCE = 60  # seconds


class Telling(MemorySource):
    def __init__(self, say):
        super().__init__()
        self._say = say

    def test_batches(self, *arguments):
        for batch in super().test_batches(*arguments):
            self._say("testing")
            yield batch


class Worker(Callback):
    def __init__(self, folder, moment, then):
        self._moment, self._then = moment, then
        data = Telling(self.say)
        self.trainer = make_trainer(Path(folder), data=data, callbacks=[self], checkpoint={"every_steps": 4})

    def on_step_end(self, trainer):
        self.say(f"step {trainer.step}")

    def on_saved(self, trainer, path):
        self.say(f"saved {path.name}")

    def on_note(self, trainer, text):
        self.say(f"note {text}")

    def say(self, text):
        print(text, flush=True)
        if text == self._moment:
            self._moment = None
            until = time.monotonic() + PATIENCE
            while not self.trainer._request and time.monotonic() < until:
                time.sleep(0.005)
            if self._then == "again":
                print("heard", flush=True)
                time.sleep(PATIENCE)

    def run(self):
        self.trainer.resume()
        try:
            self.trainer.fit()
        except Interrupted as stop:
            saved = stop.saved.name if stop.saved else None
            print(f"interrupted by {stop.signal} at {stop.position.step}, {saved}")
        else:
            print(f"done at {self.trainer.step}, {self.trainer.saved}")


@contextlib.contextmanager
def limited(wanted):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if wanted:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background begins with it ignored
for line in sys.stdin:
    folder, moment, then = line.rstrip("\n").split("\t")
    with limited(then == "limit"):
        Worker(folder, moment, then).run()
    print("end", flush=True)
