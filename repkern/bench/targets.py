"""The targets of this project as data, and one function that says how far a measured value is from its own."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "INFER_RIVALS",
    "Target",
    "accuracy_targets",
    "activations_target",
    "blocks_target",
    "conv_target",
    "infer_memory_target",
    "infer_target",
    "loader_target",
    "ops_target",
    "optim_memory_target",
    "optim_target",
    "peak_target",
    "repopt_target",
    "train_target",
    "verdict",
]

_BOTH = "forward+backward"
_SQUARE = ("c64", "c128", "c256", "c512")


@dataclass(frozen=True)
class Target:
    """`value` is a least value, or a most when `at_most`."""

    value: float
    unit: str
    at_most: bool = False

    def __str__(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.value:g} {self.unit}"


_SPEEDUPS = {
    ("cpu", "eager"): dict.fromkeys(_SQUARE, 3.0),
    ("cpu", "compile"): dict.fromkeys(_SQUARE, 2.0),
    ("cuda", "eager"): {"resnet18": 20.0},
}
_PEAK_PERCENT = dict.fromkeys(("c256", "c512"), 60.0)
_MICROSECONDS = {"resnet18": 300.0, "repvgg_a0": 130.0}
# Of a network with our blocks to the same one in plain modules, by what is recomputed.
_DBB = ("repvgg_a0_dbb_b16_128", "resnet18_dbb_b16_128")
_BLOCK_STEPS = {
    "none": {"repvgg_a0_b16_128": 0.9},
    "cheap": dict.fromkeys(("repvgg_a0_b16_128", *_DBB), 1.05),
}
_BLOCK_ACTIVATIONS = {"cheap": dict.fromkeys(("repvgg_a0_b16_128", *_DBB), 0.75)}
# Of a convolution layer to its rival: the median over the layers, and the least of a single one as dispatched.
_CONV_MEDIANS = {
    ("cpu", "avx512", "torch"): 2.2,
    ("cpu", "avx512", "ncnn"): 1.2,
    ("cpu", "avx2", "torch"): 1.5,
    ("cuda", "fp32", "torch"): 1.3,
    ("cuda", "tf32", "torch"): 1.0,
    ("cuda", "fp16", "torch"): 0.9,
}
_NEVER_SLOWER = 1.0
#: Whose best a deployed network is compared with on a CPU.
INFER_RIVALS = ("eager", "eager-last", "compile", "compile-last", "onnxruntime", "openvino", "ncnn")
_INFER = {"repvgg_a0": 1.7, "repvgg_a2": 1.6, "repvgg_b1": 1.6}
_INFER_MEMORY = 1.5
_LOGITS_ERROR, _TOP_1 = 1e-5, 100.0
# Of a step of RepSGD and RepAdamW on RepVGG-B1: torch's fused step may be 1.05 times as fast.
_OPTIM = {
    ("cpu", "sgd", "torch fused"): 1 / 1.05,
    ("cpu", "adamw", "torch fused"): 1 / 1.05,
    ("cpu", "sgd", "released"): 1.5,
    ("cuda", "sgd", "released"): 3.0,
}
_OPTIM_MEMORY_PERCENT = 0.1
_REPOPT_STEPS = {("cpu", "repopt_vgg_b1_b8_128", "plain RepVGG"): 1.6}
# Of reading images: a step that reads to one on data in memory, and decoding by two workers to one.
_LOADER_STEP, _LOADER_DECODING = 1.03, 1.7
_STEP_RATIOS = {"resnet18_b32_224": 1.10, "resnet18_b16_128": 1.6}


def ops_target(device: str, case: str, what: str, baseline: str) -> Target | None:
    """The least speed-up of the squeeze over `baseline`, or None."""
    value = _SPEEDUPS.get((device, baseline), {}).get(case) if what == _BOTH else None
    return None if value is None else Target(value, f"x {baseline}")


def peak_target(device: str, case: str, what: str) -> Target | None:
    """What forward+backward must reach by itself: percent of peak on a CPU, microseconds on a GPU.

    The target means the FMA peak; what is measured is the best that torch reaches, which is at most that.
    """
    if what != _BOTH:
        return None
    if device == "cpu":
        return Target(_PEAK_PERCENT[case], "% of peak") if case in _PEAK_PERCENT else None
    return Target(_MICROSECONDS[case], "us", at_most=True) if case in _MICROSECONDS else None


def train_target(device: str, case: str) -> Target | None:
    """The largest step time of the OREPA network as a multiple of the plain one's, or None."""
    value = _STEP_RATIOS.get(case) if device == "cpu" else None
    return None if value is None else Target(value, "x plain", at_most=True)


def blocks_target(device: str, case: str, recompute: str) -> Target | None:
    """The longest step of a network of blocks as a multiple of the plain modules' one, or None."""
    value = _BLOCK_STEPS.get(recompute, {}).get(case) if device == "cpu" else None
    return None if value is None else Target(value, "x plain", at_most=True)


def activations_target(device: str, case: str, recompute: str) -> Target | None:
    """The most bytes kept for the backward as a multiple of what plain modules keep, or None."""
    value = _BLOCK_ACTIVATIONS.get(recompute, {}).get(case) if device == "cpu" else None
    return None if value is None else Target(value, "x plain", at_most=True)


def conv_target(device: str, how: str, rival: str) -> Target | None:
    """The least median speed-up over `rival` ("torch", "ncnn") in a run, or of every layer as "dispatched"; or None.

    how: the instruction set on a CPU, the precision on a GPU.
    """
    value = _NEVER_SLOWER if rival == "dispatched" else _CONV_MEDIANS.get((device, how, rival))
    return None if value is None else Target(value, "x torch" if rival == "dispatched" else f"x {rival}")


def infer_target(device: str, model: str) -> Target | None:
    """The least speed-up of a deployed network over the best of `INFER_RIVALS`, or None."""
    value = _INFER.get(model) if device == "cpu" else None
    return None if value is None else Target(value, "x best rival")


def infer_memory_target() -> Target:
    """The most memory of inference as a multiple of torch eager's."""
    return Target(_INFER_MEMORY, "x eager", at_most=True)


def accuracy_targets() -> tuple[Target, Target]:
    """Of deployed networks in float32: the relative L2 error of logits, and how many images keep their top-1 class."""
    return Target(_LOGITS_ERROR, "relative error of logits", at_most=True), Target(_TOP_1, "% of top-1 classes")


def optim_target(device: str, case: str, what: str, rival: str) -> Target | None:
    """The least speed-up of an optimizer step over `rival`, or None."""
    value = _OPTIM.get((device, what, rival)) if case == "repopt_vgg_b1" else None
    return None if value is None else Target(round(value, 3), f"x {rival}")


def optim_memory_target(case: str) -> Target | None:
    """The most memory of the multipliers, in percent of the parameters."""
    return Target(_OPTIM_MEMORY_PERCENT, "% of parameters", at_most=True) if case == "repopt_vgg_b1" else None


def repopt_target(device: str, case: str, rival: str) -> Target | None:
    """The least speed-up of a RepOpt-VGG's training step over `rival`, or None."""
    value = _REPOPT_STEPS.get((device, case, rival))
    return None if value is None else Target(value, f"x {rival}")


def loader_target(what: str) -> Target:
    """The longest training step that reads its images ("step"), or the least speed-up of decoding by two workers."""
    if what == "step":
        return Target(_LOADER_STEP, "x in memory", at_most=True)
    return Target(_LOADER_DECODING, "x 1 worker")


def verdict(target: Target | None, measured: float) -> str:
    """ "ok", or "short by" the gap as a share of the target; empty without a target."""
    if target is None:
        return ""
    gap = (measured - target.value if target.at_most else target.value - measured) / target.value
    return "ok" if gap <= 0 else f"short by {100 * gap:.1f} %"
