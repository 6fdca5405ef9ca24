"""The C file: compiled, run, held against the ensemble, and refused where it would not give the same."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pkd_lightning.errors import ConfigError
from pkd_lightning.export import export
from pkd_lightning.export.c_source import c_source, loaded
from pkd_lightning.export.facts import facts_of
from pkd_lightning.models.classifier import MambaClassifier
from pkd_lightning.rounding import WEIGHTS, Weights
from pkd_lightning.tasks import ImageClassification
from tests.test_export import CONFIGURATIONS, Own, ensemble_of, inputs_of, needs_cc, small

PRINTS = r"""
#include "plain.c"
#include <stdio.h>
int main(void) {
    printf("{\"labels\": [%d, %d, %d], \"macs\": [%lld, %lld], \"input_shape\": [%d, %d, %d]}\n%s %d %lld %lld",
           pkd_labels[0], pkd_labels[1], pkd_labels[2], pkd_macs(1), pkd_macs(2), PKD_CHANNELS, PKD_HEIGHT, PKD_WIDTH,
           PKD_NAME, PKD_MEMBERS, pkd_macs(0), pkd_macs(3));
    return 0;
}
"""


@needs_cc
def test_labels_costs_and_sizes_are_constants_of_the_file(tmp_path: Path) -> None:
    ensemble = small()
    ensemble.labels = [3, 5, 8]
    done = export(ensemble, "c", tmp_path, name='a "name" */')
    program = tmp_path / "program.c"
    done.path.rename(tmp_path / "plain.c")
    program.write_text(PRINTS)
    subprocess.run(["cc", program, "-o", program.with_suffix(""), "-lm"], check=True)
    said = subprocess.run([program.with_suffix("")], capture_output=True, text=True, check=True).stdout
    facts, rest = said.split("\n")
    assert json.loads(facts) == {"labels": [3, 5, 8], "macs": done.facts.macs, "input_shape": [1, 8, 8]}
    assert rest == 'a "name" */ 2 -1 -1'
    assert torch.__version__ in (tmp_path / "plain.c").read_text()


@needs_cc
def test_the_c_file_compiles_without_a_warning_and_answers_as_a_program(tmp_path: Path) -> None:
    ensemble = small()
    ensemble.labels = [3, 5, 8]
    path = export(ensemble, "c", tmp_path).path
    strict = ["cc", "-std=c99", "-Wall", "-Wextra", "-pedantic", "-Werror"]
    program = tmp_path / "program"
    for flags in (["-O3"], ["-O3", "-march=native"], ["-O0"]):
        subprocess.run([*strict, *flags, "-DPKD_MAIN", path, "-o", program, "-lm"], check=True)
        images = inputs_of((1, 8, 8))
        for members in (1, 2):
            done = subprocess.run([program, str(members)], input=images.numpy().tobytes(), capture_output=True)
            rows = [list(map(float, line.split())) for line in done.stdout.decode().splitlines()]
            with torch.no_grad():
                expected = ensemble(ensemble.preprocess(images), members=members)
            assert [row[0] for row in rows] == ensemble.predicted(expected).tolist()
            assert torch.allclose(torch.tensor([row[1:] for row in rows]), expected, rtol=1e-5, atol=1e-5)
    done = subprocess.run([program, "3"], input=images.numpy().tobytes(), capture_output=True)
    assert done.returncode == 1
    assert b"prefixes of 1 to 2" in done.stderr


@needs_cc
@pytest.mark.parametrize("shape", list(CONFIGURATIONS), ids=str)
@pytest.mark.parametrize("weights", ["float32", *(pytest.param(one, marks=pytest.mark.slow) for one in WEIGHTS[1:])])
def test_no_configuration_gives_a_warning_where_everything_is_inlined(
    shape: tuple[int, ...], weights: Weights, tmp_path: Path
) -> None:
    ensemble = ensemble_of(shape)
    path = tmp_path / "ensemble.c"
    path.write_text(c_source(ensemble, facts_of(ensemble, "x", "uint8", weights=weights)))
    with loaded(path, path, ["-O3"]):
        pass


NAMES = """
#include "plain.c"
#include <stdio.h>
int main(void) {
    int i;
    for (i = 0; i < PKD_CLASSES; i++)
        fwrite(pkd_classes[i], 1, strlen(pkd_classes[i]) + 1, stdout);
    fwrite(PKD_NAME, 1, sizeof PKD_NAME, stdout);
    return 0;
}
"""


@needs_cc
@pytest.mark.parametrize(
    "names", [['"what??/\\" ??!', "Ca\xf1\xf3n 1", "\u732b\n\t7%d"], None], ids=["named", "labels"]
)
def test_names_of_classes_are_in_the_c_file_whatever_characters_they_have(
    names: list[str] | None, tmp_path: Path
) -> None:
    ensemble, name = small(), '??/ \\ "\u732b" /* */ //\n\\'
    ensemble.labels, ensemble.classes = [3, 5, 8], names
    facts = facts_of(ensemble, name, "uint8")
    (tmp_path / "plain.c").write_text(c_source(ensemble, facts, "x??( \\"), encoding="utf-8")
    (tmp_path / "program.c").write_text(NAMES)
    strict = ["-std=c99", "-Wall", "-Wextra", "-pedantic", "-Werror"]
    program = tmp_path / "program"
    subprocess.run(["cc", *strict, program.with_suffix(".c"), "-o", program, "-lm"], check=True)
    said = subprocess.run([program], capture_output=True, check=True).stdout.decode().split("\0")
    assert said == [*(names or ["3", "5", "8"]), name, ""]


SANITIZERS = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def sanitized(folder: Path) -> bool:
    """Whether the compiler has sanitizers, with their libraries."""
    (folder / "empty.c").write_text("int main(void) { return 0; }")
    done = subprocess.run(["cc", *SANITIZERS, folder / "empty.c", "-o", folder / "empty"], capture_output=True)
    return done.returncode == 0 and subprocess.run([folder / "empty"], capture_output=True).returncode == 0


@needs_cc
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(
    "shape", [None, *(pytest.param(one, marks=pytest.mark.slow) for one in CONFIGURATIONS)], ids=str
)
def test_no_configuration_reads_or_writes_beyond_its_arrays(
    shape: tuple[int, ...] | None, weights: Weights, tmp_path: Path
) -> None:
    """All configurations take a minute to compile; the small ensemble stands for them."""
    if not sanitized(tmp_path):
        pytest.skip("the compiler has no sanitizers")
    ensemble = small() if shape is None else ensemble_of(shape)
    path, program = tmp_path / "ensemble.c", tmp_path / "program"
    shape = ensemble.task.input_shape
    kind = "float32" if len(shape) == 2 else "uint8"
    path.write_text(c_source(ensemble, facts_of(ensemble, "x", kind, weights=weights)))
    subprocess.run(["cc", "-std=c99", *SANITIZERS, "-DPKD_MAIN", path, "-o", program, "-lm"], check=True)
    done = subprocess.run([program], input=inputs_of(shape, 2).numpy().tobytes(), capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert len(done.stdout.splitlines()) == 2


ACCURACY = r"""
#include "plain.c"
#include <stdio.h>
int main(void) {
    double worst[2] = {0, 0};
    for (int i = -8000; i <= 8000; i++) {
        float x = (float)i / 93.0f; /* from -86 to 86 */
        double power = exp((double)x), sum = log1p(power);
        worst[0] = fmax(worst[0], fabs(pkd_exp(x) / power - 1));
        worst[1] = fmax(worst[1], fabs(pkd_softplus(x) / sum - 1));
    }
    printf("%g %g %g %g", worst[0], worst[1], pkd_exp(-1e30f), pkd_exp(1e30f));
    return 0;
}
"""


@needs_cc
def test_exponential_and_softplus_of_the_c_file_are_those_of_float64(tmp_path: Path) -> None:
    export(small(), "c", tmp_path, name="plain")
    (tmp_path / "program.c").write_text(ACCURACY)
    for flags in ([], ["-march=native", "-ffp-contract=fast"]):
        program = tmp_path / "program"
        subprocess.run(["cc", "-O2", *flags, tmp_path / "program.c", "-o", program, "-lm"], check=True)
        said = subprocess.run([program], capture_output=True, text=True, check=True).stdout
        power, softplus, least, most = map(float, said.split())
        assert power < 2e-7
        assert softplus < 4e-7
        assert 0 <= least < 1e-37 < 1e37 < most < float("inf")


@needs_cc
@pytest.mark.parametrize("members", [0, 3, -1])
def test_the_c_function_refuses_what_is_no_prefix(members: int, tmp_path: Path) -> None:
    done = export(small(), "c", tmp_path)
    with loaded(done.path, done.path) as predict:
        logits = torch.full((3,), 7.0)
        assert predict(inputs_of((1, 8, 8))[0].data_ptr(), members, logits.data_ptr()) == -1
        assert logits.tolist() == [7.0] * 3
        assert predict(inputs_of((1, 8, 8))[0].data_ptr(), 2, None) in range(3)  # logits are not asked for


def test_c_without_a_compiler_is_kept_and_said_to_be_unchecked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    done = export(small(), "c", tmp_path)
    assert done.difference is None
    assert done.path.exists()
    assert f"{done.path}: not checked, there is no cc here" in caplog.text


class Changed(MambaClassifier):
    """It may compute anything."""


def changes() -> list[tuple[str, Any]]:
    """Ways in which a member is no longer as the C code has it, with what the error names."""

    def foreign(ensemble: Any) -> None:
        ensemble.members[1] = Own((1, 8, 8), 3, 5)

    def subclass(ensemble: Any) -> None:
        ensemble.members[1].__class__ = Changed

    def hooked(ensemble: Any) -> None:
        ensemble.members[1].blocks[0].register_forward_hook(lambda *_: None)

    def mixer(ensemble: Any) -> None:
        ensemble.members[1].blocks[1].mixer = nn.Linear(1, 1)

    def adapter(ensemble: Any) -> None:
        ensemble.members[1].blocks[1].mixer.in_proj = nn.Sequential(ensemble.members[1].blocks[1].mixer.in_proj)

    def head(ensemble: Any) -> None:
        ensemble.members[1].head = nn.Sequential(ensemble.members[1].head)

    def norm(ensemble: Any) -> None:
        ensemble.members[1].norm = nn.Tanh()

    def tokens(ensemble: Any) -> None:
        ensemble.members[1].tokens.embed = nn.Tanh()

    return [
        ("itself", foreign), ("itself", subclass), (r"blocks\.0", hooked), (r"blocks\.1\.mixer", mixer),
        (r"blocks\.1\.mixer", adapter), ("head", head), ("norm", norm), (r"tokens\.embed", tokens),
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "change"), changes(), ids=lambda value: getattr(value, "__name__", None))
def test_what_c_has_no_form_for_is_named_with_its_member(name: str, change: Any, tmp_path: Path) -> None:
    ensemble = small()
    change(ensemble)
    with pytest.raises(ConfigError, match=f"member 2: {name} is a .*--format c writes MambaClassifier"):
        export(ensemble, "c", tmp_path)
    assert not list(tmp_path.iterdir())


def test_c_names_a_task_it_does_not_know(tmp_path: Path) -> None:
    class Other(ImageClassification):
        def prepare(self, inputs: Tensor) -> Tensor:
            return inputs.float().log1p()

    ensemble = small()
    ensemble.task = Other((1, 8, 8), 3, ensemble.task.mean, ensemble.task.std)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"task .*Other: --format c knows"):
        export(ensemble, "c", tmp_path)
