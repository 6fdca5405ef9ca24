"""The documents are true of the tree: commands compose, snippets run, files exist, tables are those of the results."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import tables as bench_tables
from experiments.figures import FIGURES, digest
from experiments.readme import documents, fill
from pkd_lightning.assembling import assemble
from pkd_lightning.cli import load_config
from pkd_lightning.run import run
from pkd_lightning.sweeps.space import Space
from tests.support import TINY, tiny_run

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
    # the first choice of each multirun value; the user's own ladder and term are the guide's
    (tmp_path / "student").mkdir()
    (ladder,) = (text for text in re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL) if "rungs:" in text)
    (tmp_path / "student" / "mine.yaml").write_text(ladder)
    guides_term(tmp_path, monkeypatch)
    # launchers are extras
    plain = [word for word in arguments if not word.startswith(("--", "hydra")) and word != "DIR"]
    searched = "hydra/sweeper=optuna" in arguments
    overrides = next(iter(Space.of(plain).examples())) if searched else list(map(first_choice, plain))
    searchpath = [f"hydra.searchpath=[file://{tmp_path}]"] if "--config-dir" in arguments else []
    monkeypatch.setattr(Path, "is_file", lambda self: True)  # HASH and the like stand for the user's files
    experiment = assemble(load_config(*searchpath, *overrides))
    assert experiment.student.rungs


def first_choice(override: str) -> str:
    """An override with the first of several values; a list or a mapping is one value."""
    return override if override.endswith(("]", "}")) else override.split(",")[0]


def guides_term(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the guide's own term of knowledge, and its file of configuration."""
    (code,) = (text for text in re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL) if "(FeatureTerm)" in text)
    (group,) = (text for text in re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL) if "my_terms" in text)
    (directory / "my_terms.py").write_text(code)
    (directory / "knowledge").mkdir()
    (directory / "knowledge" / "direction.yaml").write_text(group)
    monkeypatch.syspath_prepend(directory)
    monkeypatch.delitem(sys.modules, "my_terms", raising=False)


def test_the_guides_own_term_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guides_term(tmp_path, monkeypatch)
    searchpath = f"hydra.searchpath=[file://{ROOT / 'tests' / 'conf'},file://{tmp_path}]"
    run(load_config(searchpath, *TINY[1:], f"run_root={tmp_path}", "knowledge=[fitnet,direction]", "boosting.rounds=1"))
    lines = [json.loads(line) for path in tmp_path.rglob("metrics.jsonl") for line in path.read_text().splitlines()]
    (student,) = (line for line in lines if line["stage"] == "round-00")
    assert 0 < student["knowledge/direction"] < 0.3 * 2
    assert student["gradient_share/direction"] > 0
    assert student["knowledge/fitnet"] > 0


def test_every_kind_of_knowledge_is_in_the_guide_and_a_short_file() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", GUIDE.partition("## Kinds of knowledge")[2], re.MULTILINE))
    files = sorted({*(ROOT / "conf" / "knowledge").glob("*.yaml")} - {ROOT / "conf" / "knowledge" / "none.yaml"})
    assert files
    for file in files:
        assert file.stem in rows, f"docs/guide.md: Kinds of knowledge has no row for {file.name}"
        lines = file.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 10, f"{file.name}: a term is at most 10 lines"
        assert lines[0] == "# @package boosting.knowledge"
        (source,) = re.findall(r"\d{4}\.\d{4,5}|CVPR \d{4}", rows[file.stem])[:1]
        assert source in file.read_text(encoding="utf-8")


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
