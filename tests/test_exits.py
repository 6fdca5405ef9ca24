"""Early exit: each rule by hand, budgets that are met, policies that decide as the ensemble does, and their files."""

import inspect
import itertools
import json
import math

import pytest
import torch
from torch import Tensor, nn

from pkd_lightning.ensemble import ProgressiveEnsemble
from pkd_lightning.errors import ConfigError, RunError
from pkd_lightning.exits import (
    ENTROPY,
    MARGIN,
    MAXIMUM,
    PATIENCE,
    ExitPolicy,
    LearnedExit,
    budgeted_thresholds,
    calibrate,
    learn,
    one_threshold,
)
from pkd_lightning.exits.calibration import exit_costs, mean_cost, students_used
from pkd_lightning.exits.curves import Observed, exit_results
from pkd_lightning.exits.learned import features_of
from pkd_lightning.exits.rules import SIMPLE, scores_of
from pkd_lightning.outputs import Output
from pkd_lightning.tasks import SignalClassification

CLASSES, MACS = 4, (1_000, 3_000, 6_000, 10_000)
CHOICES = [budgeted_thresholds, one_threshold]


def prefixes(rows: int = 400, seed: int = 0, count: int = len(MACS)) -> tuple[list[Tensor], Tensor]:
    """Logits of prefixes that grow surer and better, and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (rows,), generator=generator)
    hard = torch.rand(rows, 1, generator=generator) < 0.3
    truth = 4 * nn.functional.one_hot(labels, CLASSES) * torch.where(hard, 0.2, 1.0)
    noise = torch.zeros(rows, CLASSES)
    found = []
    for t in range(1, count + 1):
        noise = noise + torch.randn(rows, CLASSES, generator=generator)
        found.append(truth + 1.5 * noise / t)
    return found, labels


# ---------------------------------------------------------------------------------- rules


def test_scores_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.7, 0.2, 0.1]])) + 3  # any constant
    entropies = [0.5 * math.log(0.5) + 0.5 * math.log(0.25), sum(p * math.log(p) for p in (0.7, 0.2, 0.1))]
    for rule, expected in ((MAXIMUM, [0.5, 0.7]), (MARGIN, [0.25, 0.5]), (ENTROPY, entropies)):
        scores, state = rule.step(logits)
        assert scores.tolist() == pytest.approx(expected, rel=1e-6)
        assert scores.dtype == torch.float64
        assert state == ()
    assert ENTROPY.step(torch.tensor([[0.0, -math.inf]]))[0].item() == 0  # certain


def test_patience_counts_the_agreements_in_a_row():
    classes = torch.tensor([[1, 1, 1, 1], [1, 1, 2, 2], [0, 1, 0, 1], [2, 0, 0, 0]])
    scores = scores_of(PATIENCE, nn.functional.one_hot(classes, 3).float().unbind(1))
    assert scores.tolist() == [[0, 1, 2, 3], [0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 1, 2]]


def test_the_features_of_a_learned_exit_know_no_class_by_name():
    (logits, *_), _ = prefixes(6)
    features, classes = features_of(logits, torch.tensor([0, 1, 2, 3, 0, 1]))
    turned, others = features_of(logits.roll(1, 1), torch.tensor([1, 2, 3, 0, 1, 2]))
    torch.testing.assert_close(turned, features)
    assert torch.equal(others, (classes + 1) % CLASSES)
    assert features.shape == features_of(torch.zeros(6, 2))[0].shape == (6, 5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_never_sure(bad):
    given, _ = prefixes(100)
    learned, _ = learn(given)
    broken = [logits.clone() for logits in given]
    for logits in broken[1:]:
        logits[3, 1] = bad
    broken[0][4] = math.nan
    for rule in (*SIMPLE, learned):
        scores = scores_of(rule, broken)[:, :-1]
        assert scores[3, 1:].isnan().all()
        assert scores[4, 0].isnan()
        used = students_used(scores, (-math.inf,) * 3)
        assert used[4] > 1
        assert set(used[[0, 1, 2, 3]].tolist()) == {1}
        assert students_used(scores[:, 1:], (-math.inf,) * 2)[3] == 3


# ---------------------------------------------------------------------------------- calibration


@pytest.mark.parametrize("choose", CHOICES)
@pytest.mark.parametrize("rule", SIMPLE[:3], ids=lambda rule: rule.name)
@pytest.mark.parametrize("budget", [1_200, 2_500, 5_000, 8_000, 9_800])
def test_the_mean_of_a_budget_is_met_on_the_rows_of_the_calibration(rule, choose, budget):
    given, _ = prefixes()
    policy = calibrate(rule, given, MACS, budget, choose)
    found = policy.apply(given)
    assert 0.985 * budget < found.mean_macs <= budget
    assert policy.mean_macs == pytest.approx(found.mean_macs)
    if rule is MAXIMUM:  # which costs nothing itself
        assert found.mean_macs == pytest.approx(float(torch.tensor(MACS)[found.used - 1].double().mean()))


def test_the_fractions_that_leave_are_geometric():
    scores = torch.rand(10_000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    costs = exit_costs((1, 2, 3, 4), 0)
    shares = torch.bincount(students_used(scores, budgeted_thresholds(scores, costs, 1.8)))[1:] / 10_000
    ratios = shares[1:] / shares[:-1]
    assert ratios.tolist() == pytest.approx([float(ratios[0])] * 3, abs=0.01)
    assert float(shares @ costs.float()) == pytest.approx(1.8, abs=1e-3)


def test_one_threshold_is_one():
    given, _ = prefixes()
    policy = calibrate(MARGIN, given, MACS, 4_000, one_threshold)
    assert len(set(policy.thresholds)) == 1
    assert len(set(calibrate(MARGIN, given, MACS, 4_000).thresholds)) == 3


@pytest.mark.parametrize("choose", CHOICES)
def test_tied_scores_leave_together_and_within_the_budget(choose):
    given, _ = prefixes()
    for budget in (1_000, 2_500, 4_000, 9_000):
        policy = calibrate(PATIENCE, given, MACS, budget, choose)
        assert 1_000 <= policy.mean_macs <= budget
    same = torch.full((50, 3), 0.5, dtype=torch.float64)  # all or none
    costs = exit_costs(MACS, 0)
    assert mean_cost(same, choose(same, costs, 5_000), costs) in MACS[:2]
    assert mean_cost(same, choose(same, costs, 10_000), costs) == 10_000


def test_a_threshold_lies_between_two_scores():
    scores = torch.tensor([[0.9], [0.8], [0.4], [0.2]], dtype=torch.float64)
    for choose in CHOICES:
        (threshold,) = choose(scores, exit_costs((1, 2), 0), 1.5)
        assert threshold == pytest.approx(0.6)


@pytest.mark.parametrize("choose", CHOICES)
def test_a_budget_above_all_runs_everything_and_one_below_the_first_student_is_refused(choose):
    given, _ = prefixes()
    for rule in (MAXIMUM, ENTROPY):
        found = calibrate(rule, given, MACS, 1e9, choose).apply(given)
        assert set(found.used.tolist()) == {4}
        assert torch.equal(found.logits, given[-1])
        # entropy is asked three times, and takes a multiply-accumulate a class
        assert found.mean_macs == 10_000 + 3 * CLASSES * (rule is ENTROPY)
    with pytest.raises(ConfigError, match=r"budget=999: the cheapest exits take 1000 multiply"):
        calibrate(MAXIMUM, given, MACS, 999, choose)
    with pytest.raises(ConfigError, match="cheapest exits take 1004"):  # the rule's own are not free
        calibrate(ENTROPY, given, MACS, 1_003, choose)
    given[0][7] = math.nan
    with pytest.raises(ConfigError, match="1 of 400 rows have logits that are not finite"):
        calibrate(MAXIMUM, given, MACS, 1_000, choose)


@pytest.mark.parametrize("choose", CHOICES)
def test_one_student_has_nothing_to_leave(choose):
    given, _ = prefixes(30, count=1)
    policy = calibrate(MAXIMUM, given, [1_000], 1_000, choose)
    assert policy.thresholds == ()
    logits, used, macs = policy.apply(given)
    assert torch.equal(logits, given[0])
    assert (set(used.tolist()), macs) == ({1}, 1_000)
    with pytest.raises(ConfigError, match="999"):
        calibrate(MAXIMUM, given, [1_000], 999, choose)
    with pytest.raises(ConfigError, match="needs two prefixes"):
        learn(given)


def test_what_does_not_fit_is_said_at_once():
    given, _ = prefixes(10)
    with pytest.raises(ConfigError, match=r"macs=\[3, 2\].*not falling.*\n?.*2 for 4 prefixes") as found:
        calibrate(MAXIMUM, given, [3, 2], 5)
    assert len(found.value.faults) == 2
    with pytest.raises(ConfigError, match="without rows"):
        calibrate(MAXIMUM, [logits[:0] for logits in given], MACS, 5)
    with pytest.raises(ConfigError, match="thresholds"):
        ExitPolicy(MAXIMUM, (0.5, math.nan, 0.1), MACS, CLASSES, 1.0, 1.0)
    with pytest.raises(ConfigError, match="2 for 4 prefixes"):
        ExitPolicy(MAXIMUM, (0.5, 0.1), MACS, CLASSES, 1.0, 1.0)


def test_logits_with_gradients_will_do():
    given = [logits.requires_grad_() for logits in prefixes(60)[0]]
    learned, rest = learn(given)
    found = calibrate(learned, [logits[rest] for logits in given], MACS, 5_000).apply(given)
    assert not any(value.requires_grad for value in (*found[:2], *learned.parameters()))


def test_thresholds_are_chosen_without_labels_and_without_test_rows():
    assert list(inspect.signature(calibrate).parameters) == ["rule", "prefixes", "macs", "budget", "choose"]
    for choose in CHOICES:
        assert list(inspect.signature(choose).parameters) == ["scores", "costs", "budget"]
    assert list(inspect.signature(learn).parameters) == ["prefixes", "seed"]


# ---------------------------------------------------------------------------------- the learned exit


def test_a_learned_exit_is_a_function_of_its_seed_and_disturbs_no_other_draw():
    given, _ = prefixes(200)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    (one, rest), (same, again), (other, _) = learn(given, 1), learn(given, 1), learn(given, 2)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(rest, again)
    for name, value in one.state_dict().items():
        assert torch.equal(value, same.state_dict()[name])
    assert not torch.equal(one.embed.weight, other.embed.weight)
    with torch.inference_mode():
        assert torch.equal(learn(given, 1)[0].embed.weight, one.embed.weight)


def test_its_weights_are_drawn_by_the_seed(monkeypatch):
    monkeypatch.setattr("pkd_lightning.exits.learned.FIT_STEPS", 0)
    given, _ = prefixes(40)
    assert not torch.equal(learn(given, 1)[0].embed.weight, learn(given, 2)[0].embed.weight)


def test_half_of_the_rows_train_it_and_the_other_half_calibrates(monkeypatch):
    given, _ = prefixes(201)
    seen = []
    monkeypatch.setattr(LearnedExit, "forward", lambda self, features: seen.append(features) or self.head.weight.sum())
    monkeypatch.setattr(nn.functional, "binary_cross_entropy_with_logits", lambda found, target: found)
    _, rest = learn(given)
    features = torch.stack([features_of(logits)[0] for logits in given], 1)[:, :-1, :4]  # all but agreement
    trained = {tuple(row.flatten().tolist()) for row in seen[0][..., :4]}
    others = {tuple(row.flatten().tolist()) for row in features[rest]}
    assert (len(trained), len(others)) == (100, 101)
    assert not trained & others


def test_a_learned_exit_is_better_than_chance_and_reads_the_prefixes_in_turn():
    given, _ = prefixes(1_000)
    learned, rest = learn(given)
    fresh, _ = prefixes(1_000, seed=1)
    classes = torch.stack(fresh, 1).argmax(-1)
    scores = scores_of(learned, fresh)[:, :-1]
    for t in range(3):
        agrees = classes[:, t] == classes[:, -1]
        pairs = scores[agrees, t][:, None] > scores[~agrees, t][None]
        assert pairs.double().mean() > 0.65  # the area under the curve; chance has 0.5
    features = []
    for t, logits in enumerate(fresh[:-1]):
        features.append(features_of(logits, classes[:, t - 1] if t else None)[0])
    torch.testing.assert_close(learned(torch.stack(features, 1)).double(), scores, rtol=1e-4, atol=1e-4)
    later = [logits.clone() for logits in fresh]
    later[2] = -later[2]
    assert torch.equal(scores_of(learned, later)[:, :2], scores[:, :2])  # causal
    assert sorted(set(range(1_000)) - set(rest.tolist())) != list(range(500))  # drawn, not the first half


def test_its_own_multiply_accumulates_count():
    given, _ = prefixes(200)
    learned, rest = learn(given)
    own = learned.macs(CLASSES)
    # entropy, token, Mamba block of one token, head
    assert own == CLASSES + 5 * 8 + learned.mamba.macs(1) + 8 + 5
    assert own > 300
    kept = [logits[rest] for logits in given]
    found = calibrate(learned, kept, MACS, 5_000).apply(kept)
    expected = torch.tensor(MACS)[found.used - 1] + own * found.used.clamp(max=3)
    assert found.mean_macs == pytest.approx(float(expected.double().mean()))
    assert 4_900 < found.mean_macs <= 5_000


# ---------------------------------------------------------------------------------- with an ensemble


class Student(nn.Module):
    """A linear student that notes how many inputs it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, CLASSES)
        self.asked: list[int] = []

    def forward(self, inputs: Tensor) -> Tensor:
        self.asked.append(len(inputs))
        return 3 * self.linear(inputs.flatten(1))


class Reader(Student):
    """Adds to its own logits the last student's."""

    reads = ("linear",)

    def forward(self, inputs: Tensor, earlier: tuple[Output, ...]) -> Tensor:  # type: ignore[override]
        return super().forward(inputs) + earlier[-1].features["linear"]


def ensemble_of(readers: bool) -> ProgressiveEnsemble:
    torch.manual_seed(0)
    members = [Student(), Student(), Reader() if readers else Student(), Student()]
    task = SignalClassification((1, 16), CLASSES, torch.zeros(1, 1), torch.ones(1, 1))
    return ProgressiveEnsemble(members, [(1.0, 1.0), (0.7, 0.4), (0.6, 0.8), (0.5, 1.0)], task).eval()


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(300, 1, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("readers", [False, True])
@pytest.mark.parametrize("name", ["maximum", "margin", "entropy", "patience", "learned"])
def test_the_ensemble_leaves_image_by_image_where_the_policy_says(inputs, name, readers):
    ensemble = ensemble_of(readers)
    with torch.no_grad():
        given = list(ensemble.anytime(inputs))
    rules = {rule.name: rule for rule in SIMPLE}
    rule, rows = (rules[name], torch.arange(300)) if name in rules else learn(given)
    choose = one_threshold if name == "patience" else budgeted_thresholds  # its few scores fit few fractions
    policy = calibrate(rule, [logits[rows] for logits in given], MACS, 6_000, choose)
    expected = policy.apply(given)
    assert len(expected.used.unique()) > 2  # or this would show little
    for member in ensemble.members:
        member.asked.clear()
    logits, used = ensemble.early_exit(inputs, exits=policy)
    assert torch.equal(used, expected.used)
    torch.testing.assert_close(logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert [sum(member.asked) for member in ensemble.members] == [int((used > t).sum()) for t in range(4)]


def test_the_ensemble_of_no_images_and_of_another_policy(inputs):
    ensemble = ensemble_of(False)
    given, _ = prefixes(100)
    policy = calibrate(learn(given)[0], given, MACS, 4_000)
    logits, used = ensemble.early_exit(inputs[:0], exits=policy)
    assert (logits.shape, used.shape) == ((0, CLASSES), (0,))
    found = policy.apply([logits[:0] for logits in given])
    assert (found.logits.shape, found.used.shape, found.mean_macs) == ((0, CLASSES), (0,), 0.0)
    shorter = calibrate(MAXIMUM, given[:3], MACS[:3], 4_000)
    with pytest.raises(ConfigError, match="calibrated for 3 students and 4 classes, not for 4 and 4"):
        ensemble.early_exit(inputs, exits=shorter)
    with pytest.raises(ConfigError, match="not for 3 and 4"):
        policy.apply(given[:3])
    for arguments in ({}, {"confidence": 0.5, "exits": policy}):
        with pytest.raises(ValueError, match="either confidence=P or exits=POLICY"):
            ensemble.early_exit(inputs, **arguments)


# ---------------------------------------------------------------------------------- files


@pytest.fixture
def saved(tmp_path):
    given, _ = prefixes(200)
    learned, rest = learn(given)
    policy = calibrate(learned, [logits[rest] for logits in given], MACS, 6_000)
    policy.save(tmp_path)
    return tmp_path, policy, given


def test_a_policy_comes_back_from_its_files(saved):
    directory, policy, given = saved
    never = ExitPolicy(PATIENCE, (0.5, math.inf, 2.0), MACS, CLASSES, 5_000.0, 4_321.5)
    never.save(directory, "other")
    simple, learned = ExitPolicy.load(directory, "other"), ExitPolicy.load(str(directory))
    for one, other in ((simple, never), (learned, policy)):
        assert one.rule.name == other.rule.name
        for name in ("thresholds", "macs", "num_classes", "budget", "mean_macs"):
            assert getattr(one, name) == getattr(other, name)
        assert torch.equal(one.apply(given).used, other.apply(given).used)
    assert json.loads((directory / "other.json").read_text())["thresholds"] == [0.5, None, 2.0]
    assert not (directory / "other.safetensors").exists()


@pytest.mark.parametrize("name", ["exits.json", "exits.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "noise"])
def test_a_missing_or_damaged_file_is_named(saved, name, damage):
    path = saved[0] / name
    content = path.read_bytes()
    path.write_bytes({"cut": content[: len(content) // 2], "noise": bytes(range(256))}.get(damage, b""))
    if damage == "missing":
        path.unlink()
    with pytest.raises(RunError, match=name):
        ExitPolicy.load(saved[0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rule": "guess"}, "rule='guess': must be one of maximum, margin, entropy, patience, learned"),
        ({"thresholds": [0.1]}, "does not fit the rule|1 for 4 prefixes"),
        ({"rule": "margin", "thresholds": [0.1]}, "1 for 4 prefixes"),
        ({"thresholds": "often"}, "does not describe an early exit"),
        ({"macs": [5, 4, 3, 2]}, "not falling"),
        ({"macs": []}, r"macs=\[\]"),
        ({"d_model": 6}, r"exits\.safetensors: does not fit"),
        ({"num_classes": None}, "does not describe an early exit"),
    ],
)
def test_a_file_that_does_not_describe_a_policy(saved, change, said):
    path = saved[0] / "exits.json"
    given = json.loads(path.read_text())
    given.pop("blake2b")
    path.write_text(json.dumps(given | change))
    with pytest.raises(RunError, match=said):
        ExitPolicy.load(saved[0])
    path.write_text("[]")
    with pytest.raises(RunError, match="does not describe an early exit"):
        ExitPolicy.load(saved[0])


# ---------------------------------------------------------------------------------- curves


def observed(given: list[Tensor], labels: Tensor, features: bool = True) -> Observed:
    found = Observed(labels, features)
    for logits in given:
        found.add(logits)
    return found


def test_curves_are_those_of_policies_calibrated_on_validation(monkeypatch):
    monkeypatch.setattr("pkd_lightning.matrix.CHUNK_BYTES", 16 * 4 * CLASSES)  # 16 rows at a time
    (held, held_labels), (fresh, labels) = prefixes(300), prefixes(500, seed=1)
    found = exit_results(observed(held, held_labels), observed(fresh, labels), MACS, CLASSES, seed=0)
    assert found["prefix_macs"] == list(MACS)
    learned, rest = learn(held)
    assert set(found["rules"]) == {"maximum", "margin", "entropy", "patience", "learned"}
    choices = {"budgeted": budgeted_thresholds, "one_threshold": one_threshold}
    for rule, (name, choose) in itertools.product((*SIMPLE, learned), choices.items()):
        rows = rest if rule is learned else torch.arange(300)
        points = found["rules"][rule.name][name]
        assert [point["budget"] for point in points][-4:] == [
            0.25,
            0.4,
            0.6,
            0.8,
        ]  # the least are below the first student
        for point in points:
            policy = calibrate(rule, [logits[rows] for logits in held], MACS, 10_000 * point["budget"], choose)
            logits, used, macs = policy.apply(fresh)
            assert point["validation_macs"] == pytest.approx(policy.mean_macs)
            assert point["validation_macs"] <= 10_000 * point["budget"]
            assert point["macs"] == pytest.approx(macs)
            assert point["accuracy"] == pytest.approx(float((logits.argmax(-1) == labels).double().mean()))
            assert point["students"] == pytest.approx(float(used.double().mean()))
    json.dumps(found, allow_nan=False)


@pytest.fixture
def finished(tmp_path):
    """A run's directory, as far as its early exits go, and logits of its validation rows."""
    (held, held_labels), (fresh, labels) = prefixes(300), prefixes(500, seed=1)
    found = exit_results(observed(held, held_labels), observed(fresh, labels), MACS, CLASSES, seed=0)
    (tmp_path / "students").mkdir()
    (tmp_path / "students" / "ensemble.json").write_text(json.dumps({"num_classes": CLASSES}))
    (tmp_path / "results.json").write_text(json.dumps({"exits": found}))
    return tmp_path, held


@pytest.mark.parametrize("budget", [0.25, 0.8])
@pytest.mark.parametrize("choose", CHOICES)
@pytest.mark.parametrize("rule", SIMPLE, ids=lambda rule: rule.name)
def test_what_a_run_has_calibrated_is_loaded_by_its_directory(finished, rule, choose, budget):
    directory, held = finished
    choice = "budgeted" if choose is budgeted_thresholds else "one_threshold"
    policy, expected = (
        ExitPolicy.of_run(directory, rule.name, budget, choice),
        calibrate(rule, held, MACS, 10_000 * budget, choose),
    )
    assert policy.rule is rule
    for name in ("thresholds", "macs", "num_classes", "budget", "mean_macs"):
        assert getattr(policy, name) == pytest.approx(getattr(expected, name))
    assert torch.equal(policy.apply(held).used, expected.apply(held).used)
    if (rule, choose, budget) == (MAXIMUM, budgeted_thresholds, 0.25):
        assert ExitPolicy.of_run(str(directory)).thresholds == policy.thresholds


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rule": "learned"}, "rule='learned': must be one of maximum, margin, entropy, patience"),
        ({"choice": "both"}, "choice='both': must be one of budgeted, one_threshold"),
        ({"budget": 0.3}, "budget=0.3: must be one of 0.1, 0.15, 0.25, 0.4, 0.6, 0.8"),
        ({"budget": 2_500}, "budget=2500: must be"),
    ],
)
def test_thresholds_that_a_run_has_not_are_named(finished, given, said):
    with pytest.raises(ConfigError, match=said):
        ExitPolicy.of_run(finished[0], **given)


@pytest.mark.parametrize("content", ["{}", "[]", '{"exits": {"rules": {}, "prefix_macs": [1, 2]}}', '{"exits": null}'])
def test_results_without_early_exits_are_named(finished, content):
    (finished[0] / "results.json").write_text(content)
    with pytest.raises(RunError, match=r"results\.json: has no early exits"):
        ExitPolicy.of_run(finished[0])
    (finished[0] / "results.json").unlink()
    with pytest.raises(RunError, match=r"results\.json: cannot be read"):
        ExitPolicy.of_run(finished[0])


def test_labels_of_the_test_part_change_accuracies_alone():
    (held, held_labels), (fresh, labels) = prefixes(300), prefixes(500, seed=1)
    one = exit_results(observed(held, held_labels), observed(fresh, labels), MACS, CLASSES, seed=0)
    other = exit_results(observed(held, held_labels), observed(fresh, labels.roll(1)), MACS, CLASSES, seed=0)
    assert one != other
    for found in (one, other):
        for rule in found["rules"].values():
            for point in (*rule["budgeted"], *rule["one_threshold"]):
                del point["accuracy"]
    assert one == other


def test_what_is_not_learned_is_said():
    (held, held_labels), (fresh, labels) = prefixes(30), prefixes(50, seed=1)
    found = exit_results(observed(held, held_labels), observed(fresh, labels), MACS, CLASSES, seed=0)
    assert found["not_learned"] == "30 validation rows are fewer than 40"
    assert "learned" not in found["rules"]
    (held, held_labels), plain = prefixes(60), observed(fresh, labels, features=False)
    found = exit_results(observed(held, held_labels), plain, MACS, CLASSES, seed=0)
    assert found["not_learned"] == "more than 200,000 test rows"
    one = exit_results(observed(held[:1], held_labels), observed(fresh[:1], labels), MACS[:1], CLASSES, seed=0)
    assert one["not_learned"] == "there is one student"
    assert one["rules"]["maximum"]["budgeted"] == []  # no budget pays for all of it
