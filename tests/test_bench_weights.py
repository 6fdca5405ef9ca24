"""The benchmark of rounded weights: its rows and its table."""

import json
from pathlib import Path

import pytest

from benchmarks import timing, weights
from tests.test_export import needs_cc, small
from tests.test_export_weights import digits_run

pytestmark = needs_cc


def test_each_kind_of_weights_has_a_row_and_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SAMPLE", 0.0)
    monkeypatch.setattr(weights, "FLAGS", ("-O1",))
    run = digits_run(tmp_path / "digits" / "hash")
    found = weights.rows(str(run), 2)
    assert [row["what"] for row in found] == ["digits, float32", "digits, bf16", "digits, int8"]
    plain, bf16, int8 = found
    assert plain["accuracy"] == bf16["accuracy_before"] == int8["accuracy_before"]
    assert bf16["images"] == 126
    assert plain["rodata_bytes"] > bf16["rodata_bytes"] > int8["rodata_bytes"] > 1000
    assert plain["c_bytes"] > int8["c_bytes"]
    assert plain["safetensors_bytes"] > int8["safetensors_bytes"]
    text = weights.fill("<!-- bench: weights -->\nold\n<!-- end of bench -->\n<!-- bench: other -->\nold", found)
    assert text.count("old") == 1  # of the table that is not this benchmark's
    assert "\n| digits, int8 | " in text
    json.dumps(found)


def test_a_run_without_its_data_is_an_error(tmp_path: Path) -> None:
    run = digits_run(tmp_path / "digits" / "hash")
    (run / "config.yaml").unlink()
    with pytest.raises(SystemExit, match="its run's validation data are not at hand"):
        weights.rows(str(run), 2)


def test_float32_has_nothing_to_compare(tmp_path: Path) -> None:
    from pkd_lightning.export import export

    assert weights.answers(export(small(), "c", tmp_path)) == {}
