"""Weights from elsewhere: found under any name, read without running code, refused with what is there and expected."""

import argparse
import collections
import enum
import functools
import os
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import lightning as L
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file, save_model
from torch import nn
from torch.optim.swa_utils import AveragedModel

from pkd_lightning.errors import RunError
from pkd_lightning.weights import Unread, load_weights, read_tensors
from tests.test_trial import Tied


class Net(nn.Module):
    """A small network of named parts, batch norm among them."""

    def __init__(self, classes: int = 3, depth: int = 2):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))
        self.head = nn.Linear(4, classes)
        self.norm.register_buffer("scratch", torch.rand(2), persistent=False)


def other_than(net: nn.Module) -> Net:
    """A network whose weights and statistics are all others."""
    other = Net()
    with torch.no_grad():
        for value in other.state_dict().values():
            value.add_(1)
    assert not same(net, other)
    return other


def same(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def prefixed(state, prefix):
    return {f"{prefix}{name}": value for name, value in state.items()}


def loaded(content, path: Path) -> Net:
    torch.save(content, path / "file.ckpt")
    net = Net()
    load_weights(net, path / "file.ckpt")
    return net


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "module.",
        "_orig_mod.",
        "model.",
        "net.",
        "network.",
        "net._orig_mod.",
        "module.model.",
        "a.b.module._orig_mod.",
    ],
)
@pytest.mark.parametrize(
    "place", [(), ("state_dict",), ("model",), ("model_state_dict",), ("ema",), ("a", "state_dict")]
)
def test_weights_are_found_under_every_prefix_and_place(prefix, place, tmp_path):
    net = other_than(Net())
    content = prefixed(net.state_dict(), prefix)
    for key in reversed(place):
        content = {key: content, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}}
    assert same(loaded(content, tmp_path), net)


def test_wrappers_of_a_part_of_the_model_are_seen_through(tmp_path):
    net = other_than(Net())
    wrapped = Net()
    wrapped.load_state_dict(net.state_dict())
    wrapped.blocks = nn.DataParallel(wrapped.blocks)
    wrapped.head = torch.compile(wrapped.head)
    assert {"blocks.module.0.weight", "head._orig_mod.weight"} <= wrapped.state_dict().keys()
    assert same(loaded(wrapped.state_dict(), tmp_path), net)
    assert same(loaded(AveragedModel(net).state_dict(), tmp_path), net)


def test_a_model_that_wraps_another_takes_its_weights(tmp_path):
    net, wrapper = other_than(Net()), nn.ModuleDict({"net": Net()})
    torch.save({"state_dict": prefixed(net.state_dict(), "model.")}, tmp_path / "file.ckpt")
    load_weights(wrapper, tmp_path / "file.ckpt")
    assert same(wrapper["net"], net)


class Hyper(L.LightningModule):
    """A module whose checkpoint holds its hyperparameters as they are."""

    def __init__(self, net, given, options=None):
        super().__init__()
        self.save_hyperparameters(ignore=["net"], logger=False)
        self.net = net
        self.criterion = nn.CrossEntropyLoss(weight=torch.ones(3))


class Optimiser(enum.Enum):
    ADAM = "adam"


@dataclass
class Options:
    lr: float


HYPER = {
    "numpy": [np.float64(0.1), np.arange(3)],
    "enum": {Optimiser.ADAM: 1},
    "dataclass": Options(0.1),
    "partial": functools.partial(torch.optim.Adam, lr=0.1),
    "omegaconf": OmegaConf.create({"lr": 0.1, "list": [1, {"a": "${lr}"}]}),
    "path": Path("somewhere"),
    "namespace": argparse.Namespace(lr=0.1, path=PurePosixPath("a")),
    "defaultdict": collections.defaultdict(list, a=[1]),
    "deque": collections.deque([1, 2]),
    "module": nn.Linear(2, 2),
}


@pytest.mark.parametrize("kind", HYPER)
def test_hyperparameters_of_any_kind_do_not_keep_weights_from_being_read(kind, tmp_path, caplog):
    net = other_than(Net())
    module = Hyper(net, HYPER[kind])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = L.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu", default_root_dir=tmp_path)
        trainer.strategy.connect(module)
        trainer.save_checkpoint(tmp_path / "file.ckpt")
    found = Net()
    load_weights(found, tmp_path / "file.ckpt")
    assert same(found, net)
    assert "not used, as no part of the model: criterion.weight" in caplog.text


@pytest.mark.parametrize("wrap", [lambda net: net, nn.DataParallel, lambda net: {"model": net, "epoch": 1}])
def test_a_pickled_module_gives_its_weights(wrap, tmp_path):
    net = other_than(Net())
    assert same(loaded(wrap(net), tmp_path), net)


class Harmful:
    """Makes a file when it is unpickled."""

    def __init__(self, call, *arguments):
        self.made = call, arguments

    def __reduce__(self):
        return self.made


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("call", [os.mkdir, exec, eval])
def test_no_code_of_a_file_is_run(call, zipped, tmp_path):
    trace, net = tmp_path / "trace", other_than(Net())
    argument = str(trace) if call is os.mkdir else f"__import__('os').mkdir({str(trace)!r})"
    content = {"state_dict": net.state_dict(), "extra": Harmful(call, argument)}
    torch.save(content, tmp_path / "file.ckpt", _use_new_zipfile_serialization=zipped)
    if zipped and call is not os.mkdir:  # torch's reader refuses all of `os`, and in files of the old format everything
        assert same(loaded(content, tmp_path), net)
        assert isinstance(read_tensors(tmp_path / "file.ckpt")["extra"], Unread)
    else:
        with pytest.raises(RunError, match="cannot be read as weights"):
            load_weights(Net(), tmp_path / "file.ckpt")
    assert not trace.exists()


def test_averaged_weights_go_first_and_the_others_are_named(tmp_path, caplog):
    net, average = Net(), other_than(Net())
    assert same(loaded({"model": net.state_dict(), "model_ema": average.state_dict()}, tmp_path), average)
    assert "loaded the weights under 'model_ema'; others fit as well: under 'model'" in caplog.text
    assert same(loaded({"a": net.state_dict(), "b": net.state_dict()}, tmp_path), net)


def test_several_weights_that_fit_are_no_guess(tmp_path):
    content = {
        "state_dict": prefixed(Net().state_dict(), "student.") | prefixed(other_than(Net()).state_dict(), "teacher.")
    }
    with pytest.raises(RunError, match=r"several weights.*prefix 'student\.'.*prefix 'teacher\.'.*file of its own"):
        loaded(content, tmp_path)


def test_a_mismatch_names_both_sides_and_their_shapes(tmp_path):
    state = Net(classes=10, depth=3).state_dict()
    del state["norm.bias"]
    with pytest.raises(RunError) as caught:
        loaded({"state_dict": prefixed(state, "net.")}, tmp_path)
    text = str(caught.value)
    for part in (
        "file.ckpt", "under 'state_dict' with prefix 'net.'",
        "in the model, not in the file: norm.bias (4,)",
        "in the file, not in the model: blocks.2.weight (4, 4); blocks.2.bias (4,)",
        "head.weight (10, 4) in the file, (3, 4) expected",
    ):  # fmt: skip
        assert part in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            {"state_dict": {"w": torch.zeros(2, 5)}},
            r"in the file: state_dict: w \(2, 5\).*expected: conv.weight \(4, 1, 3, 3\)",
        ),
        ({"epoch": 3, "lr": 0.1}, "no tensors by name, but a dict, its keys are epoch, lr"),
        ([torch.zeros(2)], "no tensors by name, but a list"),
    ],
)
def test_a_file_without_the_weights_says_what_it_holds(content, words, tmp_path):
    with pytest.raises(RunError, match=f"(?s)do not fit.*{words}"):
        loaded(content, tmp_path)


def test_a_deeper_model_of_the_same_parts_is_refused_and_foreign_parts_are_named(tmp_path, caplog):
    with pytest.raises(RunError, match=r"not in the model: blocks\.2\.weight"):
        loaded(Net(depth=3).state_dict(), tmp_path)
    net = other_than(Net())
    assert same(loaded({**net.state_dict(), "criterion.weight": torch.ones(3)}, tmp_path), net)
    assert "criterion.weight" in caplog.text
    deeper = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 3))
    torch.save(deeper.state_dict(), tmp_path / "deeper.pt")
    with pytest.raises(RunError, match=r"not in the model: 2\.weight"):
        load_weights(deeper[:2], tmp_path / "deeper.pt")


def test_tied_weights_may_have_one_name_in_the_file(tmp_path):
    model, found = Tied((1, 2, 2), 3), Tied((1, 2, 2), 3)
    save_model(model, str(tmp_path / "one.safetensors"))  # leaves one of the names out
    load_weights(found, tmp_path / "one.safetensors")
    assert same(found, model)


def test_counters_that_old_batch_norms_lack_are_no_mismatch(tmp_path):
    state = {name: value for name, value in other_than(Net()).state_dict().items() if "num_batches" not in name}
    assert torch.equal(loaded(state, tmp_path).head.weight, state["head.weight"])


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04"])
@pytest.mark.parametrize("name", ["file.ckpt", "file.safetensors"])
def test_a_damaged_file_is_named(content, name, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RunError, match=rf"{name}: cannot be read (as weights )?\("):
        load_weights(Net(), tmp_path / name)


def test_torchscript_is_refused_with_what_to_do(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(tmp_path / "script.pt"))
    with pytest.raises(RunError, match=r"(?i)torchscript.*torch\.save\(model\.state_dict\(\), FILE\)"):
        load_weights(nn.Linear(2, 2), tmp_path / "script.pt")


def test_safetensors_have_prefixes_too(tmp_path):
    net = other_than(Net())
    save_file(prefixed(net.state_dict(), "module."), tmp_path / "file.safetensors")
    found = Net()
    load_weights(found, tmp_path / "file.safetensors")
    assert same(found, net)


def test_a_compressed_file_that_memory_has_no_room_for_is_not_expanded(tmp_path, monkeypatch):
    """torch writes no such files, and reads them."""
    path, torchs = tmp_path / "file.pt", tmp_path / "torchs.pt"
    torch.save({"weight": torch.zeros(2**18)}, torchs)
    with zipfile.ZipFile(torchs) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    assert path.stat().st_size < 2**14
    assert not read_tensors(path)["weight"].any()
    monkeypatch.setattr("pkd_lightning.memory.available_memory", lambda: 2**20)
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(RunError, match=r"file\.pt: reading it takes 1,04\d,\d{3} bytes of memory, and 1,048,576 are"):
        read_tensors(path)
