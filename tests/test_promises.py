"""What the project promises of whole runs; minutes each."""

from pathlib import Path

import pytest

from experiments.tables import worst_prefix
from pkd_lightning.cli import load_config
from pkd_lightning.data.idx import load_mnist
from pkd_lightning.errors import DataError
from pkd_lightning.run import run

POINT = 0.01 + 1e-9


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_embedded_experiment(seed: int, tmp_path: Path) -> None:
    results = run(load_config("experiment=digits", f"seed={seed}", "logger=none", f"run_root={tmp_path}"))
    assert results["teacher"]["accuracy"] >= 0.97
    assert results["ensemble"]["members"] == 7
    assert results["teacher"]["accuracy"] - results["ensemble"]["accuracy"] <= POINT
    assert worst_prefix(results) <= POINT


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_papers_architectures_run_through_on_real_mnist(tmp_path: Path) -> None:
    try:
        load_mnist(None)
    except DataError as error:
        pytest.skip(f"real MNIST is not to be had: {str(error).splitlines()[0]}")
    results = run(
        load_config(
            "experiment=mnist_paper", "data.limit=2000", "trainer.max_epochs=1", "boosting.rounds=2", "logger=none",
            f"run_root={tmp_path}",
        )
    )  # fmt: skip
    assert results["sizes"] == {"train": 1260, "validation": 140, "test": 600, "originals": 1260}
    assert (results["teacher"]["params"], results["teacher"]["flops_published"]) == (34_674, 95_648)
    assert [(row["params"], row["flops_published"]) for row in results["rounds"]] == [(620, 686), (1_206, 1_372)]
    assert results["rounds"][1]["accepted_by"] in ("condition", "best_candidate")
