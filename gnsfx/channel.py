"""A sum over ranks that tells apart what does not belong together.

    rank r      1, (what it calls, length, step) in the slots of r, 0 in those of others, vector_r, 1
    all ranks   W, (what it calls, length, step) of every rank,                     sum_r vector_r, W

Every rank gets the same bits. A rank that is at another step, or brings another vector, shows in the header; one that
does not come at all ends in a time-out; one that has an error of its own sends 0 for the 1s and says so in place of the step. The
all-reduce runs in a process group of its own, so that a rank out of step cannot meet the gradients of the others.
"""

from __future__ import annotations

import contextlib
import time
import weakref
import zlib
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gnsfx._torch import WeakIdKeyDictionary
from gnsfx.errors import GnsError

SHOWN = 4
WITHDRAWN = -1  # in place of the step
_EQUALLY = "Call it equally often and in the same order on all ranks, also on one without examples, with the same trainable parameters."


class Channel:
    """A process group over the ranks of another, for these sums alone."""

    def __init__(self, group: Any, timeout: float) -> None:
        self.ranks = dist.get_process_group_ranks(group)
        self.rank = dist.get_rank(group)
        backend = dist.get_backend(group)
        self._cuda, self._cpu = "nccl" in backend, "gloo" in backend
        try:
            made = dist.new_group(
                self.ranks, timeout=timedelta(seconds=timeout), backend=backend, use_local_synchronization=True
            )
        except RuntimeError as error:
            raise GnsError(self._missing("the first step", timeout)) from error
        self._group = weakref.ref(made)  # destroy_process_group() ends a group's threads only if nothing holds it
        self._calls: dict[str, int] = {}
        self._lost = ""  # why no more sums are possible
        self._capacity = 0  # what all ranks have room for
        self._pending: deque[tuple[Tensor, Any, str]] = deque()

    def sum(self, vector: Tensor, what: str, step: int | None, timeout: float) -> Tensor:
        self.check(wait=False)
        calls = self._calls[what] = self._calls.get(what, 0) + 1
        step = calls if step is None else step
        length = len(vector)
        if length > self._capacity:
            # Only the header says so: a payload of another size than that of the others would end the process.
            self._send(vector[:0], length, what, step, timeout)
            self.check()
            self._capacity = length
        return self._send(vector, length, what, step, timeout)

    def withdraw(self, what: str, like: Tensor, timeout: float) -> None:
        """In place of :meth:`sum`, where this rank has an error of its own to raise: the others get one too, at once."""
        self._calls[what] = self._calls.get(what, 0) + 1
        with contextlib.suppress(GnsError):
            self._send(like.new_zeros(0), 0, what, WITHDRAWN, timeout)

    def _send(self, vector: Tensor, length: int, what: str, step: int, timeout: float) -> Tensor:
        if self._lost:
            raise GnsError(f"{what}: no more sums over these ranks, since an earlier one failed. {self._lost}")
        group = self._group()
        if group is None:
            raise GnsError(f"{what}: no sum over these ranks, since their process group was destroyed.")
        rows = torch.zeros(3, len(self.ranks), dtype=vector.dtype)
        rows[:, self.rank] = torch.tensor([zlib.crc32(what.encode()) % 2**20, length, step], dtype=vector.dtype)
        header = rows.flatten().to(vector.device, non_blocking=True)
        one = vector.new_full((1,), float(step != WITHDRAWN))
        payload = torch.cat([one, header, vector, vector.new_zeros(self._capacity - len(vector)), one])
        sent = self.place(payload)
        started = time.monotonic()
        try:
            work = dist.all_reduce(sent, group=group, async_op=True)
            assert work is not None
            work.wait(timedelta(seconds=timeout)) if sent.device.type == "cpu" else work.wait()
        except RuntimeError as error:
            self._lost = self._missing(f"{what}, step {step}", time.monotonic() - started)
            raise GnsError(self._lost) from error
        begin = 1 + len(header)
        self._note(torch.cat([sent[:begin], sent[-1:]]), what)
        found = sent[begin : begin + len(vector)]
        if found.device.type == "cuda":  # the header is read later; nothing may be made of a sum that lacks a rank
            found = torch.where(sent[:1] == len(self.ranks), found, torch.nan)
        return found.to(vector.device)

    def place(self, tensor: Tensor) -> Tensor:
        """Where the backend can add it up."""
        if tensor.device.type == "cuda" or self._cpu or not self._cuda:
            return tensor if self._cuda or tensor.device.type == "cpu" else tensor.cpu()
        return tensor.to(torch.device("cuda", torch.cuda.current_device()))

    def check(self, wait: bool = True) -> None:
        """What the headers that arrived say.

        Raises:
            GnsError: a rank is at another step, or brought another vector.
        """
        while self._pending:
            header, event, what = self._pending[0]
            if event is not None and not event.query():
                if not wait:
                    return
                event.synchronize()
            self._pending.popleft()
            self._compare(header.tolist(), what)

    def _note(self, header: Tensor, what: str) -> None:
        event = None
        if header.device.type == "cuda":
            header = header.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending.append((header, event, what))
        if event is None:
            self.check()

    def _compare(self, header: Sequence[float], what: str) -> None:
        world = len(self.ranks)
        steps = header[1 + 2 * world : 1 + 3 * world]
        if gone := [f"rank {self.ranks[r]}" for r, step in enumerate(steps) if step == WITHDRAWN]:
            more = ", ..." if len(gone) > SHOWN else ""
            raise GnsError(
                f"{what}: {', '.join(gone[:SHOWN])}{more} could not take part and has an error of its own that says why. The step is "
                "left out; what was measured before is kept."
            )
        if header[0] != world or header[-1] != world:
            raise GnsError(f"{what}: the ranks brought vectors that do not fit each other. {_EQUALLY}")
        words = "calls something else", "has {:.0f} numbers to add up", "is at step {:.0f}"
        for row, word in enumerate(words):
            values = header[1 + row * world : 1 + (row + 1) * world]
            mine = values[self.rank]
            others = [f"rank {self.ranks[r]} {word.format(v)}" for r, v in enumerate(values) if v != mine]
            if others:
                more = ", ..." if len(others) > SHOWN else ""
                this = f"; this one, rank {self.ranks[self.rank]}, {word.format(mine)}" if row else ""
                raise GnsError(
                    f"{what}: the ranks are not at the same point: {', '.join(others[:SHOWN])}{more}{this}. {_EQUALLY}"
                )

    def _missing(self, where: str, seconds: float) -> str:
        return (
            f"{where}: not all of the {len(self.ranks)} ranks came within {seconds:.0f} seconds (this one is rank "
            f"{self.ranks[self.rank]}). One of them ended or failed, see its output, or did not call it: every rank must, equally "
            "often, also one without examples. What was measured before is kept."
        )


_channels: Any = WeakIdKeyDictionary()  # group -> Channel


def channel_of(group: Any, timeout: float) -> Channel:
    group = dist.group.WORLD if group is None else group
    channel = _channels.get(group)
    if channel is None:
        channel = _channels[group] = Channel(group, timeout)
    return channel
