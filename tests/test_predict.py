"""`pkd predict`: what is printed of files, what is said of those that cannot be read, and what it imports."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from pkd_lightning.ensemble import ProgressiveEnsemble, save_description, save_student
from pkd_lightning.models import building
from pkd_lightning.predict import main
from pkd_lightning.tasks import ImageClassification, SignalClassification
from tests.test_startup import TRAINING, unread

SHAPE, CLASSES = (3, 6, 4), 3
ROOT = Path(__file__).parent.parent


class Linear(nn.Module):
    """A student without kernels."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int, scale: float = 9.0) -> None:
        super().__init__()
        size = input_shape[0] * input_shape[1] * (input_shape[2] if len(input_shape) > 2 else 1)
        self.scale, self.layer = scale, nn.Linear(size, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.scale * self.layer(images.flatten(1))  # type: ignore[no-any-return]


def saved(folder: Path, task: Any, classes: Any = None) -> ProgressiveEnsemble:
    """An ensemble of two students in a folder."""
    torch.manual_seed(1)
    students = [Linear(task.input_shape, CLASSES) for _ in range(2)]
    for t, student in enumerate(students):
        save_student(student, folder / f"{t:02d}", f"{__name__}.Linear", {}, task.input_shape, CLASSES)
    save_description(folder, [(0.0, 1.0), (0.5, 1.0)], task, classes=classes)
    return ProgressiveEnsemble(students, [(0.0, 1.0), (0.5, 1.0)], task, classes=classes).eval()


@pytest.fixture
def ensemble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ProgressiveEnsemble:
    monkeypatch.setattr(building, "configured", {f"{__name__}.Linear"})
    monkeypatch.chdir(tmp_path)
    task = ImageClassification(SHAPE, CLASSES, torch.zeros(3, 1, 1), torch.ones(3, 1, 1))
    return saved(tmp_path / "run" / "students", task, ("bird", "cat", "dog"))


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """A folder of images, one below another, and what is none."""
    (tmp_path / "images" / "below").mkdir(parents=True)
    names = ["images/a.png", "images/b.PNG", "images/below/c.bmp"]
    for i, name in enumerate(names):
        pixels = torch.randint(0, 256, (6, 4, 3), generator=torch.Generator().manual_seed(i)).byte()
        Image.fromarray(pixels.numpy()).save(tmp_path / name)
    (tmp_path / "images" / "notes.txt").write_text("no image")
    return names


def objects(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[dict[str, Any]], str]:
    """Exit code, objects and stderr of a call with --json."""
    code = main([*arguments, "--json"])
    said = capsys.readouterr()
    return code, [json.loads(line) for line in said.out.splitlines()], said.err


@pytest.mark.parametrize("run", ["run", "run/students"])
def test_a_folder_is_a_table_of_its_images(
    run: str, ensemble: ProgressiveEnsemble, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([run, "images"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    head, *lines = said.out.splitlines()
    assert head.split() == ["file", "class", "probability", "students", "MACs", "ms"]
    assert [line.split()[0] for line in lines] == files
    for line, path in zip(lines, files, strict=True):
        (row,) = ensemble.predict(path).rows()
        assert line.split()[1:5] == [row["class"], f"{row['probability']:.1%}", "2", str(2 * 72 * 3)]
        assert float(line.split()[5]) > 0


@pytest.mark.parametrize(
    ("flags", "limits"),
    [
        ((), {}),
        (("--members", "1"), {"members": 1}),
        (("--confidence", "0.9"), {"confidence": 0.9}),
        (("--budget-macs", "3e2"), {"budget_macs": 300}),
        (("--budget-ms", "0"), {"budget_ms": 0}),
    ],
)
def test_limits_are_those_of_predict(
    flags: tuple[str, ...],
    limits: Any,
    ensemble: ProgressiveEnsemble,
    files: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, rows, _ = objects(capsys, "run", *files, *flags)
    assert code == 0
    for row, path in zip(rows, files, strict=True):
        assert row.pop("ms") > 0
        assert row == {"file": path, **ensemble.predict(path, **limits).rows()[0]}
    assert {row["students"] for row in rows} == {1, 2} if limits == {"confidence": 0.9} else True


def test_patterns_and_standard_input(
    ensemble: ProgressiveEnsemble,
    files: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path(files[0]).read_bytes())))
    code, rows, _ = objects(capsys, "run", "-", "images/*.png", "images/**/*.bmp")
    assert code == 0
    assert [row["file"] for row in rows] == ["-", files[0], files[2]]
    assert rows[0]["probability"] == rows[1]["probability"]


def test_a_file_that_is_resized_or_cannot_be_read_is_said_and_the_others_go_on(
    ensemble: ProgressiveEnsemble, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("L", (40, 60)).save("images/large.png")
    Path("images/bad.png").write_text("no image")
    Path("empty").mkdir()
    code, rows, said = objects(capsys, "run", "missing.png", "images", "empty", "images/notes.txt", files[0])
    assert code == 1
    assert [row["file"] for row in rows] == [*files[:2], files[2], "images/large.png", files[0]]
    assert said.splitlines() == [
        "error: missing.png: there is no such file, and no match",
        "error: images/bad.png: is no image that Pillow can read; expected PNG, JPEG or the like",
        "resized to 4x6: images/large.png from 40x60",
        said.splitlines()[3],
        "error: images/notes.txt: is no image that Pillow can read; expected PNG, JPEG or the like",
    ]
    assert said.splitlines()[3].startswith("error: empty: no images (.bmp, ")


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_nothing_that_can_be_read_is_an_error(
    flags: tuple[str, ...], ensemble: ProgressiveEnsemble, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "nowhere/*.png", *flags]) == 1
    said = capsys.readouterr()
    assert "nowhere/*.png: there is no such file, and no match" in said.err
    assert "%" not in said.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["nowhere", "a.png"],
            "no such path, of a run .* no pretrained ensemble of this name; those are: cifar10, mnist",
        ),
        (["images", "a.png"], "images: holds neither ensemble.json nor students/ensemble.json"),
        (["run", "a.png", "--members", "3"], "members=3: the ensemble has prefixes of 1 to 2 students"),
        (["run", "a.png", "--budget-macs", "7"], "budget_macs=7: does not pay for the first student"),
        (["run", "a.png", "--confidence", "95"], "confidence=95.0: must be a probability from 0 to 1"),
        (["run", "a.png", "--budget-ms", "nan"], "budget_ms=nan: must be a number of at least 0"),
    ],
)
def test_what_cannot_be_asked_is_one_line(
    arguments: list[str],
    said: str,
    ensemble: ProgressiveEnsemble,
    files: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert re.match(f"error: .*{said}", line)


@pytest.mark.parametrize("arguments", [["run"], ["run", "a.png", "--members", "1", "--budget-ms", "5"]])
def test_arguments_that_do_not_fit(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2


def test_an_ensemble_of_signals_reads_no_files(
    ensemble: ProgressiveEnsemble, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path / "signals", SignalClassification((1, 16), CLASSES, torch.zeros(1, 1), torch.ones(1, 1)))
    assert main(["signals", "a.png"]) == 1
    assert "signals: its ensemble reads no images, but numbers of shape (1, 16)" in capsys.readouterr().err


def test_models_of_ones_own_need_trust(
    ensemble: ProgressiveEnsemble,
    files: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(building, "configured", set())
    assert main(["run", files[0]]) == 1
    assert "is not of pkd_lightning; where you trust its code" in capsys.readouterr().err
    monkeypatch.setattr(sys, "path", sys.path[:])
    assert main(["run", files[0], "--trust", "elsewhere", "--trust", __name__]) == 0


def test_it_imports_nothing_that_only_training_needs(files: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['pkd', 'predict', 'mnist', 'images/a.png', '--members', '1'];"
        "import atexit; atexit.register(lambda: print(*sys.modules, file=sys.stderr));"
        "from pkd_lightning.__main__ import main; main()"
    )
    command = [sys.executable, "-c", code]
    environment = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    imported = set(done.stderr.split())
    assert "pkd_lightning.predict" in imported
    assert not (TRAINING | {"torch._dynamo", "rich"}) & imported


def test_answers_that_nobody_reads_on_end_quietly(files: list[str], tmp_path: Path) -> None:
    code, said = unread("predict", "mnist", str(tmp_path / files[0]), "--json")
    assert code == 141
    said = "".join(line for line in said.splitlines(keepends=True) if "compiling the CPU kernels" not in line)
    assert said == f"resized to 28x28: {tmp_path / files[0]} from 4x6\n"
