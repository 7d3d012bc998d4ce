"""The processes that share the steps of one run: each computes its rows of a step, gradients are added up.

The first of them leads: it alone has a voice, keeps states and decides when the run ends. Gradients of an adapter are a
few megabytes, which go from host to host by gloo, whatever computes them. No rows, no trainer, no Ray.
"""

import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# How long one waits for another: the leader may evaluate or store a state. One that dies is seen at once.
TIMEOUT = timedelta(hours=12)


class Left(Exception):
    """Another process of the team is gone."""


class StartAgain(Exception):
    """The run goes on only if all processes of its team start anew."""


class Team:
    """`size` processes, of which this one has `rank`; 0 leads. By itself it is a team of one, which does nothing."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @classmethod
    def meet(cls, rank: int, size: int, host: str, share: Callable[[str], str]) -> "Team":
        """Find the others. `host` is this one's address; `share` gives all of them what the leader calls it with."""
        if size > 1:
            import torch.distributed as dist

            address = share(_address(host) if rank == 0 else "")
            dist.init_process_group("gloo", init_method=address, rank=rank, world_size=size, timeout=TIMEOUT)
        return cls(rank, size)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def part(self, rows: Sequence[int]) -> Sequence[int]:
        """The rows of a step that are computed here: of rows by length each process gets some of all lengths."""
        return rows[self.rank :: self.size]

    def tell(self, value: Any = None) -> Any:
        """What the leader calls this with, in all processes."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        box = [value]
        with _whole_team():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def total(self, number: float) -> float:
        """The sum over all processes."""
        if self.size == 1:
            return number
        import torch
        import torch.distributed as dist

        sum_1 = torch.tensor([number], dtype=torch.float64)
        with _whole_team():
            dist.all_reduce(sum_1)
        return sum_1.item()

    def means(self, values: dict[str, float], weight: float) -> dict[str, float]:
        """The mean over all processes of each value, by their weights; a process that has none has no weight."""
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        with _whole_team():
            dist.all_gather_object(found, (values, weight))
        weights = [(each, weight) for each, weight in found if each]
        names = weights[0][0] if weights else {}
        sums = sum(weight for _, weight in weights)
        return {name: sum(each[name] * weight for each, weight in weights) / max(sums, 1e-9) for name in names}

    def add_gradients(self, parameters: Iterable["torch.nn.Parameter"]) -> None:
        """Give each parameter the sum of its gradients in all processes."""
        import torch
        import torch.distributed as dist

        trained = [parameter for parameter in parameters if parameter.requires_grad]
        # One that had no rows has no gradients.
        found = [torch.zeros_like(each) if each.grad is None else each.grad for each in trained]
        flat = torch.cat([gradient.detach().float().cpu().flatten() for gradient in found])
        with _whole_team():
            dist.all_reduce(flat)
        parts = flat.split([each.numel() for each in trained])
        for parameter, gradient in zip(trained, parts, strict=True):
            parameter.grad = gradient.view_as(parameter).to(parameter.device, parameter.dtype)

    def leave(self) -> None:
        """Let the others go, wherever they wait: their calls raise `Left`."""
        if self.size > 1:
            import torch.distributed as dist

            with suppress(RuntimeError):
                dist.destroy_process_group()


ALONE = Team()


@contextmanager
def _whole_team() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise Left(f"a process that shares the steps is gone: {error}") from error


def _address(host: str) -> str:
    with socket.socket() as free:
        free.bind((host, 0))
        return f"tcp://{host}:{free.getsockname()[1]}"
