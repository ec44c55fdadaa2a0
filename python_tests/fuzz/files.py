"""Damaged files of every format that repkern reads: python python_tests/fuzz/files.py --files 2000 --seed 0.

A file may be refused by a clear error, or load and give exactly the undamaged output. A crash, a hang, another error,
and another output are faults. Files are opened in a process of its own, with a time limit for each.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import select
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

_SECONDS = 60  # for one file; a sound one takes well under one, so a slow machine is no hang


def _model() -> Any:
    import torch

    from repkern.models import create_model

    torch.manual_seed(0)
    return create_model("repvgg_a0", num_classes=3, width=0.125).eval().requires_grad_(False)


def _digest(value: Any) -> str:
    import torch

    if isinstance(value, torch.Tensor):
        return hashlib.sha256(str(value.dtype).encode() + value.detach().contiguous().numpy().tobytes()).hexdigest()
    if isinstance(value, dict):
        return json.dumps({str(key): _digest(item) for key, item in sorted(value.items())})
    return repr(value)


# Each format: write(folder) -> the file to damage; read(that file) -> what must stay the same.


def _write_model(suffix: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        from repkern.models import save

        save(_model(), folder / f"model.{suffix}")
        return folder / f"model.{suffix}"

    return write


def _read_model(path: Path) -> Any:
    import torch

    from repkern.models import load

    torch.manual_seed(1)
    with torch.no_grad():
        return load(path)(torch.randn(1, 3, 32, 32))


def _read_checkpoint(path: Path) -> Any:
    """As a checkpoint for a network that is there already, which must stay as it is when the file is refused."""
    from repkern import load_checkpoint

    model = _model()
    before = _digest(model.state_dict())
    try:
        load_checkpoint(path, model)
    except Exception:
        if _digest(model.state_dict()) != before:
            raise AssertionError("a refused file changed the model") from None
        raise
    return dict(model.state_dict())


def _write_foreign(folder: Path) -> Path:
    import torch

    torch.save({"model": _model().state_dict(), "epoch": 3}, folder / "foreign.pth")
    return folder / "foreign.pth"


def _write_scales(folder: Path) -> Path:
    import torch

    from repkern.optim import save_scales

    scales = {f"stages.{at}.dense_scale": torch.rand(24) + 0.5 for at in range(3)}
    save_scales(scales, folder / "scales.safetensors", data="digits")
    return folder / "scales.safetensors"


def _read_scales(path: Path) -> Any:
    from repkern.optim import load_scales

    return load_scales(path)


def _write_digits(folder: Path) -> Path:
    from repkern.models.digits import DigitsNet, save_digits_net

    save_digits_net(DigitsNet((4, 6), 1), folder / "plain.safetensors", note="x")
    return folder / "plain.safetensors"


def _read_digits(path: Path) -> Any:
    from repkern.models.digits import load_digits_net

    return dict(load_digits_net(path).state_dict())


def _net() -> Any:
    from torch import nn

    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def _write_training(name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        import torch

        from repkern.train import CheckpointFolder
        from repkern.train.checkpoint import Checkpoint

        CheckpointFolder(folder).save(
            1,
            Checkpoint(
                {"changes": {"0": {"class": "nn.Identity"}}},
                _net().state_dict(),
                None,
                {"step": 3, "state": torch.arange(40.0)},
                {"epoch": 1, "metric": 0.5},
            ),
        )
        return folder / "step_00000001" / name

    return write


def _read_training(path: Path) -> Any:
    from repkern.train import CheckpointFolder

    checkpoint = CheckpointFolder(path.parents[1]).load(1)
    return {**checkpoint.weights, **checkpoint.state, "structure": checkpoint.structure}


def _write_hub(folder: Path) -> Path:
    _model().save_pretrained(folder / "hub")
    return folder / "hub" / "config.json"


def _read_hub(path: Path) -> Any:
    from repkern.models import Network

    return dict(Network.from_pretrained(path.parent).state_dict())


def _write_recipe(folder: Path) -> Path:
    from repkern.train.recipe_files import load_recipe

    (folder / "recipe.json").write_text(load_recipe("quickstart").to_json())
    return folder / "recipe.json"


def _read_recipe(path: Path) -> Any:
    from repkern.train import Recipe
    from repkern.train.runs import read_recipe

    read_recipe(path.parent, Recipe)
    return "recipes have no sum: any that are possible are the user's"


def _write_metrics(folder: Path) -> Path:
    from repkern.train.metrics import MetricsLog

    MetricsLog(folder).write([{"epoch": epoch, "loss": 1 / epoch} for epoch in (1, 2, 3)])
    return folder / "metrics.jsonl"


def _read_metrics(path: Path) -> Any:
    from repkern.train.metrics import read_rows

    read_rows(path.parent)
    return "a log has no sum"


def _write_cache(folder: Path) -> Path:
    entries = {"layer 1": {"plain": 0.5, "winograd": 0.25}}
    (folder / "inference.json").write_text(json.dumps({"format": 1, "seconds": entries}))
    return folder / "inference.json"


def _read_cache(path: Path) -> Any:
    from repkern.deploy._cache import TimingCache

    os.environ["REPKERN_CACHE_DIR"] = str(path.parent)
    TimingCache().get("layer 1")
    return "times choose a method, they change no result"


def _write_quantized(folder: Path) -> Path:
    import torch
    from torch import nn

    from repkern.deploy.quantize import quantize

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()
    quantize(net, [torch.randn(4, 3, 8, 8)]).save(folder / "int8.pt2")
    return folder / "int8.pt2"


def _read_quantized(path: Path) -> Any:
    import torch

    from repkern.deploy.quantize import load_quantized

    torch.manual_seed(1)
    return load_quantized(path)(torch.randn(2, 3, 8, 8))


FORMATS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Any]]] = {
    "model.safetensors": (_write_model("safetensors"), _read_model),
    "model.pth": (_write_model("pth"), _read_model),
    "checkpoint.safetensors": (_write_model("safetensors"), _read_checkpoint),
    "checkpoint.pth": (_write_model("pth"), _read_checkpoint),
    "foreign.pth": (_write_foreign, _read_checkpoint),
    "scales": (_write_scales, _read_scales),
    "digits": (_write_digits, _read_digits),
    "training weights": (_write_training("weights.safetensors"), _read_training),
    "training state": (_write_training("state.pt"), _read_training),
    "training manifest": (_write_training("manifest.json"), _read_training),
    "training structure": (_write_training("structure.json"), _read_training),
    "hub config": (_write_hub, _read_hub),
    "recipe": (_write_recipe, _read_recipe),
    "metrics": (_write_metrics, _read_metrics),
    "timing cache": (_write_cache, _read_cache),
    "quantized": (_write_quantized, _read_quantized),
}
_CLEAR = (
    "ValueError",
    "OSError",
    "FileNotFoundError",
    "RuntimeError",
    "CheckpointError",
    "DamagedCheckpointError",
    "PermissionError",
)


def damaged(content: bytes, chance: random.Random) -> bytes:
    """One kind of damage at a random place, near the beginning (headers) half of the time."""
    data = bytearray(content)
    limit = len(data) if chance.random() < 0.5 else min(len(data), 4096)
    at = chance.randrange(limit)
    kind = chance.choice(("bit", "bit", "bit", "byte", "cut", "swap", "insert", "remove", "zero", "nest", "text"))
    size = chance.choice((1, 8, 64, 1000))
    if kind == "bit":
        data[at] ^= 1 << chance.randrange(8)
    elif kind == "byte":
        data[at] = chance.randrange(256)
    elif kind == "cut":
        del data[chance.choice((0, 1, 7, 8, 9, at, len(data) - 1)) :]
    elif kind == "swap":
        other = chance.randrange(len(data))
        data[at : at + size], data[other : other + size] = data[other : other + size], data[at : at + size]
    elif kind == "insert":
        data[at:at] = chance.randbytes(size)
    elif kind == "remove":
        del data[at : at + size]
    elif kind == "zero":
        data[at : at + size] = bytes(size)
    elif kind == "nest":
        return chance.choice((b"[", b'{"a":')) * 50_000
    else:
        return chance.choice((b"", b"hello world\n", b"null", b"[1]", b"{}", b'"x"', b"\x80\x02.", b"PK\x03\x04"))
    return bytes(data)


def hostile(content: bytes, chance: random.Random) -> bytes:
    """A JSON file, or the metadata of safetensors, with one value replaced by one of another kind."""
    with contextlib.suppress(ValueError, KeyError):
        if content[:1] == b"{":
            return json.dumps(_replaced(json.loads(content), chance)).encode()
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        metadata = header["__metadata__"]
        for key in metadata:
            metadata[key] = json.dumps(_replaced(json.loads(metadata[key]), chance))
        new = json.dumps(header).encode()
        return len(new).to_bytes(8, "little") + new + content[8 + size :]
    return damaged(content, chance)


def _replaced(value: Any, chance: random.Random) -> Any:
    if isinstance(value, dict | list) and value and chance.random() < 0.8:
        key = chance.choice(list(value) if isinstance(value, dict) else range(len(value)))
        value[key] = _replaced(value[key], chance)
        return value
    return chance.choice((None, True, -1, 0, 10**30, 1e308, float("nan"), "x", [], {}, [1], {"a": 1}, [[[[]]]]))


class Worker:
    """A process that opens files, one a line; started again when it ends or takes too long."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def read(self, kind: str, path: Path) -> tuple[str, str]:
        """("same", digest) or (type of the error, text) or ("hang" or "crash", what is known)."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, __file__, "--worker"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            self._answer(4 * _SECONDS)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([kind, str(path)]) + "\n")
        self._process.stdin.flush()
        answer = self._answer(_SECONDS)
        if answer is None:
            hung = self._process.poll() is None
            self.close()
            return ("hang", f"after {_SECONDS} s") if hung else ("crash", "the process ended")
        return answer[0], answer[1]

    def _answer(self, seconds: float) -> list[str] | None:
        assert self._process is not None
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            return None
        line = self._process.stdout.readline()
        return json.loads(line) if line else None

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            process, self._process = self._process, None
            process.kill()
            with process:  # closes its pipes, and waits
                pass


def _work() -> None:
    """The worker: answers on the standard output it was started with, to which nothing else may write."""
    import torch

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps(["ready", ""]), file=answers, flush=True)
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        kind, path = json.loads(line)
        try:
            result = ["same", _digest(FORMATS[kind][1](Path(path)))]
        except Exception as problem:
            own = "" if isinstance(problem, AssertionError) or not str(problem) else type(problem).__name__
            result = [own or f"bare {type(problem).__name__}", str(problem)[:300]]
        print(json.dumps(result), file=answers, flush=True)


def fuzz(files: int, seed: int, kinds: list[str], say: Callable[[str], None] = print) -> list[str]:
    """Damage `files` files, the kinds taking turns. The faults, one line each."""
    chance = random.Random(seed)
    faults: list[str] = []
    totals: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
    worker = Worker()
    with tempfile.TemporaryDirectory() as folder:
        sound: dict[str, tuple[Path, bytes, str]] = {}
        for kind in kinds:
            home = Path(folder) / kind
            home.mkdir()
            path = FORMATS[kind][0](home)
            outcome, digest = worker.read(kind, path)
            if outcome != "same":
                raise RuntimeError(f"the undamaged {kind} is refused: {outcome} {digest}")
            sound[kind] = (path, path.read_bytes(), digest)
        for at in range(files):
            kind = kinds[at % len(kinds)]
            path, content, wanted = sound[kind]
            change = hostile if chance.random() < 0.25 else damaged
            path.write_bytes(change(content, chance))
            outcome, text = worker.read(kind, path)
            refused = outcome in _CLEAR and kind != "timing cache"  # which never fails
            good = refused or (outcome == "same" and text == wanted)
            totals[kind]["refused" if refused else "same" if good else "fault"] += 1
            if not good:
                shutil.copy(path, Path(tempfile.gettempdir()) / f"fault_{seed}_{at}{path.suffix}")
                faults.append(f"{kind}, file {at} of seed {seed}: {outcome} {text}")
            path.write_bytes(content)
    worker.close()
    for kind, counts in totals.items():
        say(f"{kind:<24} {counts['refused']:>5} refused {counts['same']:>5} the same {counts['fault']:>3} faults")
    return faults


def main() -> int:
    """Exit code 1 when there are faults."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=list(FORMATS), default=None)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        _work()
        return 0
    faults = fuzz(options.files, options.seed, options.only or list(FORMATS))
    print("\n".join(faults) or f"{options.files} damaged files: no fault")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
