"""Files of torch.export and of ONNX: they need nothing of this package, and take students of any kind."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pkd_lightning.ensemble import ProgressiveEnsemble
from pkd_lightning.errors import ConfigError
from pkd_lightning.export import FORMATS, export
from pkd_lightning.export.facts import Job, facts_of
from pkd_lightning.export.plain import scan
from pkd_lightning.tasks import ImageClassification
from tests.test_export import SCALES, Own, agrees, inputs_of, seeded, small, task_of, usable

TRACED = [
    pytest.param(name, marks=pytest.mark.skipif(not usable(name), reason="the extra `export` is not installed"))
    for name in ("pt2", "onnx")
]
ALONE = """
import sys, torch
program = torch.export.load(sys.argv[1]).module()
for count in (1, 5):
    inputs = torch.load(sys.argv[2])[:count]
    logits, prefixes = program(inputs)
    assert torch.equal(logits, prefixes[:, -1])
torch.save(prefixes, sys.argv[3])
assert not [name for name in sys.modules if name.startswith("pkd_lightning")]
"""


BETWEEN = {"tokeniser": "convolutions", "patch_size": 3, "stem_channels": 3, "stem_blocks": 2, "d_model": 4}
BETWEEN |= {"padding": True, "norm": "rms", "direction": "cross", "head": "mean", "local_conv": 3}


@pytest.mark.parametrize("name", [*TRACED, "safetensors"])
def test_files_of_students_with_blocks_between_the_convolutions(name: str, tmp_path: Path) -> None:
    members = [seeded((1, 8, 8), 3, seed, **BETWEEN) for seed in range(2)]
    ensemble = ProgressiveEnsemble(members, SCALES[:2], task_of((1, 8, 8), 3)).eval()
    done = export(ensemble, name, tmp_path)
    with FORMATS[name].opened(done.path, Job(ensemble, done.facts, done.path)) as call:
        agrees(ensemble, call, inputs_of((1, 8, 8)))


def test_a_pt2_file_runs_in_a_process_that_has_torch_alone(tmp_path: Path) -> None:
    ensemble, images = small(), inputs_of((1, 8, 8))
    path, given, found = export(ensemble, "pt2", tmp_path).path, tmp_path / "images.pt", tmp_path / "found.pt"
    torch.save(images, given)
    subprocess.run([sys.executable, "-I", "-c", ALONE, path, given, found], check=True, cwd=tmp_path)
    with torch.no_grad():
        expected = torch.stack(list(ensemble.anytime(ensemble.preprocess(images))), 1)
    assert torch.allclose(torch.load(found), expected, rtol=1e-5, atol=1e-5)


def test_an_onnx_file_has_standard_operators_only_and_any_batch(tmp_path: Path) -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    path = export(small(), "onnx", tmp_path).path
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {opset.domain for opset in model.opset_import} == {""}
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    assert b"site-packages" not in path.read_bytes()
    session = onnxruntime.InferenceSession(path)
    (inputs,) = session.get_inputs()
    assert (inputs.name, inputs.type, inputs.shape[1:]) == ("inputs", "tensor(uint8)", [1, 8, 8])
    assert isinstance(inputs.shape[0], str)
    assert [one.name for one in session.get_outputs()] == ["logits", "prefixes"]
    for count in (1, 3, 20):
        logits, prefixes = session.run(None, {"inputs": inputs_of((1, 8, 8), count).numpy()})
        assert (logits.shape, prefixes.shape) == ((count, 3), (count, 2, 3))
        assert (logits == prefixes[:, -1]).all()


class Reader(nn.Module):
    """A student that reads the logits of the one before."""

    reads = ()

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 3)

    def forward(self, images: Tensor, earlier: Any) -> Tensor:
        logits: Tensor = self.layer(images.flatten(1)) + earlier[-1].logits.tanh()
        return logits


def adapted() -> nn.Module:
    """One of our classifiers whose mixer has a layer of another kind, and whose norm has a hook."""
    model = seeded((1, 8, 8), 3, 0, seq_len=16, d_model=4, norm="rms")
    mixer: Any = model.blocks[0].mixer  # type: ignore[index, union-attr]
    mixer.in_proj = nn.Sequential(mixer.in_proj, nn.Tanh())
    model.norm.register_forward_hook(lambda module, inputs, output: 2 * output)  # type: ignore[operator, union-attr]
    return model


@pytest.mark.parametrize("format", TRACED)
def test_students_of_any_kind_are_traced(format: str, tmp_path: Path) -> None:
    members = [Own((1, 8, 8), 3, 5), adapted(), Reader()]
    ensemble = ProgressiveEnsemble(members, SCALES[:3], task_of((1, 8, 8), 3)).eval()
    done = export(ensemble, format, tmp_path)
    with FORMATS[format].opened(done.path, Job(ensemble, done.facts, done.path)) as call:
        agrees(ensemble, call, inputs_of((1, 8, 8)))


def test_a_file_says_what_each_prefix_costs_where_students_read_earlier_ones() -> None:
    own = 64 * 5 + 5 * 3, 64 * 3
    members = [Own((1, 8, 8), 3, 5), Reader(), Own((1, 8, 8), 3, 5)]
    ensemble = ProgressiveEnsemble(members, SCALES[:3], task_of((1, 8, 8), 3)).eval()
    assert facts_of(ensemble, "x", "uint8").macs == [own[0], sum(own), 2 * own[0] + own[1]]  # each is asked once


def test_what_cannot_be_counted_is_said_and_none(caplog: pytest.LogCaptureFixture) -> None:
    class Uncounted(Own):
        def __deepcopy__(self, memo: object) -> "Uncounted":
            raise RuntimeError("no copies")

    members = [Own((1, 8, 8), 3, 5), Uncounted((1, 8, 8), 3, 5)]
    ensemble = ProgressiveEnsemble(members, SCALES[:2], task_of((1, 8, 8), 3)).eval()
    assert facts_of(ensemble, "x", "uint8").macs == [None, None]
    assert caplog.messages == ["the students' multiply-accumulates cannot be counted (RuntimeError: no copies)"]


class Undecided(nn.Module):
    """What it computes depends on its input."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :3] if float(images.sum()) > 0 else images.flatten(1)[:, 3:6]


@pytest.mark.parametrize("format", TRACED)
def test_a_student_that_cannot_be_traced_is_named(format: str, tmp_path: Path) -> None:
    ensemble = small()
    ensemble.members[1] = Undecided()
    with pytest.raises(ConfigError, match=r"member 2: torch\.\w+ cannot \w+ a (tests\.)?test_export_traced\.Undecided"):
        export(ensemble, format, tmp_path)
    assert not list(tmp_path.iterdir())


class Own2(ImageClassification):
    """It prepares images in its own way."""

    def prepare(self, inputs: Tensor) -> Tensor:
        return (inputs.float() / 255).sqrt() + self.scale_and_shift[1]


def test_a_task_of_its_own_is_part_of_the_file_and_keeps_no_tensors_of_the_tracer(tmp_path: Path) -> None:
    ensemble = small()
    for kind in (Own2, ImageClassification):
        given: Any = task_of((1, 8, 8), 3)
        ensemble.task = kind((1, 8, 8), 3, given.mean, given.std)
        done = export(ensemble, "pt2", tmp_path, name=kind.__name__)
        with FORMATS["pt2"].opened(done.path, Job(ensemble, done.facts, done.path)) as call:
            agrees(ensemble, call, inputs_of((1, 8, 8)))
        assert type(ensemble.task.scale_and_shift[0]) is Tensor


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 12, 25, 31])
def test_the_scan_in_chunks_is_the_recurrence(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    a = torch.rand(2, length, 3, 2, generator=generator, dtype=torch.float64)
    u = torch.randn(2, length, 3, 2, generator=generator, dtype=torch.float64)
    h, expected = torch.zeros(2, 3, 2, dtype=torch.float64), []
    for t in range(length):
        h = a[:, t] * h + u[:, t]
        expected.append(h)
    assert torch.allclose(scan(a, u), torch.stack(expected, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 4, 64])
def test_the_scan_of_an_onnx_file_takes_sequences_of_any_length(length: int, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    member = seeded((1, 8, 8), 3, 0, seq_len=length, d_model=2, head="mean")
    ensemble = ProgressiveEnsemble([member], SCALES[:1], task_of((1, 8, 8), 3)).eval()
    done = export(ensemble, "onnx", tmp_path)
    with FORMATS["onnx"].opened(done.path, Job(ensemble, done.facts, done.path)) as call:
        agrees(ensemble, call, inputs_of((1, 8, 8)))
