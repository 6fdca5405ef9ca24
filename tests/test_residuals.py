"""The residual matrices against their update done directly (docs/method.md, 2), and the bound that B-DISTIL proves."""

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from benchmarks.rounds import memory
from pkd_lightning import matrix
from pkd_lightning.boosting.residuals import ResidualMatrices, condition_holds, theoretical_eta
from pkd_lightning.errors import RunError
from pkd_lightning.matrix import Difference, chunks, largest, quantile, scratch

Rounds = list[tuple[np.ndarray, float]]


def multiply_directly(samples: int, classes: int, rounds: Rounds) -> tuple[np.ndarray, np.ndarray]:
    """K+ and K-, multiplied and normalised every round in float64."""
    plus = np.full((samples, classes), 1 / (2 * samples))
    minus = plus.copy()
    for residual, eta in rounds:
        plus = plus * np.exp(-eta * residual)
        minus = minus * np.exp(eta * residual)
        total = (plus + minus).sum(axis=0)
        plus, minus = plus / total, minus / total
    return plus, minus


def after(samples: int, classes: int, rounds: Rounds) -> ResidualMatrices:
    matrices = ResidualMatrices(samples, classes)
    for residual, eta in rounds:
        matrices.update(torch.from_numpy(residual).float(), eta)
    return matrices


def dyadic(shape: tuple[int, int], seed: int, size: float = 4.0) -> np.ndarray:
    """Random residuals of at most `size`, multiples of 1/64: sums of them and their float32 forms are exact."""
    steps = int(64 * size)
    return np.random.default_rng(seed).integers(-steps, steps + 1, shape) / 64


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    samples=st.integers(1, 9),
    classes=st.integers(1, 4),
    etas=st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]), max_size=5),
    seed=st.integers(0, 10**6),
)
@example(samples=1, classes=1, etas=[1.0, 0.5], seed=0)
def test_matrices_and_edges_equal_the_direct_update(samples, classes, etas, seed):
    shape = (samples, classes)
    rounds = [(dyadic(shape, seed + t), eta) for t, eta in enumerate(etas)]
    matrices = after(samples, classes, rounds)
    plus, minus = multiply_directly(samples, classes, rounds)
    np.testing.assert_allclose(matrices.k_plus().numpy(), plus, rtol=1e-12)
    np.testing.assert_allclose(matrices.k_minus().numpy(), minus, rtol=1e-12)
    candidate = dyadic(shape, seed - 1 if seed else 99)
    edges = matrices.edges(torch.from_numpy(candidate).float())
    np.testing.assert_allclose(edges.numpy(), ((plus - minus) * candidate).sum(axis=0), rtol=1e-11, atol=1e-13)


def test_ordinary_residuals_stay_within_float32_of_the_direct_update():
    rng = np.random.default_rng(0)
    rounds = [(rng.normal(scale=3, size=(50, 10)), 0.3) for _ in range(7)]
    plus, minus = multiply_directly(50, 10, rounds)
    matrices = after(50, 10, rounds)
    np.testing.assert_allclose(matrices.k_plus().numpy(), plus, rtol=1e-5)
    np.testing.assert_allclose(matrices.k_minus().numpy(), minus, rtol=1e-5)


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_columns_of_both_matrices_sum_to_one(rounds):
    matrices = after(20, 6, [(dyadic((20, 6), t), 0.5) for t in range(rounds)])
    total = matrices.k_plus() + matrices.k_minus()
    np.testing.assert_allclose(total.sum(0).numpy(), 1, rtol=1e-13)
    rows = slice(3, 9)
    assert torch.equal(matrices.k_plus(rows), matrices.k_plus()[rows])
    assert torch.equal(matrices.k_minus(rows), matrices.k_minus()[rows])


@pytest.mark.parametrize("rounds", [1, 3])
def test_steps_too_large_for_the_direct_update(rounds):
    samples, classes = 6, 3
    steps = [(dyadic((samples, classes), seed=t, size=8.0), 500.0) for t in range(rounds)]
    with np.errstate(all="ignore"):
        plus, minus = multiply_directly(samples, classes, steps)
    assert not np.isfinite(plus + minus).all()  # or this test would show nothing

    with localcontext() as context:
        context.prec = 40
        sums = [
            [sum(Decimal(eta) * Decimal(residual[i, j]) for residual, eta in steps) for j in range(classes)]
            for i in range(samples)
        ]
        normalisers = [sum(row[j].exp() + (-row[j]).exp() for row in sums) for j in range(classes)]
        exact_plus = np.array([[float((-x).exp() / z) for x, z in zip(row, normalisers, strict=True)] for row in sums])
        exact_minus = np.array([[float(x.exp() / z) for x, z in zip(row, normalisers, strict=True)] for row in sums])
    matrices = after(samples, classes, steps)
    np.testing.assert_allclose(matrices.k_plus().numpy(), exact_plus, rtol=1e-9, atol=1e-300)
    np.testing.assert_allclose(matrices.k_minus().numpy(), exact_minus, rtol=1e-9, atol=1e-300)
    total = (matrices.k_plus() + matrices.k_minus()).sum(0)
    np.testing.assert_allclose(total.numpy(), 1, rtol=1e-9)
    candidate = dyadic((samples, classes), seed=50)
    expected = ((exact_plus - exact_minus) * candidate).sum(axis=0)
    np.testing.assert_allclose(matrices.edges(torch.from_numpy(candidate).float()).numpy(), expected, rtol=1e-9)


def test_before_the_first_update_all_weights_are_equal_and_every_edge_is_exactly_zero():
    matrices = ResidualMatrices(30, 4)
    np.testing.assert_allclose(matrices.k_plus().numpy(), 1 / 60, rtol=1e-13)
    np.testing.assert_allclose(matrices.k_minus().numpy(), 1 / 60, rtol=1e-13)
    edges = matrices.edges(1e6 * torch.randn(30, 4, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(edges, torch.zeros(4, dtype=torch.float64))
    assert not condition_holds(edges)
    assert not matrices.indicator().any()  # K+ is not greater than K-


def test_k_plus_grows_where_the_ensemble_is_below_the_teacher():
    teacher = dyadic((12, 3), seed=0)
    students = [dyadic((12, 3), seed=1 + t) for t in range(3)]
    matrices = after(12, 3, [(student - teacher, 0.25) for student in students])
    below = np.mean(students, axis=0) < teacher
    above = np.mean(students, axis=0) > teacher
    assert below.any()
    assert above.any()
    plus, minus = matrices.k_plus().numpy(), matrices.k_minus().numpy()
    assert np.array_equal(plus > minus, below)
    assert np.array_equal(minus > plus, above)
    assert np.array_equal(matrices.indicator().numpy(), below)
    # the further below, the larger the weight within a class
    gap = np.mean(students, axis=0) - teacher
    for j in range(3):
        assert (np.diff(plus[np.argsort(gap[:, j]), j]) <= 0).all()


def test_an_edge_is_positive_for_a_student_that_corrects_and_negative_for_one_that_repeats():
    first = torch.from_numpy(dyadic((12, 3), seed=3)).float()
    matrices = ResidualMatrices(12, 3)
    matrices.update(first, 0.25)
    assert (matrices.edges(-first) > 0).all()  # above the teacher where the first was below
    assert (matrices.edges(first) < 0).all()
    assert condition_holds(matrices.edges(-first))


def test_eta_zero_changes_nothing():
    matrices = after(8, 3, [(dyadic((8, 3), 0), 0.5)])
    before = matrices.k_plus()
    matrices.update(torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), 0.0)
    assert torch.equal(matrices.k_plus(), before)


@pytest.mark.parametrize("scale", [1e-6, 0.5, 5.0, 300.0])
def test_sample_weights_are_the_size_of_k_plus_less_k_minus(scale, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    matrices = ResidualMatrices(45, 3)
    assert torch.equal(matrices.sample_weights(), torch.ones(45))  # K+ = K-
    matrices.update(scale * torch.randn(45, 3, generator=generator), 1.0)
    size = (matrices.k_plus() - matrices.k_minus()).abs().sum(1)
    weights = matrices.sample_weights()
    assert weights.dtype == torch.float32
    assert weights.mean() == pytest.approx(1, rel=1e-6)
    # in K+ - K- most digits cancel at the smallest scale
    torch.testing.assert_close(weights.double(), size / size.mean(), rtol=1e-6, atol=1e-12 / scale)
    monkeypatch.setattr(matrix, "CHUNK_BYTES", 16 * 3 * 4)
    assert torch.equal(matrices.sample_weights(), weights)


def test_the_sample_farthest_from_the_teacher_weighs_most():
    matrices = after(3, 1, [(np.array([[0.5], [-2.0], [0.0]]), 1.0)])
    weights = matrices.sample_weights()
    assert weights[2] == 0
    assert weights[1] / weights[0] == pytest.approx(math.sinh(2.0) / math.sinh(0.5), rel=1e-6)


def test_one_sample_is_a_logistic_curve():
    matrices = after(1, 2, [(np.array([[1.5, -0.25]]), 2.0)])
    np.testing.assert_allclose(matrices.k_plus().numpy(), [[1 / (1 + math.exp(6)), 1 / (1 + math.exp(-1))]], rtol=1e-12)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_residual_or_step_is_refused_and_changes_nothing(bad, mapped, monkeypatch, tmp_path):
    matrices = mapped_after(monkeypatch, tmp_path, 2) if mapped else after(40, 3, [(dyadic((40, 3), 0), 0.5)])
    before = matrices.S.clone()
    for at in (None, (0, 0), (17, 1), (39, 2)):
        residual = torch.ones(40, 3)
        if at is not None:
            residual[at] = bad
        with pytest.raises(ValueError, match="finite"):
            matrices.update(residual, bad if at is None else 0.5)
    assert torch.equal(matrices.S, before)


@pytest.mark.parametrize("samples", [1, 16, 40, 55])
def test_chunks_and_files_change_nothing(samples, monkeypatch, tmp_path):
    rounds = [(dyadic((samples, 3), t), 0.5) for t in range(3)]
    candidate = torch.from_numpy(dyadic((samples, 3), 9)).float()
    whole = after(samples, 3, rounds)
    expected = (whole.k_plus(), whole.k_minus(), whole.edges(candidate))
    monkeypatch.setattr(matrix, "CHUNK_BYTES", 16 * 3 * 4)
    assert len(list(chunks(whole.S.shape))) == -(-samples // 16)
    monkeypatch.setattr(matrix, "MAPPED_BYTES", 0)
    mapped = ResidualMatrices(samples, 3, tmp_path / "residuals")
    for residual, eta in rounds:
        student = torch.randn(samples, 3).round()
        mapped.update(Difference(student, student - torch.from_numpy(residual).float()), eta)
    assert mapped.S.data_ptr() != whole.S.data_ptr()
    assert len(list(tmp_path.iterdir())) == 2
    for chunked in (after(samples, 3, rounds), mapped):
        assert torch.equal(chunked.S, whole.S)
        assert torch.equal(chunked.indicator(), whole.indicator())
        for ours, theirs in zip((chunked.k_plus(), chunked.k_minus(), chunked.edges(candidate)), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("classes", [1, 7, 100])
@pytest.mark.parametrize("size", [1e-3, 1.0, 400.0])
def test_edges_equal_their_definition(size, classes):
    generator = torch.Generator().manual_seed(0)
    matrices = ResidualMatrices(60, classes)
    matrices.update(size * (2 * torch.rand(60, classes, generator=generator) - 1), 1.0)
    candidate = torch.randn(60, classes, generator=generator)
    reference = matrices.edges_reference(candidate)
    matrices.load(matrices.S.clone())  # forgets the normaliser
    torch.testing.assert_close(matrices.edges(candidate), reference, rtol=1e-11, atol=1e-13)
    normaliser = matrices.log_normaliser()  # found with the edges
    matrices.load(matrices.S)
    torch.testing.assert_close(normaliser, matrices.log_normaliser(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("q", [1e-9, 0.1, 0.5, 0.99, 0.999, 0.9999, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (7, 3), (97, 11), (1009, 10)])
def test_the_quantile_is_that_of_a_sorted_copy(shape, q, monkeypatch):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)) ** 3
    values[::5] = values[0].clone()  # ties
    expected = float(np.quantile(values.abs().double().numpy(), q, method="lower"))
    assert quantile(values, q) == expected
    exact = torch.quantile(values.abs().double().flatten(), q, interpolation="lower")
    assert quantile(values, q) == float(exact)
    assert quantile(Difference(values.neg(), torch.zeros(shape)), q) == expected
    monkeypatch.setattr(matrix, "CHUNK_BYTES", 16 * shape[1] * 4)
    assert quantile(values, q) == expected


def test_the_quantile_at_its_limits():
    values = torch.tensor([[0.0, -3.0], [1e-45, 3.4e38], [-math.inf, 2.0]])  # the smallest and the largest float32
    assert [quantile(values, rank / 5) for rank in range(1, 6)] == sorted(values.abs().flatten().tolist())[1:]
    assert quantile(torch.empty(0, 3), 0.5) == largest(torch.empty(0, 3)) == 0
    values[0, 0] = math.nan
    assert math.isnan(quantile(values, 1.0))
    assert quantile(values, 0.5) == 3.0  # NaN counts as the largest


@pytest.mark.parametrize("q", [0.5, 0.9, 0.999])
def test_one_exploding_entry_changes_the_bound_and_no_other_entry(q):
    """One image drove a student's logits to 7e12: with the largest as B, eta was 0 and the round was lost."""
    samples, classes, steps = 61, 3, 5
    generator = torch.Generator().manual_seed(0)
    students = [torch.randn(samples, classes, generator=generator) for _ in range(3)]
    teacher = torch.randn(samples, classes, generator=generator)
    at = divmod(int((students[0] - teacher).abs().argmax()), classes)

    def play(first: torch.Tensor, q: float) -> tuple[ResidualMatrices, float, torch.Tensor]:
        """S after two students, B, and the edges of a third."""
        matrices, bound = ResidualMatrices(samples, classes), 0.0
        for student in (first, students[1]):
            bound = max(bound, quantile(Difference(student, teacher), q))
            eta = theoretical_eta(samples, steps, bound)
            matrices.update(Difference(student, teacher, bound if q < 1 else math.inf), eta)
        return matrices, bound, matrices.edges(Difference(students[2], teacher, bound if q < 1 else math.inf))

    exploding = students[0].clone()
    exploding[at] = math.copysign(7e12, float(students[0][at] - teacher[at]))
    plain, bound, edges = play(students[0], q)
    matrices, with_it, edges_with_it = play(exploding, q)
    assert with_it == bound  # an entry above the quantile has no part in it
    assert torch.equal(matrices.S, plain.S)  # its own entry counts as B, as before
    assert torch.equal(edges_with_it, edges)
    assert matrices.S.abs().max() <= 2 * math.sqrt(math.log(2 * samples) / steps) * (1 + 1e-6)
    lost, _, _ = play(exploding, 1.0)
    others = torch.ones_like(lost.S, dtype=torch.bool).index_put_(tuple(map(torch.tensor, at)), torch.tensor(False))
    assert lost.S[others].abs().max() < 1e-9  # what went wrong

    candidate = students[2].clone()
    candidate[at] = 7e12
    residual = Difference(candidate, teacher)
    clipped = Difference(candidate, teacher, max(bound, quantile(residual, q)))
    assert (plain.edges(residual) - edges).abs().max() > 1e8
    elsewhere = torch.arange(classes) != at[1]
    assert torch.equal(plain.edges(clipped)[elsewhere], edges[elsewhere])
    assert torch.equal(plain.edges(clipped).sign(), edges.sign())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_clipping_does_not_hide_what_is_not_finite(bad):
    student = torch.zeros(9, 2)
    student[3, 1] = bad
    matrices = after(9, 2, [(dyadic((9, 2), 0), 0.5)])
    residual = Difference(student, torch.zeros(9, 2), 4.0)
    with pytest.raises(ValueError, match="finite"):
        matrices.update(residual, 0.5)
    assert not condition_holds(matrices.edges(residual))


def test_without_a_bound_a_difference_is_exact():
    student, teacher = torch.randn(2, 9, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Difference(student, teacher)[2:5], student[2:5] - teacher[2:5])
    clipped = Difference(student, teacher, 0.75)[0:9]
    assert torch.equal(clipped, (student - teacher).clamp(-0.75, 0.75))


def mapped_after(monkeypatch, tmp_path, rounds: int) -> ResidualMatrices:
    monkeypatch.setattr(matrix, "MAPPED_BYTES", 0)
    matrices = ResidualMatrices(40, 3, tmp_path / "residuals")
    for t in range(rounds):
        matrices.update(torch.from_numpy(dyadic((40, 3), t)).float(), 0.5)
    return matrices


@pytest.mark.parametrize("rounds", [0, 1, 2, 3])
def test_an_update_cut_short_leaves_what_the_checkpoint_names(rounds, monkeypatch, tmp_path):
    class Killed(Exception):
        pass

    class Cut:
        """Residuals whose reading stops in the middle, as if the process ended there."""

        shape = torch.Size([40, 3])

        def __getitem__(self, rows):
            if rows.start:
                raise Killed
            return torch.ones(40, 3)[rows]

    matrices = mapped_after(monkeypatch, tmp_path, rounds)
    monkeypatch.setattr(matrix, "CHUNK_BYTES", 16 * 3 * 4)
    saved, before = matrices.state(), matrices.S.clone()
    assert isinstance(saved, dict) == (rounds > 0)
    with pytest.raises(Killed):
        matrices.update(Cut(), 0.5)
    assert torch.equal(matrices.S, before)

    matrices.update(torch.ones(40, 3), 0.5)  # not saved: the checkpoint still names the round before
    expected = matrices.S.clone()
    resumed = ResidualMatrices(40, 3, tmp_path / "residuals")
    resumed.load(saved)
    assert torch.equal(resumed.S, before)
    resumed.update(torch.ones(40, 3), 0.5)
    assert torch.equal(resumed.S, expected)


def test_a_file_that_is_not_the_matrix_is_refused(monkeypatch, tmp_path):
    saved = mapped_after(monkeypatch, tmp_path, 1).state()
    path = tmp_path / saved["file"]
    ResidualMatrices(40, 3, tmp_path / "residuals").load(path.name)  # as a checkpoint without hashes has it
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunError, match=f"{path.name}: is damaged"):
        ResidualMatrices(40, 3, tmp_path / "residuals").load(saved)
    path.write_bytes(b"short")
    with pytest.raises(ValueError, match="another size"):
        ResidualMatrices(40, 3, tmp_path / "residuals").load(saved)
    path.unlink()
    with pytest.raises(ValueError, match="missing"):
        ResidualMatrices(40, 3, tmp_path / "residuals").load(saved)
    with pytest.raises(ValueError, match="does not belong"):
        ResidualMatrices(40, 3).load(saved)
    with pytest.raises(ValueError, match=r"shape \(4, 3\)"):
        ResidualMatrices(40, 3).load(torch.zeros(4, 3))


def test_scratch_leaves_no_file(monkeypatch, tmp_path):
    monkeypatch.setattr(matrix, "MAPPED_BYTES", 0)
    values = scratch(40, 3, tmp_path)
    values.fill_(2.0)
    assert not list(tmp_path.iterdir())
    assert values.sum() == 240


@pytest.mark.parametrize(
    ("edges", "fraction", "margin", "holds"),
    [
        ([0.1, 0.2, 0.3, 0.4], 1.0, 0.0, True),
        ([0.1, 0.2, 0.3, 0.0], 1.0, 0.0, False),  # above the margin, not at it
        ([0.1, 0.2, 0.3, -1.0], 0.75, 0.0, True),
        ([0.1, 0.2, -1.0, -1.0], 0.75, 0.0, False),
        ([0.1, 0.2, 0.3, 0.4], 0.5, 0.25, True),
        ([0.1, 0.2, 0.3, 0.4], 0.75, 0.25, False),
        ([-0.1, -0.2], 1.0, -0.5, True),
        ([-1.0], 0.0, 0.0, True),
        ([1.0], 1.0, 0.0, True),
        ([1.0, math.nan], 1.0, 0.0, False),
    ],
)
def test_condition(edges, fraction, margin, holds):
    assert condition_holds(torch.tensor(edges, dtype=torch.float64), fraction, margin) is holds


@pytest.mark.parametrize(
    "classes",
    [10, 100],  # 7/100 * 100 is 7.000000000000001
)
def test_a_fraction_that_is_met_exactly_is_met(classes):
    for met in range(classes + 1):
        edges = torch.ones(classes).index_fill(0, torch.arange(met, classes), -1.0)
        assert condition_holds(edges, met / classes)
        if met < classes:
            assert not condition_holds(edges, (met + 1) / classes)


@pytest.fixture
def one_thread():
    """Thousands of small operations: on a loaded machine two threads take ten to a hundred times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def max_mean_error(samples: int, rounds: int, sign: int = 1, classes: int = 3, bound: float = 3.0) -> float:
    """Play the game of docs/method.md, 2, on a class symmetric about g; sign=-1 turns the update round."""
    generator = torch.Generator().manual_seed(samples + rounds)
    eta = theoretical_eta(samples, rounds, bound)
    matrices = ResidualMatrices(samples, classes)
    total = torch.zeros(samples, classes)
    for t in range(rounds):
        residual = bound * (2.0 * torch.randint(2, (samples, classes), generator=generator) - 1)
        edges = matrices.edges(residual)
        residual = torch.where(edges < 0, -residual, residual)  # the class holds both, so the condition can be met
        assert t == 0 or (edges != 0).all()
        total += residual
        matrices.update(sign * residual, eta)
    return float((total / rounds).abs().max())


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("samples", "rounds"), [(200, 50), (200, 800), (2000, 3200)])
def test_the_mean_ensemble_approaches_the_teacher_as_fast_as_proved(samples, rounds):
    bound = 3.0
    assert max_mean_error(samples, rounds, bound=bound) <= 2 * bound * math.sqrt(math.log(2 * samples) / rounds)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("rounds", [50, 800])
def test_with_the_update_turned_round_it_does_not(rounds):
    bound = 3.0
    assert max_mean_error(200, rounds, sign=-1, bound=bound) > 2 * bound * math.sqrt(math.log(400) / rounds)


def test_the_step_is_scaled_by_the_bound():
    # larger logits change the unit of the game, not its course
    small, large = (max_mean_error(50, 40, bound=bound) for bound in (1.0, 32.0))
    assert large == pytest.approx(32 * small, rel=1e-5)
    assert theoretical_eta(50, 40, 32.0) == pytest.approx(theoretical_eta(50, 40, 1.0) / 32)
    assert theoretical_eta(50, 160, 1.0) == pytest.approx(theoretical_eta(50, 40, 1.0) / 2)


def test_passes_over_mapped_matrices_take_little_memory():
    samples, classes = 200_000, 100  # 80 MB a matrix
    before, most = memory(samples, classes)
    assert most - before < 2e7


def test_a_file_left_over_from_a_larger_matrix_is_cut_to_size(monkeypatch, tmp_path):
    monkeypatch.setattr(matrix, "MAPPED_BYTES", 0)
    for samples in (100, 80):
        matrices = ResidualMatrices(samples, 3, tmp_path / "S")
        matrices.update(torch.ones(samples, 3), 1.0)
        resumed = ResidualMatrices(samples, 3, tmp_path / "S")
        resumed.load(matrices.state())
        assert torch.equal(resumed.S, torch.ones(samples, 3))
