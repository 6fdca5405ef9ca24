"""Prefixes against the recursion F_t = a * F_{t-1} + c * f_t, the ways to run them, and the files."""

import json
import threading

import pytest
import torch
from torch import Tensor, nn

from pkd_lightning.boosting.combine import learned, mean
from pkd_lightning.boosting.combine import sum as summed
from pkd_lightning.data.images import ImageSet
from pkd_lightning.data.module import DataConfig, DataModule
from pkd_lightning.ensemble import ProgressiveEnsemble, load_student, save_description, save_student
from pkd_lightning.errors import InputError, RunError
from pkd_lightning.models.classifier import MambaClassifier
from pkd_lightning.prefixes import mix
from pkd_lightning.tasks import ImageClassification

SHAPE, CLASSES = (2, 4, 4), 5
TASK = ImageClassification(SHAPE, CLASSES, torch.zeros(2, 1, 1), torch.ones(2, 1, 1))
MAMBA = "pkd_lightning.models.classifier.MambaClassifier"
SCALES = [(0.3, 1.5), (0.7, 0.4), (2.0, 0.1), (0.5, 3.0)]  # the first a multiplies an ensemble of nobody


class Student(nn.Module):
    """A linear student that notes how many images it was asked for, and whether with gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, CLASSES)
        self.asked: list[int] = []
        self.gradients: list[bool] = []

    def forward(self, images: Tensor) -> Tensor:
        self.asked.append(len(images))
        self.gradients.append(torch.is_grad_enabled())
        return 3 * self.linear(images.flatten(1))


def make(scales=SCALES) -> ProgressiveEnsemble:
    torch.manual_seed(0)
    return ProgressiveEnsemble([Student() for _ in scales], scales, TASK)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(40, *SHAPE, generator=torch.Generator().manual_seed(1))


def recursion(ensemble: ProgressiveEnsemble, images: Tensor, members: int) -> Tensor:
    logits = torch.zeros(len(images), CLASSES, dtype=torch.float64)
    with torch.no_grad():
        for member, (a, c) in list(zip(ensemble.members, ensemble.scales, strict=True))[:members]:
            logits = a * logits + c * member(images).double()
    return logits


# ---------------------------------------------------------------------------------- weights and prefixes


def test_mean_and_sum_are_what_they_say():
    students, rules = torch.randn(4, 6, CLASSES), {mean: torch.mean, learned: torch.mean, summed: torch.sum}
    for rule, expected in rules.items():
        prefix = None
        for t, student in enumerate(students):
            prefix = mix(prefix, student, rule.initial(t))
            torch.testing.assert_close(prefix, expected(students[: t + 1], 0))
    assert [rule.learned for rule in (mean, summed, learned)] == [False, False, True]


def test_mixing_scales_the_ensemble_by_the_first_and_the_student_by_the_second():
    ensemble, student = torch.tensor([[2.0, -1.0]]), torch.tensor([[10.0, 20.0]])
    assert mix(ensemble, student, (0.5, 3.0)).tolist() == [[31.0, 59.5]]
    assert mix(None, student, (0.5, 3.0)).tolist() == [[30.0, 60.0]]
    assert mix(ensemble, student, torch.tensor([0.5, 3.0])).tolist() == [[31.0, 59.5]]


@pytest.mark.parametrize("members", [1, 2, 3, 4, None])
def test_forward_is_the_recursion(images, members):
    ensemble = make()
    assert len(ensemble) == 4
    expected = recursion(ensemble, images, members or 4)
    torch.testing.assert_close(ensemble(images, members).double(), expected, rtol=1e-5, atol=1e-5)
    for member in ensemble.members:
        member.asked.clear()
    ensemble(images, members)
    assert [len(member.asked) for member in ensemble.members] == [1] * (members or 4) + [0] * (4 - (members or 4))


def test_anytime_yields_every_prefix_and_computes_no_student_early(images):
    ensemble = make()
    for t, logits in enumerate(ensemble.anytime(images), 1):
        assert [len(member.asked) for member in ensemble.members] == [1] * t + [0] * (4 - t)
        torch.testing.assert_close(logits.double(), recursion(make(), images, t), rtol=1e-5, atol=1e-5)
    assert t == 4
    kept = list(ensemble.anytime(images))  # later prefixes do not change the earlier ones
    torch.testing.assert_close(kept[0], ensemble(images, 1))


def test_an_image_is_done_where_it_is_just_as_sure_as_asked_for(images):
    ensemble = make()
    for member in ensemble.members:  # both of two classes as likely as each other, to the last bit
        member.linear.weight.data.zero_()
        member.linear.bias.data = torch.tensor([0.0, 0.0, -1e4, -1e4, -1e4])
    assert ensemble.early_exit(images, 0.5)[1].tolist() == [1] * len(images)
    assert ensemble.early_exit(images, 0.5 + 1e-6)[1].tolist() == [4] * len(images)


def test_the_label_predicted_is_that_of_the_data_set(images):
    ensemble = make()
    largest = ensemble(images).argmax(-1)
    assert torch.equal(ensemble.predicted(ensemble(images)), largest)
    ensemble.labels = [3, 1, 4, 15, 9]
    assert ensemble.predicted(ensemble(images)).tolist() == [[3, 1, 4, 15, 9][index] for index in largest]


@pytest.mark.parametrize("members", [1, 3, None])
@pytest.mark.parametrize("gradients", [True, False])
def test_parallel_equals_sequential(images, members, gradients):
    ensemble = make()
    with torch.set_grad_enabled(gradients):
        expected, actual = ensemble(images, members), ensemble(images, members, parallel=True)
    assert torch.equal(actual, expected)
    assert actual.requires_grad == expected.requires_grad == gradients
    used = list(ensemble.members)[:members]
    assert all(member.gradients == [gradients, gradients] for member in used)
    if gradients:
        weights = [member.linear.weight for member in used]
        ours, theirs = (torch.autograd.grad(logits.square().sum(), weights) for logits in (actual, expected))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other)


def test_parallel_in_inference_mode(images):
    ensemble = make()
    with torch.inference_mode():
        assert torch.equal(ensemble(images, parallel=True), ensemble(images))


def test_parallel_runs_the_members_at_the_same_time(images):
    ensemble = make()
    barrier = threading.Barrier(3, timeout=30)  # breaks, with an error, where one member waits for another to end

    def meet(*_: object) -> None:
        barrier.wait()

    for member in ensemble.members:
        member.register_forward_pre_hook(meet)
    ensemble(images, members=3, parallel=True)


def test_parallel_mamba_students(images):
    torch.manual_seed(0)
    students = [MambaClassifier(SHAPE, CLASSES, seq_len=16, d_model=4, n_blocks=t) for t in (1, 2, 3)]
    ensemble = ProgressiveEnsemble(students, SCALES[:3], TASK)
    with torch.no_grad():
        for _ in range(5):
            assert torch.equal(ensemble(images, parallel=True), ensemble(images))


# ---------------------------------------------------------------------------------- early exit


def test_no_confidence_needs_one_student_and_more_than_certainty_needs_all(images):
    ensemble = make()
    logits, used = ensemble.early_exit(images, 0.0)
    assert used.tolist() == [1] * len(images)
    torch.testing.assert_close(logits, ensemble(images, 1).detach())
    logits, used = ensemble.early_exit(images, 1.01)
    assert used.tolist() == [4] * len(images)
    torch.testing.assert_close(logits, ensemble(images).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("confidence", [0.6, 0.8, 0.95])
def test_each_image_stops_at_its_first_sure_prefix(images, confidence):
    ensemble = make()
    with torch.no_grad():
        prefixes = torch.stack([ensemble(images, t) for t in (1, 2, 3, 4)])
    sure = prefixes.softmax(-1).amax(-1) >= confidence
    expected = torch.tensor([next((t for t in (1, 2, 3) if sure[t - 1, i]), 4) for i in range(len(images))])
    assert len(expected.unique()) > 2  # or this would show little
    for member in ensemble.members:
        member.asked.clear()
    logits, used = ensemble.early_exit(images, confidence)
    assert torch.equal(used, expected)
    torch.testing.assert_close(logits, prefixes[expected - 1, torch.arange(len(images))], rtol=1e-5, atol=1e-5)
    # a student is asked only for the images that are still open
    assert [sum(member.asked) for member in ensemble.members] == [int((expected > t).sum()) for t in range(4)]


def test_early_exit_of_no_images(images):
    logits, used = make().early_exit(images[:0], 0.5)
    assert logits.shape == (0, CLASSES)
    assert used.shape == (0,)


# ---------------------------------------------------------------------------------- choosing a prefix


@pytest.mark.parametrize(("budget", "count"), [(10, 1), (29, 1), (30, 2), (59.9, 2), (60, 3), (100, 4), (1e9, 4)])
def test_largest_prefix_within_a_budget(budget, count):
    assert make().largest_prefix([10, 20, 30, 40], budget) == count


def test_a_budget_below_the_first_student():
    with pytest.raises(ValueError, match=r"budget=9: does not pay .* costs 10"):
        make().largest_prefix([10, 1, 1, 1], 9)
    with pytest.raises(ValueError, match="3 costs for 4 students"):
        make().largest_prefix([10, 1, 1], 9)


def test_largest_prefix_counts_millions_exactly():
    assert make().largest_prefix([16_777_216, 1, 1, 1], 16_777_216) == 1


@pytest.mark.parametrize("members", [0, 5, -1])
@pytest.mark.parametrize("parallel", [False, True])
def test_a_prefix_there_is_not(images, members, parallel):
    with pytest.raises(ValueError, match=rf"members={members}.*1 to 4"):
        make()(images, members, parallel)


@pytest.mark.parametrize(("members", "scales"), [(0, 0), (2, 3), (2, 1)])
def test_members_and_scales_must_pair(members, scales):
    students = [Student() for _ in range(members)]
    with pytest.raises(ValueError, match=f"{members} members with {scales} scales"):
        ProgressiveEnsemble(students, [(1.0, 1.0)] * scales, TASK)


# ---------------------------------------------------------------------------------- files


OPTIONS = {"seq_len": 16, "d_model": 3, "n_blocks": 2, "d_state": 4, "direction": "alternating", "head": "grid"}


def photographs(root: str | None = None) -> ImageSet:
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 200, (60, *SHAPE), generator=generator).to(torch.uint8)
    return ImageSet("photographs", images, torch.arange(60) % CLASSES, CLASSES, 40)


@pytest.fixture
def data() -> DataModule:
    return DataModule(DataConfig(photographs))


@pytest.fixture
def run(tmp_path, data):
    """A run directory with three students, and the ensemble whose files these are."""
    torch.manual_seed(4)
    students = [MambaClassifier(SHAPE, CLASSES, **OPTIONS, d_state_step=t).eval() for t in range(3)]
    for t, student in enumerate(students):
        stem = tmp_path / "students" / f"{t:02d}"
        save_student(student, stem, MAMBA, {**OPTIONS, "d_state_step": t}, SHAPE, CLASSES)
    ensemble = ProgressiveEnsemble(students, [(0.0, 1 / 3), (0.1, 0.7), (1.0, 2.0)], data.task)
    save_description(tmp_path / "students", ensemble.scales, ensemble.task)
    return tmp_path, ensemble


@pytest.mark.parametrize("folder", ["", "students"])
@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_an_ensemble_comes_back_from_its_files(run, data, folder, kind):
    directory, ensemble = run
    loaded = ProgressiveEnsemble.load(kind(directory / folder))
    assert len(loaded) == 3
    assert loaded.scales == ensemble.scales
    assert not loaded.training
    assert not any(module.training for module in loaded.modules())
    raw = data.inputs[:20]
    assert torch.equal(loaded.preprocess(raw), data.task.prepare(raw))
    with torch.no_grad():
        expected = ensemble(data.task.prepare(raw))
        assert torch.equal(loaded(loaded.preprocess(raw)), expected)
        assert torch.equal(loaded(loaded.preprocess(raw), 2), ensemble(data.task.prepare(raw), 2))


def test_preprocessing_leaves_the_images_as_they_were(run, data):
    _, ensemble = run
    raw = data.inputs[:5].clone()
    ensemble.preprocess(raw)
    assert torch.equal(raw, data.inputs[:5])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda raw: raw.float() / 255, "torch.float32 of (5, "),
        (lambda raw: raw.movedim(1, -1), "torch.uint8 of (5, "),
        (lambda raw: raw[0], "torch.uint8 of "),
        (lambda raw: raw.numpy(), "are a ndarray"),
    ],
)
def test_what_is_no_batch_of_images_as_they_are_is_not_preprocessed(change, said, run, data):
    _, ensemble = run
    with pytest.raises(InputError, match=r"expected a tensor of torch.uint8 .* ensemble.predict reads others") as error:
        ensemble.preprocess(change(data.inputs[:5]))
    assert said in str(error.value)


def test_a_student_comes_back_with_its_options(run):
    directory, ensemble = run
    student = load_student(directory / "students" / "01")
    assert isinstance(student, MambaClassifier)
    assert not student.training
    assert student.config == ensemble.members[1].config
    for name, value in ensemble.members[1].state_dict().items():
        assert torch.equal(student.state_dict()[name], value)
    described = json.loads((directory / "students" / "01.json").read_text())
    assert described["input_shape"] == list(SHAPE)
    assert described["options"]["d_state_step"] == 1


def test_a_shorter_list_of_scales_loads_the_first_students(run):
    directory, ensemble = run
    shorter = ProgressiveEnsemble.from_students(directory / "students", ensemble.scales[:2], ensemble.task)
    images = torch.randn(3, *SHAPE)
    torch.testing.assert_close(shorter(images), ensemble(images, 2))


@pytest.mark.parametrize("name", ["ensemble.json", "00.json", "02.json", "00.safetensors", "02.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "noise"])
def test_a_missing_or_damaged_file_is_named(run, name, damage):
    directory, _ = run
    path = directory / "students" / name
    content = path.read_bytes()
    path.write_bytes({"cut": content[: len(content) // 2], "noise": bytes(range(256))}.get(damage, b""))
    if damage == "missing":
        path.unlink()
    with pytest.raises(RunError, match=name):
        ProgressiveEnsemble.load(directory)


def test_weights_of_another_model_are_refused(run):
    directory, _ = run
    students = directory / "students"
    (students / "01.safetensors").write_bytes((students / "02.safetensors").read_bytes())
    with pytest.raises(RunError, match=r"01\.safetensors"):
        ProgressiveEnsemble.load(directory)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("ensemble.json", "{}"),
        ("ensemble.json", "[]"),
        ("01.json", "{}"),
        ("01.json", '{"model": "no.such.Module", "image_shape": [2, 4, 4], "num_classes": 5, "options": {}}'),
    ],
)
def test_json_that_does_not_describe_a_student_is_damaged_too(run, name, content):
    directory, _ = run
    (directory / "students" / name).write_text(content)
    with pytest.raises(RunError, match=name):
        ProgressiveEnsemble.load(directory)


def test_two_students_whose_names_have_a_point(tmp_path):
    first, second = (MambaClassifier(SHAPE, CLASSES, seq_len=16, d_model=3) for _ in range(2))
    for student, name in ((first, "student-1.0"), (second, "student-1.1")):
        save_student(student, tmp_path / name, MAMBA, {"seq_len": 16, "d_model": 3}, SHAPE, CLASSES)
    assert torch.equal(load_student(tmp_path / "student-1.0").head.weight, first.head.weight)
