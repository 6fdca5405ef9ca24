"""The Mamba-1 block (Gu & Dao, arXiv 2312.00752, section 3.4), weights interchangeable with `mamba_ssm.Mamba`."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pkd_lightning.models.scan import fused_block, selective_scan, selective_scan_step

LAYERS = {"in_proj": nn.Linear, "conv1d": nn.Conv1d, "x_proj": nn.Linear, "dt_proj": nn.Linear, "out_proj": nn.Linear}


class MambaState(NamedTuple):
    """Between two steps of a block.

    Attributes:
        window: (batch, d_inner, d_conv - 1), the inputs of the convolution so far.
        h: (batch, d_inner, d_state), the state of the scan.
    """

    window: Tensor
    h: Tensor


class Mamba(nn.Module):
    """Selective state space block: (batch, length, d_model) to the same shape, causal in the length.

    Parameter names, shapes and initialisation are those of `mamba_ssm.Mamba`, so state dicts move both ways.

    Args:
        d_model: channels of a token.
        d_state: state size N of each inner channel.
        d_conv: width of the causal depthwise convolution.
        expand: d_inner = expand * d_model.
        dt_rank: rank of the step-size projection; None for ceil(d_model / 16).
        dt_min: smallest initial step size.
        dt_max: largest initial step size.

    Attributes:
        fused: compute the block in one pass where there is a kernel for it; False never does. Layers that were replaced
            or have hooks (pruning, adapters, quantisation) are always called.
    """

    fused = True

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
    ) -> None:
        super().__init__()
        self.d_model, self.d_state, self.d_conv = d_model, d_state, d_conv
        self.d_inner = expand * d_model
        self.dt_rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=False)
        self.conv1d = nn.Conv1d(self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1)
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner)
        self.A_log = nn.Parameter(torch.arange(1, d_state + 1, dtype=torch.float32).log().repeat(self.d_inner, 1))
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)
        self._initialise_steps(dt_min, dt_max)

    def _initialise_steps(self, dt_min: float, dt_max: float) -> None:
        """Draw softplus(bias) log-uniformly from [dt_min, dt_max] (arXiv 2312.00752, 3.6), as mamba_ssm does."""
        bound = self.dt_rank**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        dt = torch.exp(torch.empty(self.d_inner).uniform_(math.log(dt_min), math.log(dt_max))).clamp(min=1e-4)
        with torch.no_grad():
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (batch, length, d_model) to (batch, length, d_model)."""
        if self.fused and self._layers_are_plain():
            conv, dt, weights = self.conv1d, self.dt_proj, (self.A_log, self.D, self.out_proj.weight)
            projections = (self.in_proj.weight, conv.weight, conv.bias, self.x_proj.weight, dt.weight, dt.bias)
            mixed = fused_block(tokens, *projections, *weights)  # type: ignore[arg-type]
            if mixed is not None:
                return mixed
        return self.mix(self.in_proj(tokens))

    def _layers_are_plain(self) -> bool:
        """Whether each layer is as it was built and only its weights count."""
        for name, kind in LAYERS.items():
            layer: Any = self._modules[name]
            hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks
            if hooks or type(layer) is not kind:
                return False
        return True

    def step(self, token: Tensor, state: MambaState | None = None) -> tuple[Tensor, MambaState]:
        """One step of the block as a recurrence: over a sequence's tokens it gives what `forward` gives.

        Args:
            token: (batch, d_model).
            state: what the step before returned, None at first.

        Returns:
            The output (batch, d_model) and the new state.
        """
        if state is None:
            window = token.new_zeros(len(token), self.d_inner, self.d_conv - 1)
            state = MambaState(window, token.new_zeros(len(token), self.d_inner, self.d_state))
        x, z = self.in_proj(token).chunk(2, dim=-1)
        window = torch.cat([state.window, x[..., None]], dim=-1)
        assert self.conv1d.bias is not None
        x = F.silu((window * self.conv1d.weight[:, 0]).sum(-1) + self.conv1d.bias)
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        y, h = selective_scan_step(
            *(state.h, x, F.linear(dt, self.dt_proj.weight), -torch.exp(self.A_log), B, C, self.D),
            z=z,
            delta_bias=self.dt_proj.bias,
            delta_softplus=True,
        )
        return self.out_proj(y), MambaState(window[..., 1:], h)

    def mix(self, xz: Tensor) -> Tensor:
        """Everything after `in_proj`: convolution, projections, scan, gate and `out_proj`.

        mamba_ssm fuses exactly this part into one kernel, which is why fvcore, and with it the published FLOPs, sees
        only `in_proj` of a block (see `pkd_lightning.cost`).

        Args:
            xz: (batch, length, 2 * d_inner).

        Returns:
            (batch, length, d_model).
        """
        x, z = xz.transpose(1, 2).chunk(2, dim=1)
        x = F.silu(self.conv1d(x)[..., : x.shape[-1]])
        dt, B, C = self.x_proj(x.transpose(1, 2)).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        y = selective_scan(
            x,
            F.linear(dt, self.dt_proj.weight).transpose(1, 2),
            -torch.exp(self.A_log.float()),
            B.transpose(1, 2),
            C.transpose(1, 2),
            self.D.float(),
            z=z,
            delta_bias=self.dt_proj.bias.float(),
            delta_softplus=True,
        )
        assert isinstance(y, Tensor)
        mixed: Tensor = self.out_proj(y.transpose(1, 2))
        return mixed
