"""Who runs a deployed network: ours and what else can be installed, each with float32 and the same threads."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import io
import os
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from repkern.deploy import optimize_for_inference
from repkern.models import load

__all__ = ["CONTESTANTS", "OURS", "PRECISIONS", "Contestant", "Job", "Kind", "contestant", "missing", "names_for"]

OURS = "repkern"
#: Of convolutions and products on a GPU; "fp32" means no TF32.
PRECISIONS = ("fp32", "tf32", "fp16")


@dataclass(frozen=True)
class Job:
    """One network and batch, as files: `network` of repkern.models.save, `onnx` of the same for that batch or None."""

    network: str
    images: str
    onnx: str | None
    device: str = "cpu"
    precision: str = "fp32"


@dataclass(frozen=True)
class Kind:
    """A contestant: what must be installed, where it runs, whether it reads the ONNX file."""

    make: Callable[[Job, int], Callable[[], Any]]
    packages: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu",)
    onnx: bool = False


class Contestant:
    """What a child process holds: a network ready to run on fixed images. `answers` are its logits as float64."""

    def __init__(self, name: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._make, self._threads = CONTESTANTS[name].make, threads
        self.run: Callable[[], Any] = lambda: None

    def prepare(self, job: Job) -> np.ndarray:
        """Build the network of `job`, run it (which compiles it, where it is compiled) and return its logits."""
        self.run = lambda: None
        gc.collect()  # the network that was there before
        self.run = self._make(job, self._threads)
        answer = self.run()
        return np.asarray(answer.float().cpu() if isinstance(answer, Tensor) else answer, dtype=np.float64)

    def chosen(self) -> str:
        """By which methods ours computes how many of the convolutions; empty for rivals."""
        report = getattr(getattr(self.run, "model", None), "report", None)
        if report is None:
            return ""
        counts = Counter(layer.method for layer in report.layers) + Counter({"kept": len(report.kept)})
        return ", ".join(f"{count} x {method}" for method, count in counts.most_common())


def contestant(name: str, threads: int) -> Contestant:
    """For `Remote`."""
    return Contestant(name, threads)


def names_for(device: str) -> list[str]:
    """The contestants that run on `device`, ours first."""
    return [name for name, kind in CONTESTANTS.items() if device in kind.devices]


def missing(name: str) -> list[str]:
    """The packages that `name` needs and that are not installed."""
    return [package for package in CONTESTANTS[name].packages if importlib.util.find_spec(package) is None]


def _torch(job: Job, memory_format: torch.memory_format) -> tuple[nn.Module, Tensor]:
    """Network and images on the device of the job, in its precision."""
    if job.device == "cuda":
        allow = job.precision == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allow
        torch.backends.cudnn.benchmark = True
    dtype = torch.float16 if job.precision == "fp16" else torch.float32
    model = load(job.network).eval().to(job.device, dtype)
    images = torch.from_numpy(np.load(job.images)).to(job.device, dtype)
    return model.to(memory_format=memory_format), images.to(memory_format=memory_format)  # type: ignore[call-overload]


class _Inference:
    """model(images) under inference mode, done when it returns."""

    def __init__(self, model: Callable[[Tensor], Tensor], images: Tensor) -> None:
        self.model, self.images = model, images

    def __call__(self) -> Tensor:
        with torch.inference_mode():
            answer = self.model(self.images)
        if self.images.is_cuda:
            torch.cuda.synchronize()
        return answer


def _eager(memory_format: torch.memory_format) -> Callable[[Job, int], Callable[[], Tensor]]:
    return lambda job, threads: _Inference(*_torch(job, memory_format))


def _compiled(memory_format: torch.memory_format) -> Callable[[Job, int], Callable[[], Tensor]]:
    def make(job: Job, threads: int) -> Callable[[], Tensor]:
        import torch._inductor.config
        from torch._inductor import select_algorithm

        torch._dynamo.reset()
        torch._inductor.config.freezing = True
        select_algorithm.PRINT_AUTOTUNE = False
        warnings.filterwarnings("ignore", "TypedStorage is deprecated")  # its own way to measure tensors
        model, images = _torch(job, memory_format)
        mode = "max-autotune" if job.device == "cuda" else "max-autotune-no-cudagraphs"
        run = _Inference(torch.compile(model, mode=mode), images)
        with contextlib.redirect_stderr(io.StringIO()):  # what it found while searching
            run()
        return run

    return make


def _ours(job: Job, threads: int) -> Callable[[], Tensor]:
    # Times from other days would decide otherwise.
    os.environ["REPKERN_CACHE_DIR"] = str(Path(job.network).parent)
    model, images = _torch(job, torch.channels_last)
    return _Inference(optimize_for_inference(model, images, precision=job.precision, progress=False), images)


def _onnxruntime(job: Job, threads: int) -> Callable[[], np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(job.onnx, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: np.load(job.images)}
    return lambda: session.run(None, feed)[0]


def _openvino(job: Job, threads: int) -> Callable[[], np.ndarray]:
    import openvino

    core = openvino.Core()
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    request = core.compile_model(job.onnx, "CPU", settings).create_infer_request()
    tensor = openvino.Tensor(np.load(job.images))

    def run() -> np.ndarray:
        request.infer([tensor], share_inputs=True, share_outputs=True)
        return request.get_output_tensor(0).data

    return run


def _ncnn(job: Job, threads: int) -> Callable[[], np.ndarray]:
    from repkern.bench.rivals_ncnn import NcnnNet, write_ncnn

    images = np.load(job.images)
    net = NcnnNet(*write_ncnn(load(job.network).eval(), torch.from_numpy(images[:1])), threads)
    return lambda: net(images)


_BOTH = ("cpu", "cuda")
_EXPORT = ("onnx", "onnxscript", "onnxruntime")  # what repkern.deploy.export needs
CONTESTANTS: dict[str, Kind] = {
    OURS: Kind(_ours, devices=_BOTH),
    "eager": Kind(_eager(torch.contiguous_format), devices=_BOTH),
    "eager-last": Kind(_eager(torch.channels_last), devices=_BOTH),
    "compile": Kind(_compiled(torch.contiguous_format), devices=_BOTH),
    "compile-last": Kind(_compiled(torch.channels_last), devices=_BOTH),
    "onnxruntime": Kind(_onnxruntime, _EXPORT, onnx=True),
    "openvino": Kind(_openvino, (*_EXPORT, "openvino"), onnx=True),
    "ncnn": Kind(_ncnn, ("ncnn",)),
}
