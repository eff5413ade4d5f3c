"""The processes of one run and what they compute with: `torchrun --nproc-per-node N -m training fit` starts N of them.

    process 0 converts the data ─► all train, each on its lanes of every block ─► process 0 calibrates, exports, publishes

Why no DistributedDataParallel: it wraps `forward` and takes the plain mean of the processes' gradients. Training calls `sequence`, and its
loss is a mean over the values that are present, of which each process has a different number. So each process divides by the number of all
of them, and gradients are summed, in one message a step: the network has some ten thousand weights, there is nothing to overlap.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, distributed

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["float32", "bfloat16"]
T = TypeVar("T")

CPU = torch.device("cpu")
PATIENCE = timedelta(days=1)
"""How long processes wait for one another: for the first one's conversion of the data. One that died is noticed at once."""


@dataclass(frozen=True)
class World:
    """This process among `size`, and what it computes with. One process alone needs no others and no messages."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU
    precision: torch.dtype = torch.float32  # of the network's products while it learns; weights and the rest are float32

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def share(self, lanes: int) -> slice:
        """This process's lanes; of all processes together each lane once. Empty where there are fewer lanes than processes."""
        return slice(lanes * self.rank // self.size, lanes * (self.rank + 1) // self.size)

    def total(self, value: Tensor) -> Tensor:
        """The sum over all processes, the same bits in each."""
        if self.size == 1:
            return value
        value = value.detach().clone()
        distributed.all_reduce(value)
        return value

    def total_gradients(self, parameters: Iterable[torch.nn.Parameter], loss: Tensor) -> Tensor:
        """Sums the gradients, in place, and returns the sum of the losses."""
        if self.size == 1:
            return loss
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        summed = self.total(torch.cat([*(gradient.flatten() for gradient in gradients), loss.detach().reshape(1)]))
        for gradient, part in zip(gradients, torch.split(summed[:-1], [gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
        return summed[-1]

    def agree(self, value: T) -> T:
        """What process 0 has."""
        if self.size == 1:
            return value
        held: list[Any] = [value]
        distributed.broadcast_object_list(held, device=CPU)
        agreed: T = held[0]
        return agreed

    def in_turn(self, work: Callable[[], T]) -> T:
        """`work` by process 0, then by the others. Where it is refused to the first, that one raises and says why; the others just end."""
        if self.size == 1:
            return work()
        if self.first:
            done = False
            try:
                result = work()
                done = True
            finally:
                self.agree(done)
            return result
        if not self.agree(False):
            raise SystemExit(1)
        return work()

    def autocast(self) -> torch.autocast:
        """Around the network, where it learns."""
        return torch.autocast(self.device.type, self.precision, enabled=self.precision is not torch.float32)

    def part(self) -> None:
        """The end of what is done together. Not to be called after a failure: there torchrun ends the others."""
        if self.size > 1:
            distributed.destroy_process_group()

    def __str__(self) -> str:
        name = str(self.precision).removeprefix("torch.")
        return f"{self.size} process{'es' * (self.size > 1)} on {self.device.type}, {name}"


ALONE = World()


def join(device: Device = "cpu", precision: Precision = "float32") -> World:
    """The world torchrun describes in the environment, or a process alone. Raises ValueError when it lacks the device asked for."""
    rank, size, local = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    place = _device(device, local)
    world = World(rank, size, place, torch.bfloat16 if precision == "bfloat16" else torch.float32)
    if size > 1:
        distributed.init_process_group("gloo" if place.type == "cpu" else "cpu:gloo,cuda:nccl", timeout=PATIENCE)
    return world


def _device(device: Device, local: int) -> torch.device:
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and there == 0):
        return CPU
    if local >= there:
        raise ValueError(f"Process {local} of this machine needs a GPU of its own, PyTorch sees {there}: start fewer, or --device cpu.")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)
