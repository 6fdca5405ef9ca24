"""An ensemble as an ONNX file of standard operators.

torch's exporter translates whatever torch.export can trace. A Mamba mixer as it is built is one operator to the tracer,
which `_mamba` translates by hand: traced one by one its operations take a minute, and give a fifth more nodes.
"""

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pkd_lightning.export.facts import Job
from pkd_lightning.export.plain import PlainEnsemble, PlainMamba
from pkd_lightning.export.traced import attempted, traced
from pkd_lightning.models.mamba import own_weights

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSET = 20


def write(job: Job, path: Path) -> None:
    """Write the file; for errors see `traced.attempted`."""
    import onnx

    model: Any = attempted(with_operators(PlainEnsemble(job.ensemble)), _translated, "torch.onnx cannot write")
    for node in model.graph.node:  # where in the source each is from
        del node.metadata_props[:]
        node.ClearField("doc_string")
    onnx.helper.set_model_props(model, job.facts.texts())
    model.producer_name, model.producer_version = "pkd-lightning", job.facts.versions["pkd-lightning"]
    path.write_bytes(model.SerializeToString())


@contextmanager
def opened(path: Path, job: Job) -> Iterator[Callable[[Tensor, int], Tensor]]:
    """The file in onnxruntime, as a function of raw inputs and a number of members."""
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def call(inputs: Tensor, members: int) -> Tensor:
        logits, prefixes = session.run(["logits", "prefixes"], {"inputs": inputs.numpy()})
        return torch.from_numpy(logits if members == job.facts.members else prefixes[:, members - 1])

    yield call


def _translated(model: nn.Module, inputs: Tensor) -> Any:
    """A module as a ModelProto of onnx, which takes batches of any size."""
    operators = torch.ops.pkd_export
    table: dict[Callable[..., Any], Callable[..., Any]] = {
        operators.mamba.default: _mamba,
        operators.rms_norm.default: _rms_norm,
    }
    names = ["logits", "prefixes"] if isinstance(model, PlainEnsemble) else ["logits"]
    with _quiet():
        program = torch.onnx.export(
            traced(model, inputs), dynamo=True, custom_translation_table=table, opset_version=OPSET,
            input_names=["inputs"], output_names=names, verbose=False,
        )  # fmt: skip
        assert program is not None
        return program.model_proto


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of its own workings, hundreds of lines."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def with_operators(module: Any) -> Any:
    """A module with operators in the place of plain mixers and norms that are as they were built."""
    for name, child in module.named_children():
        setattr(module, name, with_operators(child))
    if type(module) is PlainMamba and module.own is not None:
        return OnnxMamba(module, module.own)
    own = type(module) is nn.RMSNorm and len(module.normalized_shape) == 1 and own_weights(module, nn.RMSNorm)
    return OnnxRMSNorm(module) if own else module


@torch.library.custom_op("pkd_export::mamba", mutates_args=())
def mamba_operator(
    tokens: Tensor,
    in_proj: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    to_rank: Tensor,
    to_B: Tensor,
    to_C: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    out_proj: Tensor,
) -> Tensor:
    """A mixer, only ever traced: weights of linear layers transposed, A of shape (d_inner, d_state)."""
    raise NotImplementedError("it is only traced")


@torch.library.custom_op("pkd_export::rms_norm", mutates_args=())
def rms_norm_operator(tokens: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, only ever traced."""
    raise NotImplementedError("it is only traced")


@mamba_operator.register_fake
def _(tokens: Tensor, *weights: Tensor) -> Tensor:
    return torch.empty_like(tokens)


@rms_norm_operator.register_fake
def _(tokens: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(tokens)


class OnnxMamba(nn.Module):
    """A mixer with the weights that it is built with, as one operator."""

    def __init__(self, mixer: PlainMamba, weights: tuple[Tensor, ...]) -> None:
        super().__init__()
        in_proj, conv_weight, conv_bias, x_proj, dt_weight, dt_bias, _, D, out_proj = (w.detach() for w in weights)
        parts = (part.T for part in x_proj.split(mixer.sizes))
        A = mixer.A.detach()
        kept = (in_proj.T, conv_weight, conv_bias, *parts, dt_weight.T, dt_bias, A, D, out_proj.T)
        self.count = len(kept)
        for i, weight in enumerate(kept):
            self.register_buffer(f"weight_{i}", weight.contiguous())

    def forward(self, tokens: Tensor) -> Tensor:
        """See `Mamba.forward`."""
        mixed: Tensor = mamba_operator(tokens, *(getattr(self, f"weight_{i}") for i in range(self.count)))
        return mixed


class OnnxRMSNorm(nn.Module):
    """An RMSNorm as one operator."""

    def __init__(self, norm: nn.RMSNorm) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, torch.finfo(torch.float32).eps if norm.eps is None else norm.eps

    def forward(self, tokens: Tensor) -> Tensor:
        """See `nn.RMSNorm.forward`."""
        normed: Tensor = rms_norm_operator(tokens, self.weight, self.eps)
        return normed


def _mamba(
    tokens: Any, in_proj: Any, conv_weight: Any, conv_bias: Any, to_rank: Any, to_B: Any, to_C: Any, dt_weight: Any,
    dt_bias: Any, A: Any, D: Any, out_proj: Any,
) -> Any:  # fmt: skip
    """`PlainMamba.forward` in operators of ONNX."""
    from onnxscript import opset20 as op

    d_inner, d_conv = int(conv_weight.shape[0]), int(conv_weight.shape[2])
    states, length = int(A.shape[1]), int(tokens.shape[1])
    x, z = op.Split(op.MatMul(tokens, in_proj), axis=-1, num_outputs=2)
    x = op.Conv(op.Transpose(x, perm=[0, 2, 1]), conv_weight, conv_bias, group=d_inner, pads=[d_conv - 1, 0])
    x = op.Transpose(x, perm=[0, 2, 1])
    x = op.Mul(x, op.Sigmoid(x))
    B, C = op.MatMul(x, to_B), op.MatMul(x, to_C)
    delta = op.Softplus(op.Add(op.MatMul(op.MatMul(x, to_rank), dt_weight), dt_bias))
    last, before_last = _ints([-1]), _ints([2])
    a = op.Exp(op.Mul(op.Unsqueeze(delta, last), A))
    u = op.Mul(op.Unsqueeze(op.Mul(delta, x), last), op.Unsqueeze(B, before_last))
    h = _scan(op, a, u, length, d_inner, states)
    y = op.Add(op.ReduceSum(op.Mul(h, op.Unsqueeze(C, before_last)), last, keepdims=0), op.Mul(D, x))
    return op.MatMul(op.Mul(y, op.Mul(z, op.Sigmoid(z))), out_proj)


def _scan(op: Any, a: Any, u: Any, length: int, d_inner: int, states: int) -> Any:
    """`plain.scan` in operators of ONNX."""
    steps = math.isqrt(length - 1) + 1
    chunks = -(-length // steps)
    if missing := chunks * steps - length:
        pads = _ints([0] * 5 + [missing] + [0] * 2)
        a, u = op.Pad(a, pads), op.Pad(u, pads)
    shape = _ints([0, chunks, steps, d_inner, states])
    a_k, u_k = (_list(op.Split(op.Reshape(x, shape), axis=2, num_outputs=steps)) for x in (a, u))
    h, p = [u_k[0]], [a_k[0]]
    for a_t, u_t in zip(a_k[1:], u_k[1:], strict=True):
        h.append(op.Add(op.Mul(a_t, h[-1]), u_t))
        p.append(op.Mul(a_t, p[-1]))
    whole = op.Concat(*h, axis=2) if steps > 1 else h[0]
    if chunks > 1:
        end_h, end_p = (_list(op.Split(x[-1], axis=1, num_outputs=chunks)) for x in (h, p))
        ends = [end_h[0]]
        for state, product in zip(end_h[1:-1], end_p[1:-1], strict=True):
            ends.append(op.Add(op.Mul(product, ends[-1]), state))
        before = op.Concat(*ends, axis=1) if len(ends) > 1 else ends[0]
        before = op.Pad(before, _ints([0, 1] + [0] * 8))
        products = op.Concat(*p, axis=2) if steps > 1 else p[0]
        whole = op.Add(whole, op.Mul(products, before))
    whole = op.Reshape(whole, _ints([0, chunks * steps, d_inner, states]))
    return op.Slice(whole, _ints([0]), _ints([length]), _ints([1])) if missing else whole


def _rms_norm(tokens: Any, weight: Any, eps: float) -> Any:
    """The operations that onnxruntime takes for one."""
    from onnxscript import opset20 as op

    square = op.ReduceMean(op.Pow(tokens, _float(2.0)), _ints([-1]), keepdims=1)
    return op.Mul(op.Div(tokens, op.Sqrt(op.Add(square, _float(eps)))), weight)


def _list(given: Any) -> list[Any]:
    return list(given) if isinstance(given, Sequence) else [given]


def _ints(values: list[int]) -> Any:
    from onnxscript import opset20 as op

    return op.Constant(value_ints=values)


def _float(value: float) -> Any:
    from onnxscript import opset20 as op

    return op.Constant(value_float=value)
