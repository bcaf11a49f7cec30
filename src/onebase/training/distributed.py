"""Several processes that train one adapter: rows shared out, losses and gradients summed, the base in parts if asked.

The launcher is torchrun, the collectives and the sharding (FSDP2) are PyTorch's own. Every process holds the whole
adapter and does the same optimiser step; the first alone writes. Without torchrun there is a world of one process,
for which everything here does nothing.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from onebase.adapters.injection import base_tensors
from onebase.data.template import Encoded
from onebase.device import pick_device
from onebase.errors import ConfigError, OnebaseError
from onebase.models.fingerprint import tensor_digests
from onebase.models.scoring import Scorer


class ProcessLost(OnebaseError, ConnectionError):
    """Another process of the run has ended, or has not answered in time."""


class World(NamedTuple):
    """This process among those that train together; `device` is where tensors are exchanged.

    Every process must call the same methods in the same order. Each raises ProcessLost where another one is gone.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def leads(self) -> bool:
        """Is this the process that writes and prints?"""
        return self.rank == 0

    def total(self, value: float) -> float:
        """The sum of all processes' values, in float64 and the same bits everywhere."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        _exchange(dist.all_reduce, tensor)
        return float(tensor)

    def any(self, flag: bool) -> bool:
        """Is the flag up in one process at least?"""
        return self.total(float(flag)) > 0

    def wait(self) -> None:
        """Return when all processes have come here."""
        self.total(0.0)

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum the parameters' gradients over all processes, in one flat exchange.

        A gradient that is None in some processes counts as zero there; one that is None in all stays None.
        """
        if self.size == 1 or not parameters:
            return
        dtype = max((p.dtype for p in parameters), key=lambda dtype: dtype.itemsize)
        here = torch.tensor([p.grad is not None for p in parameters])
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([t.flatten().to(self.device, dtype) for t in (*grads, here)])
        _exchange(dist.all_reduce, flat)
        *sums, there = flat.split([*(p.numel() for p in parameters), len(parameters)])
        for parameter, total, count in zip(parameters, sums, there.tolist(), strict=True):
            parameter.grad = total.view_as(parameter).to(parameter) if count else None

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite the tensors with those of the first process."""
        for tensor in tensors if self.size > 1 else ():
            moved = tensor.to(self.device, copy=True)
            _exchange(dist.broadcast, moved)
            tensor.copy_(moved)

    def first_says(self, text: str) -> str:
        """The first process's text."""
        if self.size == 1:
            return text
        data = text.encode()
        length = int(self.total(len(data) if self.leads else 0))
        sent = torch.tensor(list(data) if self.leads else [0] * length, dtype=torch.uint8, device=self.device)
        _exchange(dist.broadcast, sent)
        return bytes(sent.tolist()).decode()

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Raise ConfigError in every process where the facts are not the first process's in one of them."""
        if self.size == 1:
            return
        first, mine = json.loads(self.first_says(json.dumps(facts))), json.loads(json.dumps(facts))
        names = [name for name in {**first, **mine} if first.get(name) != mine.get(name)]
        if self.any(bool(names)):
            told = "; ".join(f"{n} is {mine.get(n)!r}, in the first process {first.get(n)!r}" for n in names)
            found = told or "another process has other rows, another base or other options than the first"
            raise ConfigError(f"process {self.rank} of {self.size}", found, hint="start all alike")

    def reseed(self, seed: int, step: int) -> None:
        """Set torch's random state for a step, another one in each process; alone it runs on as it is.

        From (seed, rank, step) alone, so that a checkpoint need not hold the state of every process.
        """
        if self.size > 1:
            digest = hashlib.sha256(f"{seed}:{self.rank}:{step}".encode()).digest()
            torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _exchange(collective: Callable[..., Any], tensor: Tensor) -> None:
    try:
        if collective is dist.broadcast:
            dist.broadcast(tensor, 0)
        else:
            collective(tensor)
    except RuntimeError as error:  # what gloo and nccl raise where a connection is closed or times out
        why = str(error).strip().splitlines()[0]
        raise ProcessLost("exchange with the other processes", f"one of them has ended ({why})") from error


def launched_rank() -> int:
    """The number that torchrun gave this process; 0 without torchrun."""
    return int(os.environ["RANK"]) if _launched() else 0


def _launched() -> bool:
    return dist.is_available() and dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1


@contextmanager
def joined() -> Generator[World]:
    """The processes that torchrun started, connected while inside: gloo on a CPU, nccl on CUDA devices.

    A process group that is there already is used as it is. All leave together, since torchrun ends the others
    once one has left with an error code.
    """
    own = _launched() and not dist.is_initialized()
    if not own and not (dist.is_available() and dist.is_initialized()):
        yield World()
        return
    device = pick_device()
    device = device if device.type == "cuda" else torch.device("cpu")
    if own:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        world = World(dist.get_rank(), dist.get_world_size(), device)
        yield world
        world.wait()
    finally:
        if own:
            dist.destroy_process_group()
            gc.collect()  # groups and meshes stand in cycles; left to the interpreter's end their threads can abort it


def leave(code: int) -> NoReturn:
    """End a launched process whose work is done and on disk, without the interpreter's teardown.

    torch's caches of sharded tensors keep process groups beyond `joined`, and their threads now and then abort
    a teardown ("terminate called without an active exception"), which torchrun takes for a failed run.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def shares(lengths: Sequence[int], count: int) -> list[range]:
    """Rows of these lengths, in their order, cut into `count` runs of about equally many tokens.

    Each cut is where the tokens before it are nearest to their part of the sum (the first such place). A run is
    empty where a single row outweighs the others. The same on every machine.
    """
    ends = list(accumulate(lengths, initial=0))
    cuts = [
        min(range(len(ends)), key=lambda place: abs(ends[place] * count - part * ends[-1]))
        for part in range(1, count)
    ]
    return [range(*pair) for pair in zip([0, *cuts], [*cuts, len(lengths)], strict=True)]


def spread(score: Scorer, world: World) -> Scorer:
    """A scorer whose loss is that of this process's share of the rows: the sum over the processes is the rows' loss.

    Rows are taken in the order in which the way of scoring likes them (`Scorer.batches`), so that rows with a common
    prefix, or of like length, stay together.
    """
    if world.size == 1:
        return score

    def loss(rows: Sequence[Encoded]) -> Tensor:
        order = [index for batch in score.batches(rows, len(rows)) for index in batch]
        own = shares([len(rows[index].ids) for index in order], world.size)[world.rank]
        return score.loss([rows[order[place]] for place in own] or [_idle(rows)])

    return score._replace(loss=loss)


def _idle(rows: Sequence[Encoded]) -> Encoded:
    """A row without targets for a process that has no other: a sharded base needs all processes in every pass."""
    row = min(rows, key=lambda row: len(row.ids))
    return row.without_targets()


def shard(model: nn.Module, world: World) -> None:
    """Spread a frozen model's weights over the processes, in place and for good: each keeps its part of every tensor.

    A layer's weights are put together while it computes (FSDP2, `fully_shard`); what lies outside of the layers is
    one more group. Adapters that are injected afterwards stay whole in every process.
    """
    mesh = init_device_mesh(world.device.type, (world.size,))
    for layer in _layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def _layers(model: nn.Module) -> list[nn.Module]:
    """The model's layers: the largest list of modules in it."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=lambda one: sum(p.numel() for p in one.parameters()), default=[]))


def local_bytes(model: nn.Module) -> int:
    """Bytes of the parameters that this process holds."""
    held = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return sum(tensor.nbytes for tensor in held)


def base_digests(model: nn.Module) -> dict[str, str]:
    """`tensor_digests` of the base; a sharded one's tensors are put together one after the other."""
    if not any(isinstance(tensor, DTensor) for _, tensor in base_tensors(model)):
        return tensor_digests(base_tensors(model))
    found: dict[str, str] = {}
    for name, tensor in base_tensors(model):
        found |= tensor_digests([(name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)])
    return found


class Hashed(NamedTuple):
    """A base's digests, and the seconds that they took."""

    digests: Mapping[str, str]
    seconds: float


def hash_ahead(model: nn.Module) -> Future[Hashed]:
    """The digests of a whole base, computed in threads beside what comes next: hashing needs no interpreter's lock.

    Which tensors are hashed is settled at once, so what is put onto the model meanwhile does not count. One of torch's
    threads is left to what comes next, which would otherwise share its core with several that hash.
    """
    named, threads = list(base_tensors(model)), max(1, torch.get_num_threads() - 1)

    def hashed() -> Hashed:
        started = time.perf_counter()
        return Hashed(tensor_digests(named, threads), time.perf_counter() - started)

    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(hashed)
    finally:
        pool.shutdown(wait=False)
