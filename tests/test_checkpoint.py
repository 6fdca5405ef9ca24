"""Files hold a hash of their content: what is damaged is noticed, what has none is read."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pkd_lightning import teacher
from pkd_lightning.assembling import assemble
from pkd_lightning.boosting.loop import BoostingLoop
from pkd_lightning.checkpoint import HASH, append_line, content_hash, load_tensors, read_json, save_weights, write_json
from pkd_lightning.data.module import DataModule
from pkd_lightning.ensemble import ProgressiveEnsemble
from pkd_lightning.errors import RunError
from pkd_lightning.reporting.load import read_metrics
from pkd_lightning.rundir import RunDirectory
from tests.support import ACCEPT, tiny_config, tiny_run

VALUES = {"b": torch.arange(6.0).view(2, 3), "a": [1, 0.1, {"x": None}]}


def test_the_hash_follows_every_value_name_shape_and_type() -> None:
    others = [
        {**VALUES, "b": VALUES["b"].flip(0)},
        {**VALUES, "b": VALUES["b"].view(3, 2)},
        {**VALUES, "b": VALUES["b"].view(torch.int32)},
        {**VALUES, "b": VALUES["b"].nextafter(torch.tensor(9.0))},
        {**VALUES, "a": [1, 0.1, {"x": 0}]},
        {"c": VALUES["b"], "a": VALUES["a"]},
        {"a": VALUES["a"]},
    ]
    assert len({content_hash(values) for values in [VALUES, *others]}) == 8
    assert content_hash(dict(reversed(VALUES.items()))) == content_hash(VALUES)


@pytest.mark.parametrize("bytes_at_a_time", [1, 40, 2**21])
def test_the_hash_does_not_depend_on_how_a_tensor_lies_in_memory(
    bytes_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    values: list[Tensor] = [torch.randn(7, 5), torch.randn(3), torch.tensor(2.0), torch.zeros(1, 1).expand(9, 4)]
    values += [torch.zeros(0, 4), torch.randn(4, 4).bool(), torch.randn(4).bfloat16()]
    expected = [content_hash({"x": value.clone(memory_format=torch.contiguous_format)}) for value in values]
    monkeypatch.setattr("pkd_lightning.checkpoint.HASHED_BYTES", bytes_at_a_time)
    assert [content_hash({"x": value}) for value in values] == expected
    assert content_hash({"x": values[0].t().contiguous().t()}) == expected[0]


@pytest.mark.parametrize("place", [-1, -9])
def test_one_flipped_bit_of_weights_is_noticed(place: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model = nn.Linear(3, 2)
    save_weights(model, path)
    assert torch.equal(load_tensors(path)["weight"], model.weight)
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    assert load_file(path).keys() == {"weight", "bias"}  # nothing else notices
    with pytest.raises(RunError, match=r"model\.safetensors: is damaged"):
        load_tensors(path)


def test_files_without_a_hash_are_read(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "old.safetensors")
    assert torch.equal(load_tensors(tmp_path / "old.safetensors")["x"], torch.ones(2))
    write_json(tmp_path / "old.json", {"x": 1})
    assert json.loads((tmp_path / "old.json").read_text()) == {"x": 1}
    assert read_json(tmp_path / "old.json") == {"x": 1}


def test_a_changed_number_in_json_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    value = {"scales": [[0.1, 2]], "options": {"d_state": 4, "3": None}}
    write_json(path, value, hashed=True)
    assert read_json(path) == value
    path.write_text(path.read_text().replace("4", "5", 1))
    with pytest.raises(RunError, match=r"file\.json: is damaged"):
        read_json(path)


def flip(path: Path, place: int) -> None:
    """One bit, in a new file: the old one may be mapped."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.unlink()
    path.write_bytes(content)


def test_damaged_logits_are_computed_again_and_damaged_state_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def stop(loop: BoostingLoop) -> None:
        raise ZeroDivisionError  # as if the process ended after the last round

    monkeypatch.setattr(BoostingLoop, "ensemble", stop)
    with pytest.raises(ZeroDivisionError):
        tiny_run(tmp_path, ACCEPT)
    (run,) = [path.parent for path in tmp_path.rglob("boosting.ckpt")]
    (logits,) = tmp_path.rglob("logits.safetensors")
    before = logits.read_bytes()
    flip(logits, -9)
    with pytest.raises(ZeroDivisionError):
        tiny_run(tmp_path, ACCEPT)
    assert "computed again" in caplog.text
    assert logits.read_bytes() == before
    for name in ("boosting.ckpt", "teacher/teacher.safetensors"):
        path = run / name
        content = path.read_bytes()
        flip(path, len(content) // 2)
        with pytest.raises(RunError, match=rf"{name}: .*is damaged"):
            tiny_run(tmp_path, ACCEPT)
        path.write_bytes(content)


def test_truncated_logits_are_computed_again(tmp_path: Path) -> None:
    data = DataModule(assemble(tiny_config(tmp_path)).data)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    path = tmp_path / "logits.safetensors"
    first = teacher.cached_logits(model, data, path, "key", torch.device("cpu")).clone()
    path.write_bytes(path.read_bytes()[:50])
    assert torch.equal(teacher.cached_logits(model, data, path, "key", torch.device("cpu")), first)


@pytest.mark.parametrize(
    ("before", "after"), [(None, "new\n"), ("", "new\n"), ("old\n", "old\nnew\n"), ("to", "to\nnew\n")]
)
def test_a_torn_line_does_not_swallow_the_next(before: str | None, after: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    if before is not None:
        path.write_text(before)
    append_line(path, "new")
    assert path.read_text() == after


def test_the_epochs_after_a_torn_line_are_read(tmp_path: Path) -> None:
    path = RunDirectory(tiny_config(tmp_path, "boosting.rounds=1")).path / "metrics.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text('{"stage": "teacher", "att')
    tiny_run(tmp_path, "boosting.rounds=1")
    rows, notes = read_metrics(path)
    assert [row["stage"] for row in rows] == ["round-00", "teacher"]
    assert "1 unreadable line" in notes[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scales", [[0.0, math.nan]]),
        ("scales", [[math.inf, 1.0]]),
        ("std", [0.0]),
        ("std", [math.nan]),
        ("std", [-1.0]),
        ("std", [1.0, 1.0]),
        ("std", []),
        ("mean", [math.nan]),
        ("mean", [0.5, 0.5]),
    ],
)
def test_numbers_that_make_no_ensemble_are_refused(name: str, value: object, tmp_path: Path) -> None:
    description = {"scales": [[0.0, 1.0]], "input_shape": [1, 8, 8], "num_classes": 3, "mean": [0.5], "std": [0.5]}
    description[name] = value
    (tmp_path / "ensemble.json").write_text(json.dumps(description))  # Python writes and reads NaN
    with pytest.raises(RunError, match=rf"ensemble\.json: does not describe an ensemble .*{name}"):
        ProgressiveEnsemble.load(tmp_path)


def test_the_key_of_the_hash_is_that_of_committed_files() -> None:
    assert HASH == "blake2b"
    assert content_hash({"x": torch.ones(2), "y": [1.5]}) == "fa4008239d2e3b64830965cbcf14233b"
