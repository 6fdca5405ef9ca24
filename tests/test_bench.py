import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from benchmarks import (
    bench,
    block,
    data,
    fits,
    floor,
    gpu,
    latency,
    memory,
    report,
    rounds,
    scan,
    steps,
    tables,
    timing,
)
from benchmarks.models import BEST, BEST_BATCH, CIFAR, PATCHES, STUDENTS, classifier
from benchmarks.timing import Row, at_least, at_most, judged
from pkd_lightning import matrix
from pkd_lightning.cost import Latency
from pkd_lightning.models.classifier import MambaClassifier

S1 = {"S1": STUDENTS["S1"]}
TINY_ROWS = {
    "scan": lambda: scan.rows(2, {"a": (5, 2, 3), "c": (4, 3, 2)}, batch=2),
    "block": lambda: block.rows(2, {**S1, **dict(itertools.islice(PATCHES.items(), 1))}, batch=2),
    "step": lambda: steps.rows(2, {"S7": STUDENTS["S1"]}),
    "fit": lambda: fits.rows(2, S1, steps=3),
    "data": lambda: data.rows(2, mnist=140, cifar=70),
    "rounds": lambda: rounds.rows(2, samples=40, classes=3),
}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """No call is repeated to fill a timing."""
    monkeypatch.setattr(timing, "SAMPLE", 0.0)


def fake(figure: float, target: timing.Target | None = None, what: str = "a row") -> Row:
    return judged({"what": what, "median_ms": 1.0, "spread_percent": 2.0, "rounds": 2}, figure, "ms", target)


@pytest.mark.parametrize("section", TINY_ROWS)
def test_rows_of_each_section_are_complete(section: str) -> None:
    before = matrix.MAPPED_BYTES
    rows = TINY_ROWS[section]()
    assert before == matrix.MAPPED_BYTES  # nothing is left changed for what runs after it
    assert set(TINY_ROWS) == set(bench.SECTIONS)
    assert any("target" in row for row in rows)
    assert len({(row["what"], row.get("against")) for row in rows}) == len(rows)  # no two that look the same
    for row in rows:
        assert row["figure"] > 0
        assert row["unit"]
        assert ("target" in row) == ("met" in row)
        assert "median_ms" in row or "bytes" in row
        for prefix in ("", "against_"):
            if f"{prefix}median_ms" in row:
                assert row[f"{prefix}rounds"] == 2
                assert row[f"{prefix}spread_percent"] >= 0
        if "against" in row:
            quotient = row["against_median_ms"] / row["median_ms"]
            assert row["figure"] == pytest.approx(quotient if row["unit"] == "x as fast" else 1 / quotient)
    json.dumps(rows)


def test_steps_of_mnist_best_are_those_of_its_configurations() -> None:
    student, teacher = (OmegaConf.load(f"conf/{kind}/mnist_best.yaml") for kind in ("student", "teacher"))
    assert {"shared": False, **BEST["mnist_best S7"]} == {**student.common, **student.rungs[-1]}
    expected = {key: value for key, value in teacher.model.items() if not key.startswith("_")}
    assert {"shared": False, **BEST["mnist_best teacher"]} == expected
    tiny = {**BEST["mnist_best S7"], "n_blocks": 1, "d_model": 2, "stem_channels": 1}
    rows = steps.rows(2, {"mnist_best S7": tiny})
    assert [row["what"] for row in rows] == [
        f"training step of mnist_best S7 at batch {BEST_BATCH}, {threads}" for threads in ("1 thread", "2 threads")
    ]
    for row in rows:
        assert row["figure"] == pytest.approx(row["median_ms"] / 1000 * steps.EPOCH / BEST_BATCH)
    assert "mnist_best S7 at batch 128 |" in tables.step([{"section": "step", **row} for row in rows])


def test_steps_of_cifar10_best_are_those_of_its_configurations() -> None:
    student, teacher = (OmegaConf.load(f"conf/{kind}/cifar10_best.yaml") for kind in ("student", "teacher"))
    assert {"shared": False, **CIFAR["cifar10_best S7"]} == {**student.common, **student.rungs[-1]}
    expected = {key: value for key, value in teacher.model.items() if not key.startswith("_")}
    assert {"shared": False, **CIFAR["cifar10_best teacher"]} == expected


def test_a_step_by_the_kernels_is_held_against_local_convolutions_and_norms_by_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny = {**CIFAR["cifar10_best S7"], "n_blocks": 1, "d_model": 2, "stem_channels": 2, "stem_blocks": 1}
    monkeypatch.setattr(steps, "size_of", lambda name: 8)
    rows = steps.rows(2, {"cifar10_best S7": tiny})
    assert [row.get("against") for row in rows] == [None, None, "torch"]
    line = tables.step([{"section": "step", **row} for row in rows]).splitlines()[-1]
    assert line.startswith("| cifar10_best S7 at batch 8 |")
    assert line.endswith(f"| {timing.shown(rows[-1]['figure'])} |")

    def kernels(model: MambaClassifier) -> int:
        with torch.profiler.profile() as seen:
            model(torch.randn(8, 3, 32, 32))
        return sum(event.count for event in seen.key_averages() if event.key in ("_Local", "_Pool"))

    model = classifier(tiny, (3, 32, 32))
    assert kernels(model) == 4  # a local convolution in each of two blocks, a norm after each
    assert kernels(steps.through_torch(model)) == 0


def test_blocks_are_held_against_their_scans() -> None:
    found = block.rows(2, PATCHES, batch=2)
    targets = {row["what"]: row.get("target") for row in found if row["against"] == "scan alone"}
    assert [target for what, target in targets.items() if "d_model 64" in what] == ["at most 1.6"] * 2
    assert [target for what, target in targets.items() if "d_model 16" in what] == [None] * 2


def test_scans_of_all_implementations_are_compared_and_a_wrong_one_is_noticed() -> None:
    rows = TINY_ROWS["scan"]()
    others = {"plain loop", "step loop", "reference", "mambapy", "floor", "one thread"}
    assert {row["against"] for row in rows if "against" in row} == others
    scan.agree(scan.implementations())
    with pytest.raises(AssertionError, match="mine"):
        scan.agree({"mine": lambda *tensors: 1.01 * scan.reference(*tensors)})


@pytest.mark.parametrize("backward", [False, True])
def test_the_floor_computes_what_it_is_asked_for(backward: bool) -> None:
    # what it writes depends on every update: LLVM cannot have dropped any
    results = [floor.floor(updates, backward)()[7].clone() for updates in (64, 6400, 6464)]
    assert all(torch.isfinite(x).all() for x in results)
    assert len({float(x[0]) for x in results}) == 3


def test_peak_memory_counts_what_lives_at_once() -> None:
    def call() -> torch.Tensor:
        a = torch.empty(1000)
        b = torch.empty(2000)
        del a
        torch.empty(500)
        return b

    assert 12_000 <= memory.peak_bytes(call) < 14_000
    assert memory.bytes_of((call(),)) == 8000


def test_calls_take_turns_and_slow_ones_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    durations, order = {"quick": 0.5, "slow": 4.0}, []
    monkeypatch.setattr(timing, "_seconds", lambda call, repeats: call() or durations[order[-1]])
    calls = {name: lambda name=name: order.append(name) for name in durations}
    times = timing.interleaved(calls, 6, seconds=12)
    assert times == {"quick": [500.0] * 6, "slow": [4000.0] * 3}
    assert order == ["quick", "quick", "slow", *["quick", "quick", "slow"] * 3]
    assert [len(x) for x in timing.interleaved(calls, 6, seconds=0.1).values()] == [timing.FEWEST] * 2


def test_calls_get_their_threads_and_the_setting_returns() -> None:
    seen: dict[str, set[int]] = {"one": set(), "two": set()}
    before = torch.get_num_threads()
    timing.interleaved(
        {name: lambda name=name: seen[name].add(torch.get_num_threads()) for name in seen}, 2, threads={"two": 2}
    )
    assert seen == {"one": {before}, "two": {2}}
    assert torch.get_num_threads() == before


def test_targets_are_judged_on_their_side() -> None:
    assert [at_least(2).met(x) for x in (1.9, 2.0, 2.1)] == [False, True, True]
    assert [at_most(2).met(x) for x in (1.9, 2.0, 2.1)] == [True, True, False]
    assert timing.missed([fake(1), fake(1, at_least(1)), fake(1, at_most(0.5), "slow")]) == [
        {**fake(1, at_most(0.5), "slow"), "target": "at most 0.5", "met": False}
    ]


def test_missed_targets_are_listed_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sections: dict[str, Any] = {
        "good": lambda count: [fake(3, at_least(2), "fine row"), fake(5, None, "row without target")],
        "bad": lambda count: [fake(7, at_most(4), "slow row")],
        "unused": lambda count: pytest.fail("not asked for"),
    }
    monkeypatch.setattr(bench, "SECTIONS", sections)
    path = tmp_path / "results" / "cpu.json"
    bench.main(["--only", "good,bad", "--rounds", "2", "--out", str(path)])  # no exit status but 0
    printed = capsys.readouterr().out
    assert "1 of 2 targets met, these fall short:\n  slow row: 7 ms, target at most 4\n" in printed
    assert "fine row" in printed.split("fall short")[0]
    content = json.loads(path.read_text())
    assert [row["section"] for row in content["rows"]] == ["good", "good", "bad"]
    assert [row["what"] for row in content["falls_short"]] == ["slow row"]
    assert content["hardware"]["cores"]
    assert content["versions"]["torch"]
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--only", "good,worse"])
    assert "no section worse; there are good, bad, unused" in capsys.readouterr().err


def test_report_says_when_all_targets_are_met(capsys: pytest.CaptureFixture[str]) -> None:
    report.conclude([fake(1, at_least(1))])
    assert capsys.readouterr().out == "1 of 1 targets met\n"


def test_the_tables_of_a_gpu_have_a_line_a_scan_and_a_line_a_step() -> None:
    def row(section: str, what: str, ms: float, figure: float, **more: str) -> timing.Row:
        return {"section": f"gpu {section}", "what": what, "median_ms": ms, "figure": figure, **more}

    rows = [
        row("scan", "scan c (7, 2, 5) bf16 forward", 0.1, 1.2, against="mamba_ssm"),
        row("scan", "scan c (7, 2, 5) bf16 forward", 0.1, 300, against="reference"),
        row("scan", "scan c (7, 2, 5) bf16 forward+backward", 0.5, 1.1, against="mamba_ssm"),
        row("scan", "scan c (7, 2, 5) bf16 forward+backward", 0.5, 400, against="reference"),
        row("step", "training step of S7 fp32, cuda", 30, 1000),
        row("step", "training step of S7 fp32, graphs", 5, 6000),
        row("step", "training step of S7 fp32, graphs", 5, 6, against="cuda"),
    ]
    assert tables.gpu_scan(rows).splitlines()[2:] == ["| c (7, 2, 5) bf16 | 0.1 / 0.5 | 1.2 / 1.1 | 300 / 400 |"]
    assert tables.gpu_step(rows).splitlines()[2:] == ["| S7 fp32 | 30 | 1,000 | 5 | 6,000 | 6 |"]
    assert {one.get("section") for one in tables.stored()} >= {"scan", "step", "gpu scan", "gpu step"}


def test_results_are_written_where_a_package_was_copied_and_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mamba_ssm.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    report.write(tmp_path / "results.json", [])
    assert json.loads((tmp_path / "results.json").read_text())["versions"]["mamba_ssm"] == "unknown"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_gpu_benchmark_says_that_there_is_no_gpu() -> None:
    with pytest.raises(SystemExit) as stop:
        gpu.main([])
    assert "needs a CUDA device" in str(stop.value)  # a text: the exit status is 1


def test_latencies_of_the_published_models_are_written_only_where_nothing_disturbed_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    document, path = tmp_path / "performance.md", tmp_path / "latency.json"
    document.write_text("<!-- bench: latency -->\nold\n<!-- end of bench -->\n")
    (tmp_path / "performance.json").write_text('{"rows": []}')
    for name, value in (("DOCUMENT", document), ("LATENCIES", path), ("RESULTS", tmp_path / "performance.json")):
        monkeypatch.setattr(tables, name, value)
    found = [{"model": "1", "ms": 1.0, "prefix_ms": 2.0, "disturbed": True}]
    found.append({"model": "teacher", "ms": 3.0, "disturbed": False})
    monkeypatch.setattr(latency, "rows", lambda: found)
    with pytest.raises(SystemExit, match="quiet machine"):
        latency.main(["--write"])
    assert "disturbed by other work: 1\n" in capsys.readouterr().out
    assert not path.exists()
    found[0]["disturbed"] = False
    latency.main(["--write"])
    assert "| 1 | 1.00 | 2.00 |\n| teacher | 3.00 |  |\n" in document.read_text()
    assert json.loads(path.read_text())["rows"] == found


def test_every_published_model_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count(1)
    monkeypatch.setattr(
        latency, "latency", lambda forward, image: forward(image) is None or Latency(next(calls), False)
    )
    found = latency.rows()
    assert [row["model"] for row in found] == [*map(str, range(1, 8)), "teacher"]
    assert [row["ms"] for row in found] == [1, 3, 5, 7, 9, 11, 13, 15]
    assert [row.get("prefix_ms") for row in found] == [2, 4, 6, 8, 10, 12, 14, None]
