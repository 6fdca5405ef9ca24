"""What lies at an import path, and what is said where there is nothing."""

import json
from pathlib import Path

import pytest

from pkd_lightning.checks import located
from pkd_lightning.models.classifier import MambaClassifier


def test_modules_and_attributes_on_the_way_are_found() -> None:
    assert located("pkd_lightning.models.classifier.MambaClassifier.faults") is MambaClassifier.faults
    assert located("json") is json
    assert located("xml.etree.ElementTree").__name__ == "xml.etree.ElementTree"  # which nothing need have imported


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("", "no import path"),
        (".relative", "relative ones are not supported"),
        ("json..loads", "no import path"),
        ("nowhere.at.all", r"'nowhere.at.all': ModuleNotFoundError.*is 'nowhere' installed"),
        ("json.lodas", "is 'lodas' to be imported from 'json'"),
        ("json.decoder.JSONDecoder.decod", "is 'decod' an attribute of 'json.decoder.JSONDecoder'"),
    ],
)
def test_where_there_is_nothing_it_is_said_of_which_part(path: str, said: str) -> None:
    with pytest.raises((ImportError, ValueError), match=said):
        located(path)


def test_what_the_import_of_a_module_raises_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "failing_package").mkdir()
    (tmp_path / "failing_package" / "__init__.py").write_text("")
    (tmp_path / "failing_package" / "part.py").write_text("1 / 0")
    with pytest.raises(ImportError, match=r"'failing_package.part.Model': ZeroDivisionError\('division by zero'\)$"):
        located("failing_package.part.Model")
