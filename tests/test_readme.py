"""The documents are true of the tree: commands compose, snippets run, files exist, tables are those of the results."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import tables as bench_tables
from experiments.figures import FIGURES, digest
from experiments.readme import documents, fill
from pkd_lightning.cli import load_config
from pkd_lightning.experiment import assemble
from pkd_lightning.sweeps.space import Space
from tests.support import tiny_run

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
GUIDE = (ROOT / "docs" / "guide.md").read_text()
MARKDOWN = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "experiments").rglob("README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]


def commands() -> list[list[str]]:
    """The arguments of every run in the shell blocks of README and guide."""
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", README + GUIDE, re.DOTALL)).splitlines()
    runs = [shlex.split(line, comments=True) for line in lines if "pkd_lightning.run" in line]
    return [words[words.index("pkd_lightning.run") + 1 :] for words in runs]


def test_there_are_commands() -> None:
    assert len(commands()) >= 7


@pytest.mark.parametrize("arguments", commands(), ids=" ".join)
def test_every_command_composes_to_a_valid_experiment(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the first choice of each multirun value; the user's own ladder is the guide's YAML
    (tmp_path / "student").mkdir()
    (ladder,) = (text for text in re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL) if "rungs:" in text)
    (tmp_path / "student" / "mine.yaml").write_text(ladder)
    # launchers are extras
    plain = [word for word in arguments if not word.startswith(("--", "hydra")) and word != "DIR"]
    searched = "hydra/sweeper=optuna" in arguments
    overrides = next(iter(Space.of(plain).examples())) if searched else [word.split(",")[0] for word in plain]
    searchpath = [f"hydra.searchpath=[file://{tmp_path}]"] if "--config-dir" in arguments else []
    monkeypatch.setattr(Path, "is_file", lambda self: True)  # HASH and the like stand for the user's files
    experiment = assemble(load_config(*searchpath, *overrides))
    assert experiment.student.rungs


def test_the_python_snippets_run(tmp_path: Path) -> None:
    import torch

    pretrained, snippet = ("".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)) for text in (README, GUIDE))
    names = {"images": torch.randint(0, 256, (4, 1, 28, 28), dtype=torch.uint8)}
    exec(pretrained, names)
    assert names["answer"].logits.shape == (4, 10)
    tiny_run(tmp_path)
    (done,) = tmp_path.rglob("DONE")
    names = {"images": torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)}
    names |= {"validation_x": torch.randn(4, 1, 8, 8), "macs": [1, 5, 10], "directory": tmp_path}
    exec(snippet.replace("runs/digits/HASH", str(done.parent)), names)
    assert names["logits"].shape == names["answer"].logits.shape == (4, 3)
    assert names["answer"].students.tolist() == [3] * 4
    assert names["used"].max() <= 3
    assert (tmp_path / "exits.json").exists()


def test_linked_and_named_files_exist() -> None:
    for document in MARKDOWN:
        text = document.read_text()
        links = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in target]
        assert [target for target in links if not (document.parent / target).exists()] == []
        named = re.findall(r"`((?:conf|pkd_lightning|experiments|tests)/[\w/.-]+\w)`", text)
        assert [name for name in named if not (ROOT / name).exists()] == []


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"run", "test", "bench", "sweep", "test-slow", "help", "study", "readme-tables"} <= targets
    for document in MARKDOWN:
        assert set(re.findall(r"`?\bmake ([a-z-]+)`?", document.read_text().split("```yaml")[0])) <= targets


def test_tables_are_those_of_the_results() -> None:
    assert documents()
    for document in documents():
        text = document.read_text()
        assert fill(text) == text, f"run: make readme-tables ({document.name} is out of date)"
        assert text.count("<!-- table:") == text.count("<!-- end of table -->")
    assert README.count("<!-- table:") >= 2


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_drawn_from_the_results(name: str) -> None:
    with Image.open(ROOT / "experiments" / name) as image:
        assert image.info["Title"] == digest(FIGURES[name]()), "run: make readme-tables"


def test_the_tables_of_the_performance_page_are_those_of_its_results() -> None:
    text = bench_tables.DOCUMENT.read_text()
    assert text.count("<!-- bench: ") == len(bench_tables.TABLES)
    assert bench_tables.fill(text, bench_tables.stored()) == text, "run: python -m benchmarks.tables"
