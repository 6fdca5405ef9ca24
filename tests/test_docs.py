"""The examples of docs/ run as they stand: their files are written, their code and commands run, in order."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "docs" / "examples").glob("*.md"))
BLOCK = re.compile(r"^```(python|yaml|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", EXAMPLES, ids=lambda page: page.stem)
def test_an_example_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    assert blocks
    names: dict[str, object] = {}
    for kind, text in blocks:
        first, _, rest = text.partition("\n")
        if first.startswith("# file: "):
            path = tmp_path / first.removeprefix("# file: ")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(rest)
        elif kind == "python":
            exec(compile(text, f"{page.name}", "exec"), names)
        elif kind == "bash":
            command = re.sub(r"^pkd ", f"{sys.executable} -m pkd_lightning.run ", text, flags=re.MULTILINE)
            subprocess.run(command, shell=True, check=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})


def test_every_function_that_the_method_names_is_there() -> None:
    """`losses.distillation_loss`, `Mamba.macs`: of the package, or of a class in it."""
    package = Path(__file__).parent.parent / "pkd_lightning"
    source = "\n".join(path.read_text(encoding="utf-8") for path in package.rglob("*.py"))
    text = (Path(__file__).parent.parent / "docs" / "method.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:[a-z_]+\.)*[A-Za-z_]+\.[A-Za-z_]+)`", text)
    assert len(named) > 10
    for name in named:
        *_, last = name.split(".")
        assert re.search(rf"^\s*(def|class) {last}\b", source, re.MULTILINE), name
