"""The selective scan against loops over time in PyTorch, mambapy, the register floor, and itself on two threads.

The loops: the plain one, which the target is about; one that takes less memory; our reference, which also splits the
tensors into steps at once, not by indexing, whose backward pass writes a full-length gradient at every step.
"""

import importlib.util
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.floor import floor
from benchmarks.memory import bytes_of, peak_bytes
from benchmarks.timing import Row, at_least, at_most, compared, interleaved, judged
from pkd_lightning.kernels.scan import selective_scan, selective_scan_reference
from pkd_lightning.kernels.threads import share

Scan = Callable[..., Tensor]

BATCH = 32
# (length, d_inner, d_state): of paper_mnist's students 1, 3 and 7 and its teacher, and of patch models
WORKLOADS = {
    "a": (49, 2, 16),
    "b": (196, 2, 64),
    "c": (784, 2, 58),
    "d": (784, 2, 155),
    "e": (64, 192, 16),
    "f": (64, 384, 16),
}
NEAR_FLOOR = "bcef"  # those whose time is to stay near the register floor
TWO_THREADS = "cdef"  # those large enough for a second thread
SECONDS = 4.5  # a call's share of the time: the plain loop of d, 4 s a round, gets two rounds


def plain_loop(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor
) -> Tensor:
    """The ordinary way to write it, as mamba_ssm's `selective_scan_ref`: all steps' factors at once, then a loop."""
    delta = F.softplus(delta + delta_bias[:, None])
    decay = torch.exp(torch.einsum("bdl,dn->bdln", delta, A))
    drive = torch.einsum("bdl,bnl,bdl->bdln", delta, B, u)
    h = u.new_zeros(*u.shape[:2], A.shape[1])
    steps = []
    for t in range(u.shape[2]):
        h = decay[:, :, t] * h + drive[:, :, t]
        steps.append(torch.einsum("bdn,bn->bd", h, C[:, :, t]))
    return (torch.stack(steps, -1) + u * D[:, None]) * F.silu(z)


def step_loop(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor
) -> Tensor:
    """The plain loop with less memory: each step's factors within the loop, which is why it is faster."""
    delta = F.softplus(delta + delta_bias[:, None])
    h = u.new_zeros(*u.shape[:2], A.shape[1])
    steps = []
    for t in range(u.shape[2]):
        decay = torch.exp(delta[..., t, None] * A)
        h = decay * h + (delta[..., t] * u[..., t])[..., None] * B[:, None, :, t]
        steps.append((h * C[:, None, :, t]).sum(-1))
    return (torch.stack(steps, -1) + u * D[:, None]) * F.silu(z)


def reference(*tensors: Tensor) -> Tensor:
    y = selective_scan_reference(*tensors, delta_softplus=True)
    assert isinstance(y, Tensor)
    return y


def fused(*tensors: Tensor) -> Tensor:
    y = selective_scan(*tensors, delta_softplus=True, backend="cpu")
    assert isinstance(y, Tensor)
    return y


def mambapy(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor
) -> Tensor:
    """The parallel scan of mambapy, with the softplus and the gate that it leaves to its block."""
    from mambapy.mamba import MambaBlock

    delta = F.softplus(delta + delta_bias[:, None])
    u, delta, B, C, z = (x.transpose(1, 2) for x in (u, delta, B, C, z))
    y: Tensor = MambaBlock.selective_scan(None, u, delta, A, B, C, D)  # it does not use its block
    return (y * F.silu(z)).transpose(1, 2)


def implementations() -> dict[str, Scan]:
    """By name; mambapy where it is installed."""
    found: dict[str, Scan] = {"fused": fused, "plain loop": plain_loop, "step loop": step_loop, "reference": reference}
    if importlib.util.find_spec("mambapy"):
        return {**found, "mambapy": mambapy}
    print("mambapy is not installed (it comes with the dev extra): nothing is compared with it")
    return found


def inputs(length: int, channels: int, states: int, batch: int = BATCH) -> tuple[Tensor, ...]:
    """u, delta, A, B, C, D, z and delta_bias, drawn alike every time."""
    draw = torch.Generator().manual_seed(0)
    u, delta, z = (torch.randn(batch, channels, length, generator=draw) for _ in range(3))
    B, C = (torch.randn(batch, length, states, generator=draw).transpose(1, 2) for _ in range(2))
    A = -torch.rand(channels, states, generator=draw) - 0.5
    D, delta_bias = torch.rand(channels, generator=draw), torch.rand(channels, generator=draw) - 1
    return u, delta, A, B, C, D, z, delta_bias


def scan_call(scan: Scan, tensors: tuple[Tensor, ...], backward: bool) -> Callable[[], tuple[Tensor, ...]]:
    """A call of `scan` that returns its output, with `backward` also the gradients of all inputs."""
    if not backward:
        return torch.no_grad()(lambda: (scan(*tensors),))
    leaves = [x.detach().requires_grad_() for x in tensors]
    grad = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1)).to(tensors[0])

    def call() -> tuple[Tensor, ...]:
        y = scan(*leaves)
        return y.detach(), *torch.autograd.grad(y, leaves, grad)

    return call


def agree(scans: Mapping[str, Scan]) -> None:
    """Check that all compute the same.

    Raises:
        AssertionError: an output or a gradient differs.
    """
    tensors = inputs(23, 3, 5, batch=4)
    expected = scan_call(reference, tensors, backward=True)()
    for name, scan in scans.items():
        for ours, theirs in zip(scan_call(scan, tensors, backward=True)(), expected, strict=True):
            torch.testing.assert_close(
                ours, theirs, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
            )


def rows(rounds: int, workloads: Mapping[str, tuple[int, int, int]] = WORKLOADS, batch: int = BATCH) -> list[Row]:
    """What the table and the JSON show."""
    scans = implementations()
    agree(scans)
    result = []
    for workload, (length, channels, states) in workloads.items():
        tensors = inputs(length, channels, states, batch)
        for backward in (False, True):
            what = f"scan {workload} ({length}, {channels}, {states}) forward{'+backward' if backward else ''}"
            calls: dict[str, Callable[[], object]] = {
                name: scan_call(scan, tensors, backward) for name, scan in scans.items()
            }
            calls["floor"] = floor(batch * length * channels * states, backward)
            calls["two threads"] = calls["fused"]
            large = workload in TWO_THREADS
            if large:
                calls["floor, two threads"] = _in_two(floor(batch * length * channels * states // 2, backward))
            times = interleaved(calls, rounds, SECONDS, {"two threads": 2})
            result.append(compared(what, times, "fused", "plain loop", at_least(35 if backward else 25)))
            if "mambapy" in times:
                result.append(compared(what, times, "fused", "mambapy", at_least(10)))
            result += [compared(what, times, "fused", other) for other in ("step loop", "reference")]
            near = at_most(4 if backward else 2.5) if workload in NEAR_FLOOR else None
            result.append(compared(what, times, "fused", "floor", near, cost=True))
            two = compared(f"{what}, two threads", times, "two threads", "fused", at_least(1.7) if large else None)
            two |= {"against": "one thread", "threads": 2}
            if large:  # what a second core has to give at this moment, as another process may be using it
                gain = compared(f"{what}, two threads", times, "floor, two threads", "floor")["figure"]
                two |= {"note": f"the register floor gets {gain:.2f}", "floor_figure": gain}
            result.append(two)
            result.append(_memory(what, scan_call(fused, tensors, backward)))
    return result


def _in_two(half: Callable[[], object]) -> Callable[[], object]:
    """`half` in each of two threads at once."""
    return lambda: share(lambda *_: half(), 2, 2)


def _memory(what: str, call: Callable[[], tuple[Tensor, ...]]) -> Row:
    returned, peak = bytes_of(call()), peak_bytes(call)
    row: Row = {"what": f"{what}, peak memory", "bytes": peak, "bytes_returned": returned}
    return judged(row, peak / returned, "x the returned tensors", at_most(1.2))
