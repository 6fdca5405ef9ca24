"""Paths of many modules at once, their match by depth, and taps inside of mixers that read in another order."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from pkd_lightning.errors import ConfigError
from pkd_lightning.kernels.scan import block as kernels
from pkd_lightning.knowledge.term import FeatureTerm, by_depth
from pkd_lightning.knowledge.tokens import grid_of
from pkd_lightning.models.blocks import ORDERS
from pkd_lightning.models.classifier import MambaClassifier
from pkd_lightning.outputs import Taps, paths_of

DIRECTIONS = list(ORDERS)


def model_of(direction: str = "cross", n_blocks: int = 4, **options: object) -> MambaClassifier:
    """Of images of 3x2 tokens."""
    torch.manual_seed(0)
    given = {"tokeniser": "patches", "patch_size": 2, "d_model": 5, "d_state": 3, "norm": "rms", "head": "mean"}
    return MambaClassifier((1, 6, 4), 3, n_blocks=n_blocks, direction=direction, **{**given, **options})


def tapped(model: nn.Module, *paths: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of two images, and the features at these paths."""
    with torch.no_grad(), Taps(model, paths) as taps:
        logits, features = taps.call(model, torch.randn(2, 1, 6, 4, generator=torch.Generator().manual_seed(1)))
    return logits, dict(features)


def order_of(columns: bool, backwards: bool) -> Tensor:
    """The places of a raster of 3x2 in the order in which they are read."""
    index = torch.arange(6)
    index = index.view(3, 2).T.flatten() if columns else index
    return index.flip(0) if backwards else index


# ---------------------------------------------------------------------------------- paths of many modules


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("*", ["a", "c", "d"]),
        ("a.*", ["a.0", "a.1"]),
        ("*.0", ["a.0", "c.0"]),
        ("*.-1", ["a.-1", "c.-1"]),
        ("*.*", ["a.0", "a.1", "c.0"]),
        ("-2.*", ["-2.0"]),
        ("d", ["d"]),
    ],
)
def test_a_star_stands_for_all_modules_there_are(path: str, found: list[str]) -> None:
    model = nn.ModuleDict(
        {"a": nn.Sequential(nn.ReLU(), nn.ReLU()), "c": nn.Sequential(nn.ReLU()), "d": nn.Linear(1, 1)}
    )
    assert paths_of(model, [path]) == found
    assert list(Taps(model, [path]).modules) == found
    for wrong in ("b.*", "*.2", "d.*"):
        with pytest.raises(ConfigError, match="no module of the model; nearest"):
            paths_of(model, [path, wrong])


def test_modules_are_matched_by_relative_depth() -> None:
    assert by_depth(3, 3) == [(0, 0), (1, 1), (2, 2)]
    assert by_depth(1, 3) == [(0, 2)]
    assert by_depth(2, 3) == [(0, 1), (1, 2)]
    assert by_depth(3, 2) == [(1, 0), (2, 1)]
    assert by_depth(2, 12) == [(0, 5), (1, 11)]
    for n in range(1, 9):
        for m in range(1, 9):
            pairs = by_depth(n, m)
            assert len(pairs) == min(n, m)
            assert pairs[-1] == (n - 1, m - 1)
            assert all(a < c and b < d for (a, b), (c, d) in itertools.pairwise(pairs))
            assert all(abs((a + 1) / n - (b + 1) / m) < 1 / max(n, m) for a, b in pairs)


def test_a_term_of_all_blocks_fits_models_of_any_number_of_them() -> None:
    term = FeatureTerm(student="blocks.*", teacher="blocks.*")
    found = term.for_models(model_of(n_blocks=2), model_of(n_blocks=3))
    assert (found.student_features, found.teacher_features) == (("blocks.0", "blocks.1"), ("blocks.1", "blocks.2"))
    listed = FeatureTerm(student="blocks.*", teacher=["tokens", "blocks.0", "blocks.-1"])
    assert listed.for_models(model_of(n_blocks=3), model_of()).teacher_features == ("tokens", "blocks.0", "blocks.-1")
    plain = FeatureTerm(student="blocks.-1", teacher="blocks.0")
    found = plain.for_models(model_of(), model_of())
    assert (found.student_features, found.teacher_features) == (("blocks.-1",), ("blocks.0",))
    assert found.grids == [((3, 2), (3, 2))]
    assert plain.for_models(model_of(), None) is plain
    with pytest.raises(ConfigError) as error:
        FeatureTerm(student="bloks.*", teacher="head.*").for_models(model_of(), model_of())
    assert [fault.split(": no module")[0] for fault in error.value.faults] == [
        "student: 'bloks.*'",
        "teacher: 'head.*'",
    ]


# ---------------------------------------------------------------------------------- taps inside of mixers


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("residual", [True, False])
def test_a_mixers_tokens_lie_where_those_of_its_block_do(direction: str, residual: bool) -> None:
    """And they are what the block adds that is computed in one pass."""
    model = model_of(direction, residual=residual)
    plain, blocks = tapped(model, "tokens", *(f"blocks.{i}" for i in range(4)))
    logits, mixers = tapped(model, *(f"blocks.{i}.mixer" for i in range(4)))
    torch.testing.assert_close(logits, plain)
    for i in range(4):
        before = blocks[f"blocks.{i - 1}" if i else "tokens"]
        added = blocks[f"blocks.{i}"] - before if residual else blocks[f"blocks.{i}"]
        torch.testing.assert_close(mixers[f"blocks.{i}.mixer"], added, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["in_proj", "x_proj", "dt_proj", "out_proj"])
def test_so_do_those_of_its_linear_layers(name: str) -> None:
    model = model_of()
    _, blocks = tapped(model, "tokens", *(f"blocks.{i}" for i in range(4)))
    _, found = tapped(model, *(f"blocks.{i}.mixer.{name}" for i in range(4)))
    for i, order in enumerate(ORDERS["cross"]):
        block, index = model.blocks[i], order_of(*order)
        read = block.norm(blocks[f"blocks.{i - 1}" if i else "tokens"])[:, index]
        with torch.no_grad(), Taps(block.mixer, [name]) as taps:  # of a mixer alone, which knows no raster
            expected = taps.call(block.mixer, read).features[name]
        torch.testing.assert_close(found[f"blocks.{i}.mixer.{name}"][:, index], expected, rtol=1e-4, atol=1e-6)


def test_what_is_in_the_rasters_order_is_left_as_it_is() -> None:
    places = model_of().raster_positions
    assert places("blocks.0.mixer") is None  # read row by row
    for path in ("blocks", "blocks.1", "blocks.1.norm", "blocks.1.mixer.conv1d", "tokens", "head"):
        assert places(path) is None
    assert places("blocks.-1.mixer".replace("-1", "3")).tolist() == order_of(True, True).tolist()  # type: ignore[union-attr]
    shared = model_of(shared=True, n_blocks=6).raster_positions("blocks.0.mixer")  # its last call is the sixth
    assert shared is not None
    assert shared.tolist() == order_of(False, True).tolist()
    whole = model_of()
    whole.blocks[1].mixer.reads_in_order = False  # type: ignore[assignment]
    assert whole.raster_positions("blocks.1.mixer") is None


def test_mixers_between_the_convolutions_have_the_raster_there() -> None:
    torch.manual_seed(0)
    options = {"tokeniser": "convolutions", "stem_channels": 3, "stem_blocks": 2, "patch_size": 3, "padding": True}
    model = MambaClassifier((1, 12, 8), 3, d_model=4, direction="cross", n_blocks=2, head="mean", **options)
    inside = "tokens.between.blocks.1.mixer"
    assert grid_of(model, inside) == grid_of(model, "tokens.between") == (6, 4)
    assert grid_of(model, "blocks.1.mixer") == grid_of(model, "tokens") == (3, 2)
    places = model.raster_positions(inside)
    assert places is not None
    assert places.tolist() == list(range(24))[::-1]
    assert model.raster_positions("tokens.between.blocks.0.mixer") is None
    with torch.no_grad(), Taps(model, [inside, "tokens.between.blocks.0", "tokens.between.blocks.1"]) as taps:
        found = taps.call(model, torch.randn(2, 1, 12, 8)).features
    added = found["tokens.between.blocks.1"] - found["tokens.between.blocks.0"]
    torch.testing.assert_close(found[inside], added, rtol=1e-4, atol=1e-6)


def fused(model: MambaClassifier, path: str) -> tuple[int, int]:
    """How many blocks, and how many mixers alone, one call computed in one pass, with a tap there."""
    calls = []
    original = kernels.mamba_block_cpu
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            kernels, "mamba_block_cpu", lambda *tensors, **around: calls.append(around) or original(*tensors, **around)
        )
        tapped(model, path)
    return sum(bool(around) for around in calls), sum(not around for around in calls)


@pytest.mark.parametrize("path", ["0", "1"])
def test_what_a_later_module_changes_in_place_is_refused(path: str) -> None:
    """It would be the later module's tensor by the time it is read."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    with Taps(model, [path]) as taps:
        if path == "1":
            assert (taps.call(model, torch.randn(3, 4)).features["1"] >= 0).all()
        else:
            with pytest.raises(ConfigError, match="'0': what this module gives is changed in place"):
                taps.call(model, torch.randn(3, 4))
            model[1] = nn.ReLU()
            assert (taps.call(model, torch.randn(30, 4)).features["0"] < 0).any()
    with torch.inference_mode(), Taps(model, [path]) as taps:
        assert taps.call(model, torch.randn(3, 4)).features[path].shape == (3, 4)


def test_what_is_tapped_is_called() -> None:
    """A hook on a block costs nothing, one on a mixer the pass over its block, one on a layer that over the mixer."""
    model = model_of(n_blocks=3)
    assert fused(model, "blocks.1") == (3, 0)
    assert fused(model, "blocks.1.mixer") == (2, 1)
    assert fused(model, "blocks.1.mixer.x_proj") == (2, 0)
