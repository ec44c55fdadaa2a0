"""Processes, devices and precision: the only file that knows Hugging Face Accelerate and, with `sharded.py` for
FSDP2, torch.distributed.

Accelerate finds out how this process was launched (`torchrun`, `accelerate launch`, Slurm through them), joins the
others, and chooses device, autocast and gradient scaler. Its `prepare` is not used: it patches `forward` of the model
itself, which copies, exports and `fuse()` would carry along. Nor is its `save_state`: see `checkpoint.py`.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from repkern.data.batch import Shard
from repkern.data.errors import MissingExtraError
from repkern.train import sharded
from repkern.train.recipe import RunRecipe

__all__ = ["DistributedError", "Runtime", "explained", "world_size"]

T = TypeVar("T")

_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
_TIMEOUT_MINUTES = 10
# gloo raises plain RuntimeErrors, also out of a backward pass.
_ERRORS = tuple(
    getattr(distributed, name)
    for name in ("DistBackendError", "DistNetworkError", "DistStoreError")
    if hasattr(distributed, name)
)
_WORDS = ("gloo", "Connection closed by peer", "Connection reset", "NCCL")


class DistributedError(RuntimeError):
    """Another process of the run is gone or cannot be reached."""


def world_size() -> int:
    """How many processes this run was launched with: 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class Runtime:
    """One process of a training: `rank` of `world`, on `device`. A context manager; it leaves the others at its end.

    ValueError for a GPU that is not there, and for fp16 without one.
    """

    def __init__(self, recipe: RunRecipe) -> None:
        self._recipe = recipe
        gpu = torch.cuda.is_available()
        if recipe.device == "cuda" and not gpu:
            raise ValueError("device cuda: no CUDA GPU or driver was found; cpu works everywhere")
        on_cpu = recipe.device == "cpu" or not gpu
        if recipe.precision == "fp16" and on_cpu:
            raise ValueError("precision fp16 needs a GPU; bf16 works on CPUs too")
        self._joined_here = not (distributed.is_available() and distributed.is_initialized())
        threads = torch.get_num_threads()
        if self._joined_here:
            _Groups.join("gloo" if on_cpu else "nccl")
        self._accelerator = _accelerator(recipe, on_cpu)
        # Accelerate sets one thread where OMP_NUM_THREADS is not set; how many is the recipe's to say.
        torch.set_num_threads(threads)
        self.rank: int = self._accelerator.process_index
        self.world: int = self._accelerator.num_processes
        self.device: torch.device = self._accelerator.device
        self.is_main = self.rank == 0
        self._scaler: Any = self._accelerator.scaler
        if recipe.strategy == "fsdp2" and self.world == 1:
            raise ValueError("strategy fsdp2 shards a network over several processes; this run has one (use torchrun)")

    def check(self, recipe: RunRecipe) -> None:
        """ValueError when a training with `recipe` needs other choices than those this object was made with."""
        for name in ("device", "precision", "strategy", "compile"):
            own, wanted = getattr(self._recipe, name), getattr(recipe, name)
            if own != wanted:
                raise ValueError(f"the runtime was made for {name} {own!r}, this training has {wanted!r}")

    def part_of(self, batch_size: int, accumulate: int) -> Shard:
        """This process's part of every batch. ValueError when the batch cannot be divided into equal pieces."""
        if batch_size % (self.world * accumulate):
            raise ValueError(
                f"batch_size {batch_size} cannot be divided into equal pieces for {self.world} processes that take "
                f"{accumulate} each (accumulate): it must be a multiple of {self.world * accumulate}"
            )
        return Shard(self.rank, self.world, accumulate)

    # What the network runs in ------------------------------------------------------------------------------------

    @property
    def shards(self) -> bool:
        """Whether `shard` spreads networks over the processes."""
        return self._recipe.strategy == "fsdp2"

    def shard(self, *models: nn.Module) -> None:
        """Spread parameters over the processes, in place, where the recipe says so; before optimizers are made."""
        for model in models if self.shards else ():
            sharded.shard(model, self.device)

    def wrap(self, model: nn.Module) -> nn.Module:
        """What is called in training in place of `model`, whose parameters it shares."""
        wrapped = model
        if self.world > 1 and not self.shards and any(parameter.requires_grad for parameter in model.parameters()):
            ids = [self.device.index] if self.device.type == "cuda" else None
            # A sum over more than two processes depends in its last bits on the place in a bucket, and DDP fills its
            # buckets anew after its first step, which a resumed run has elsewhere; but not where it has to look for
            # unused parameters.
            steady = self.world > 2 and self._recipe.deterministic
            wrapped = DistributedDataParallel(model, device_ids=ids, find_unused_parameters=steady)
        return torch.compile(wrapped) if self._recipe.compile else wrapped  # type: ignore[return-value]

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Around forward pass and loss."""
        return self._accelerator.autocast()

    @contextlib.contextmanager
    def piece(self, wrapped: nn.Module, last: bool) -> Iterator[None]:
        """Around forward and backward of one piece of a batch; gradients are exchanged in the last one only."""
        sharded.sum_gradients(wrapped, last)
        no_sync = getattr(wrapped, "no_sync", None)
        with contextlib.nullcontext() if last or no_sync is None else no_sync():
            yield

    def place(self, batch: Any, *, dtype: torch.dtype, channels_last: bool) -> Any:
        """`batch` (a tensor or a tuple of tensors, named or not) on the device; floating tensors in `dtype`."""
        if isinstance(batch, tuple):
            parts = [self.place(part, dtype=dtype, channels_last=channels_last) for part in batch]
            return type(batch)(*parts) if hasattr(batch, "_fields") else tuple(parts)
        if not isinstance(batch, Tensor):
            return batch
        kind = dtype if batch.is_floating_point() else batch.dtype
        layout = torch.channels_last if channels_last and batch.dim() == 4 else torch.preserve_format
        return batch.to(self.device, kind, non_blocking=True, memory_format=layout)

    def share_buffers(self, model: nn.Module) -> None:
        """Give every process the running statistics of rank 0, which are those that are saved."""
        self._share(model.buffers())

    def share_weights(self, model: nn.Module) -> None:
        """Give every process the parameters and buffers of rank 0."""
        self._share([*model.parameters(), *model.buffers()])

    @torch.no_grad()
    def _share(self, tensors: Iterable[Tensor]) -> None:
        if self.world > 1:
            with explained():
                for tensor in tensors:
                    distributed.broadcast(tensor.detach(), 0)

    # Gradients ---------------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, scaled in fp16."""
        (loss if self._scaler is None else self._scaler.scale(loss)).backward()

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Make each the mean over all processes, in place: gradients of what is not in the network."""
        if self.world > 1:
            with explained():
                for tensor in tensors:
                    distributed.all_reduce(tensor)
                    tensor /= self.world

    def unscale(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Give gradients their own size again, once a step."""
        if self._scaler is not None:
            for optimizer in optimizers:
                self._scaler.unscale_(optimizer)

    def step(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Step each, but in fp16 those whose gradients overflowed."""
        for optimizer in optimizers:
            if self._scaler is None:
                optimizer.step()
            else:
                self._scaler.step(optimizer)

    def update_scale(self) -> None:
        """After the steps, or after a step that was given up."""
        if self._scaler is not None:
            self._scaler.update()

    def scaler_state(self) -> dict[str, Any]:
        """{} without a scaler."""
        return {} if self._scaler is None else self._scaler.state_dict()

    def load_scaler_state(self, state: dict[str, Any]) -> None:
        """The inverse."""
        if self._scaler is not None and state:
            self._scaler.load_state_dict(state)

    # The other processes -----------------------------------------------------------------------------------------

    def agree(self, flags: Sequence[bool]) -> list[bool]:
        """For each flag whether any process raised it."""
        if self.world == 1:
            return list(flags)
        votes = torch.tensor([float(flag) for flag in flags], device=self.device)
        with explained():
            distributed.all_reduce(votes, op=distributed.ReduceOp.MAX)
        return [vote > 0 for vote in votes.tolist()]

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes by rank; at rank 0 only, elsewhere an empty list."""
        if self.world == 1:
            return [value]
        values: list[Any] | None = [None] * self.world if self.is_main else None
        with explained():
            distributed.gather_object(value, values)
        return values or []

    def broadcast(self, value: Any) -> Any:
        """The value that rank 0 has."""
        if self.world == 1:
            return value
        values = [value]
        with explained():
            distributed.broadcast_object_list(values)
        return values[0]

    def on_main(self, work: Callable[[], T]) -> T:
        """What `work` returns at rank 0, for every process; its error is raised in every process too."""
        if self.world == 1:
            return work()
        outcome: tuple[Any, Exception | None] | None = None
        if self.is_main:
            try:
                outcome = work(), None
            except Exception as problem:
                outcome = None, _sendable(problem)
        value, error = self.broadcast(outcome)
        if error is not None:
            raise error
        return value

    def vary_random(self) -> None:
        """Give the processes different random numbers, as dropout on different images needs; rank 0 keeps its own."""
        if self.rank:
            torch.manual_seed((torch.initial_seed() + self.rank) % 2**63)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            with explained():
                distributed.barrier()

    def close(self) -> None:
        """Leave the group that this object joined. Wrappers must be gone: gloo's threads free their work late."""
        from accelerate.state import AcceleratorState

        gc.collect()
        if self._joined_here and distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
        # Accelerate keeps its choices for the whole process; another training may choose differently.
        AcceleratorState._reset_state(reset_partial_state=True)

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.wait()
        self.close()


class _Groups:
    """The groups that this process joins, one after the other.

    Processes find each other's addresses in a store that outlives a group, and with torchrun a whole life of the run:
    under one name for all groups they could find those of processes that are gone.
    """

    _store: Any = None

    @classmethod
    def join(cls, backend: str) -> None:
        """Join the processes that a launcher started with this one; without one, nothing."""
        if world_size() == 1 or "RANK" not in os.environ:
            return
        rank, world = int(os.environ["RANK"]), world_size()
        with explained():
            if cls._store is None:
                # Where it is not the launcher's it lives in rank 0, for as long as somebody there holds it.
                cls._store, _, _ = next(iter(distributed.rendezvous("env://", timeout=_timeout())))
            store = distributed.PrefixStore(_new_name(cls._store, rank, world), cls._store)
            distributed.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=_timeout())


def _new_name(store: Any, rank: int, world: int) -> str:
    """A name that the processes that are alive agree on, and that was never used before.

    Rank 0 invents one and welcomes who answers under it. Others may read one of an earlier life, where nobody does.
    """
    own, leader = uuid.uuid4().hex, "repkern/leader"
    if rank == 0:
        store.set(leader, own)
        for other in range(1, world):
            guest = store.get(f"repkern/{own}/{other}").decode()
            store.set(f"repkern/{own}/{guest}", "welcome")
        return own
    told, end = "", time.monotonic() + _timeout().total_seconds()
    while time.monotonic() < end:
        name = store.get(leader).decode()
        if name != told:
            store.set(f"repkern/{name}/{rank}", own)
            told = name
        if store.check([f"repkern/{name}/{own}"]):
            return name
        time.sleep(0.01)
    raise distributed.DistStoreError(f"rank 0 did not answer rank {rank}")


def _timeout() -> timedelta:
    return timedelta(minutes=float(os.environ.get("REPKERN_TIMEOUT_MINUTES", _TIMEOUT_MINUTES)))


def _accelerator(recipe: RunRecipe, on_cpu: bool) -> Any:
    try:
        from accelerate import Accelerator, InitProcessGroupKwargs
    except ImportError as error:
        raise MissingExtraError(f"training needs Accelerate ({error}): pip install 'repkern[train]'") from None
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    with warnings.catch_warnings(), explained():
        warnings.filterwarnings("ignore", "OMP_NUM_THREADS")
        return Accelerator(
            cpu=on_cpu,
            mixed_precision=_PRECISION[recipe.precision],
            kwargs_handlers=[InitProcessGroupKwargs(timeout=_timeout())],
        )


def _sendable(problem: Exception) -> Exception:
    """The error itself, or its text where it cannot be sent to other processes."""
    try:
        pickle.loads(pickle.dumps(problem))
    except Exception:  # whatever its __reduce__ raises
        return RuntimeError(f"{type(problem).__name__}: {problem}")
    return problem


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """What a backend raises when another process dies, as one error with a text that helps."""
    try:
        yield
    except RuntimeError as problem:
        text = str(problem)
        if world_size() == 1 or not (isinstance(problem, _ERRORS) or any(word in text for word in _WORDS)):
            raise
        raise DistributedError(
            f"another process of this run ended or cannot be reached ({text.splitlines()[0][:200]}). The last "
            "checkpoint is whole: start all processes again, or let torchrun do it with --max-restarts"
        ) from problem
