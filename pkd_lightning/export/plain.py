"""An ensemble in plain operations of torch, for tracers that know no kernels: raw inputs to every prefix's logits."""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pkd_lightning.earlier import InTurn
from pkd_lightning.ensemble import ProgressiveEnsemble
from pkd_lightning.models.blocks import Block, with_local
from pkd_lightning.models.mamba import Mamba
from pkd_lightning.prefixes import mix
from pkd_lightning.tasks import Classification


class PlainEnsemble(nn.Module):
    """Raw inputs (batch, *input_shape) to logits (batch, L), and those of each prefix (batch, members, L).

    Its members are copies, with `PlainMamba` and `PlainBlock` in the place of our own modules.
    """

    def __init__(self, ensemble: ProgressiveEnsemble) -> None:
        super().__init__()
        self.members = nn.ModuleList(plain(copy.deepcopy(member)) for member in ensemble.members)
        self.scales, self.task = ensemble.scales, ensemble.task
        own = isinstance(self.task, Classification) and type(self.task).prepare is Classification.prepare
        # not while it is traced: what a task keeps of its first call would be tensors of the tracer
        self.task.prepare(torch.zeros(1, *self.task.input_shape))
        scale, shift = self.task.scale_and_shift if own else (None, None)  # type: ignore[attr-defined]
        self.scale: Tensor | None
        self.shift: Tensor | None
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)
        self.eval().requires_grad_(False)

    def prepare(self, inputs: Tensor) -> Tensor:
        """See `Task.prepare`."""
        if self.scale is None or self.shift is None:
            return self.task.prepare(inputs)
        return inputs.float() * self.scale + self.shift

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of the last prefix, and of all."""
        prepared, turn = self.prepare(inputs), InTurn(list(self.members))
        prefixes: list[Tensor] = []
        for scales in self.scales:
            prefixes.append(mix(prefixes[-1] if prefixes else None, turn.ask(prepared).logits, scales))
        return prefixes[-1], torch.stack(prefixes, dim=1)


def plain(module: nn.Module) -> nn.Module:
    """A module with plain ones in the place of those of our own in it, which share their parts."""
    for name, child in module.named_children():
        setattr(module, name, plain(child))
    if type(module) is Mamba:
        return PlainMamba(module)
    return PlainBlock(module) if type(module) is Block else module


class PlainBlock(nn.Module):
    """`Block` whose orders are permutations by index."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.local, self.norm, self.mixer, self.residual = block.local, block.norm, block.mixer, block.residual

    def forward(self, tokens: Tensor, grid: tuple[int, int], columns: bool = False, backwards: bool = False) -> Tensor:
        """See `Block.forward`."""
        rows, width = grid
        order = [r * width + c for c in range(width) for r in range(rows)] if columns else list(range(rows * width))
        order = order[::-1] if backwards else order
        back = sorted(range(len(order)), key=order.__getitem__)
        tokens = with_local(self.local, tokens, grid)
        x = self.norm(tokens)
        if not (columns or backwards) or not getattr(self.mixer, "reads_in_order", True):
            x = self.mixer(x)
        else:
            x = self.mixer(x.index_select(1, torch.tensor(order))).index_select(1, torch.tensor(back))
        mixed: Tensor = tokens + x if self.residual else x
        return mixed


class PlainMamba(nn.Module):
    """`Mamba` with a scan of few operations on large tensors; it calls the layers of the mixer.

    Attributes:
        own: see `Mamba.plain_weights`.
    """

    def __init__(self, mixer: Mamba) -> None:
        super().__init__()
        self.in_proj, self.conv1d, self.x_proj = mixer.in_proj, mixer.conv1d, mixer.x_proj
        self.dt_proj, self.out_proj = mixer.dt_proj, mixer.out_proj
        self.A, self.D = nn.Parameter(mixer._decay().detach()), mixer.D
        self.own = mixer.plain_weights()
        self.sizes = [mixer.dt_rank, mixer.d_state, mixer.d_state]

    def forward(self, tokens: Tensor) -> Tensor:
        """See `Mamba.forward`."""
        x, z = self.in_proj(tokens).chunk(2, dim=-1)
        x = F.silu(self.conv1d(x.transpose(1, 2))[..., : tokens.shape[1]].transpose(1, 2))
        dt, B, C = self.x_proj(x).split(self.sizes, dim=-1)
        delta = F.softplus(self.dt_proj(dt))
        h = scan(torch.exp(delta[..., None] * self.A), (delta * x)[..., None] * B[:, :, None])
        y = (h @ C[..., None])[..., 0] + self.D * x
        mixed: Tensor = self.out_proj(y * F.silu(z))
        return mixed


def scan(a: Tensor, u: Tensor) -> Tensor:
    """h_t = a_t * h_(t-1) + u_t from h = 0, over the second dimension of (batch, length, d_inner, d_state).

    First inside of about sqrt(length) chunks, side by side, then from chunk to chunk: 5 * sqrt(length) operations,
    where a loop has 2 * length, and those of doubling (see `kernels.scan.associative`) are all on large tensors.
    """
    length = a.shape[1]
    steps = math.isqrt(length - 1) + 1  # of a chunk
    chunks = -(-length // steps)
    if missing := chunks * steps - length:
        a, u = (F.pad(x, (0, 0, 0, 0, 0, missing)) for x in (a, u))
    a_k, u_k = (x.unflatten(1, (chunks, steps)).split(1, 2) for x in (a, u))
    states, products = [u_k[0]], [a_k[0]]  # of each chunk from h = 0, and of what multiplies the h before it
    for a_t, u_t in zip(a_k[1:], u_k[1:], strict=True):
        states.append(a_t * states[-1] + u_t)
        products.append(a_t * products[-1])
    h = torch.cat(states, 2)
    if chunks > 1:
        ends = [states[-1][:, :1]]  # h at the end of each chunk but the last
        for state, product in zip(states[-1].split(1, 1)[1:-1], products[-1].split(1, 1)[1:-1], strict=True):
            ends.append(product * ends[-1] + state)
        h = h + torch.cat(products, 2) * F.pad(torch.cat(ends, 1), (0, 0, 0, 0, 0, 0, 1, 0))
    return h.flatten(1, 2)[:, :length]
