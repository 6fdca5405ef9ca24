"""The Mamba-1 block (Gu & Dao, arXiv 2312.00752, section 3.4), weights interchangeable with `mamba_ssm.Mamba`."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.flop_counter import FlopCounterMode

from pkd_lightning.kernels.scan import (
    fused_block,
    fused_residual_block,
    scan_macs,
    selective_scan,
    selective_scan_step,
)
from pkd_lightning.kernels.scan.order import Order

LINEAR = ("in_proj", "x_proj", "dt_proj", "out_proj")
PLAIN = (Tensor, nn.Parameter)  # others, as those of quantisation libraries, compute in their own way


def only_forward(layer: Any, kind: type[nn.Module]) -> bool:
    """Whether a call of `layer` is the `forward` of `kind` and nothing else, such as a hook or a compiled call."""
    if type(layer) is not kind or "forward" in layer.__dict__ or _has_any_global_hook():
        return False
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return not hooks and layer._compiled_call_impl is None


def own_weights(layer: Any, kind: type[nn.Module]) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a linear, convolutional or norm layer, or None where a call of it does more than apply them.

    It does where the layer was replaced, wrapped, parametrised or quantised, which all change its class or that of its
    weight, where it has hooks (so does pruning), or a `forward` of its own.
    """
    if not only_forward(layer, kind):
        return None
    parameters = layer._parameters
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if type(weight) not in PLAIN or (bias is not None and type(bias) not in PLAIN):
        return None
    return weight, bias


def rms_weight(norm: nn.Module, channels: int) -> tuple[Tensor | None] | None:
    """(weight,) of an RMS norm over `channels` as torch has it by default, or (None,) where there is no norm.

    None where a call of the norm does more, or something else.
    """
    if only_forward(norm, nn.Identity):
        return (None,)
    own = own_weights(norm, nn.RMSNorm)
    if own is None or norm.eps is not None or norm.normalized_shape != (channels,):
        return None
    return (own[0],)


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
        fused: compute the block in one pass where there is a kernel for it; False never does. A layer that was
            replaced, wrapped, parametrised or hooked (adapters, pruning, quantisation) is always called, and so it is
            by `step`.
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
        as_built = "mix" not in self.__dict__ and type(self).mix is Mamba.mix
        weights = self.plain_weights() if self.fused and as_built else None
        if weights is not None:
            mixed = fused_block(tokens, *weights)
            if mixed is not None:
                return mixed
        return self.mix(self.in_proj(tokens))

    def fused_residual(self, tokens: Tensor, norm: nn.Module, order: Order, residual: bool) -> Tensor | None:
        """A whole block of a residual network in one pass: `norm`, this mixer in the given order, with `residual` the
        sum with the tokens. None where there is no kernel for it or a call of a module would do more: call them then.

        Shapes as in `forward`; the result is in the tokens' own order.
        """
        if not self.fused or not only_forward(self, Mamba) or "mix" in self.__dict__:
            return None
        scale, weights = rms_weight(norm, self.d_model), self.plain_weights()
        if scale is None or weights is None:
            return None
        return fused_residual_block(tokens, weights, *scale, order, residual)

    def visible(self, tokens: Tensor) -> Tensor:
        """What fvcore sees of a block: `in_proj`. mamba_ssm fuses all else into one kernel. Shapes as in `forward`."""
        visible: Tensor = self.in_proj(tokens)
        return visible.narrow(-1, 0, self.d_model)

    def macs(self, length: int) -> int:
        """Multiply-accumulates of the block on one sequence of `length` tokens, those of the scan (`scan_macs`) too.

        Layers that are not as they were built, such as adapters, are called and counted.
        """
        d_inner, d_state = self.d_inner, self.d_state
        scan = scan_macs(1, length, d_inner, d_state)
        if self.plain_weights() is not None:
            projections = 2 * self.d_model + self.dt_rank + 2 * d_state + self.dt_rank + self.d_model
            return length * d_inner * (projections + self.d_conv) + scan
        linear = ((self.in_proj, self.d_model), (self.x_proj, d_inner), (self.dt_proj, self.dt_rank),
                  (self.out_proj, d_inner))  # fmt: skip
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.conv1d(torch.zeros(1, d_inner, length))
            for layer, features in linear:
                layer(torch.zeros(1, length, features))
        return int(counter.get_total_flops()) // 2 + scan  # it counts a multiply-accumulate as two

    def plain_weights(self) -> tuple[Tensor, ...] | None:
        """The weights in the order of `fused_block`, or None where a call of a layer does more than apply them."""
        layers = self._modules
        own, convolution = [own_weights(layers.get(name), nn.Linear) for name in LINEAR], self._convolution_weights()
        if convolution is None or None in own:
            return None
        (in_proj, no_bias), (x_proj, no_other), (dt_proj, dt_bias), (out_proj, no_third) = own  # type: ignore[misc]
        if dt_bias is None or not (no_bias is no_other is no_third is None):
            return None
        return in_proj, *convolution, x_proj, dt_proj, dt_bias, self.A_log, self.D, out_proj

    def _convolution_weights(self) -> tuple[Tensor, Tensor] | None:
        """Weight and bias of conv1d, or None where it is not as it was built."""
        layer: Any = self._modules.get("conv1d")
        own = own_weights(layer, nn.Conv1d)
        if own is None or own[1] is None:
            return None
        built = ((self.d_conv,), (1,), (self.d_conv - 1,), (1,), self.d_inner, "zeros")
        shape = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode)
        if shape != built:
            return None
        return own[0], own[1]

    def _steps(self, dt: Tensor) -> tuple[Tensor, Tensor | None]:
        """Step sizes before softplus, (..., d_inner), and the bias that is still to be added.

        The scan adds the bias in float32 where the layer's own sum may be rounded to half precision.
        """
        own = own_weights(self._modules.get("dt_proj"), nn.Linear)
        if own is None or own[1] is None:
            return self.dt_proj(dt), None
        return F.linear(dt, own[0]), own[1]

    def _decay(self) -> Tensor:
        """A, (d_inner, d_state), in float32 at least."""
        return -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))

    def step(self, token: Tensor, state: MambaState | None = None) -> tuple[Tensor, MambaState]:
        """One step of the block as a recurrence: over a sequence's tokens it gives what `forward` gives.

        A conv1d that was replaced, wrapped or hooked is called on the last d_conv inputs, zeros before the first.

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
        own = self._convolution_weights()
        x = self.conv1d(window)[..., self.d_conv - 1] if own is None else (window * own[0][:, 0]).sum(-1) + own[1]
        x = F.silu(x)
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        delta, bias = self._steps(dt)
        y, h = selective_scan_step(
            *(state.h, x, delta, self._decay(), B, C, self.D),
            z=z,
            delta_bias=bias,
            delta_softplus=True,
        )
        return self.out_proj(y), MambaState(window[..., 1:], h)

    def mix(self, xz: Tensor) -> Tensor:
        """Everything after `in_proj`: convolution, projections, scan, gate and `out_proj`.

        Args:
            xz: (batch, length, 2 * d_inner).

        Returns:
            (batch, length, d_model).
        """
        x, z = xz.transpose(1, 2).chunk(2, dim=1)
        x = F.silu(self.conv1d(x)[..., : x.shape[-1]])
        dt, B, C = self.x_proj(x.transpose(1, 2)).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        delta, bias = self._steps(dt)
        y = selective_scan(
            x,
            delta.transpose(1, 2),
            self._decay(),
            B.transpose(1, 2),
            C.transpose(1, 2),
            self.D,
            z=z,
            delta_bias=bias,
            delta_softplus=True,
        )
        assert isinstance(y, Tensor)
        mixed: Tensor = self.out_proj(y.transpose(1, 2))
        return mixed
