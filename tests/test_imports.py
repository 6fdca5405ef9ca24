"""The package's imports: by floors, without a circle, as docs/imports.md draws them."""

import pytest

from docs import imports


def test_no_module_imports_a_higher_floor_and_there_is_no_circle() -> None:
    assert imports.faults() == []


def test_the_diagram_is_that_of_todays_imports() -> None:
    assert imports.PAGE.read_text(encoding="utf-8") == imports.page(), "python -m docs.imports --write"


def test_imports_inside_functions_and_of_packages_count() -> None:
    graph = imports.imports()
    assert "distil" in graph["run"]
    assert "boosting.loop" in graph["distil"]
    assert "kernels.scan.cuda" in graph["trainer"]
    assert "kernels.scan.custom_op" in graph["kernels.scan"]
    assert "kernels.residuals" in graph["boosting.residuals"]


@pytest.mark.parametrize(
    ("module", "imported", "said"),
    [
        ("losses", "boosting.options", "losses imports boosting.options, of a higher floor"),
        ("data.sets", "data.module", "a circle: "),
        ("models.building", "data.module", "a circle: "),  # between packages of a floor, not between modules
        ("stray", "errors", "stray is on no floor"),
    ],
)
def test_a_fault_is_named(module: str, imported: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = imports.imports()
    graph.setdefault(module, set()).add(imported)
    if said == "a circle: " and module == "models.building":
        graph["data.digits"] = graph["data.digits"] | {"models.options"}
    monkeypatch.setattr(imports, "imports", lambda: graph)
    assert any(fault.startswith(said) for fault in imports.faults())
