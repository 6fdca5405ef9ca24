"""Compiled ensembles: the same logits as eager ones, and what there is no kernel for."""

import copy
import logging
import pickle
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from pkd_lightning import pretrained
from pkd_lightning.compiled import FILLED, CompiledStudent
from pkd_lightning.ensemble import ProgressiveEnsemble
from pkd_lightning.kernels.inference import STEPS
from pkd_lightning.kernels.lanes import WIDTH
from pkd_lightning.models.classifier import MambaClassifier
from pkd_lightning.packing import Weights, batch_plan_of, plan_of
from pkd_lightning.tasks import ImageClassification

PATCHES = {"tokeniser": "patches", "patch_size": 3, "patch_stride": 1}
STEM = {"tokeniser": "convolutions", "patch_size": 3, "stem_channels": 5}
CASES = {
    "pixels of one channel": {"seq_len": 64, "d_state": 58},
    "pixels, embedded": {"seq_len": 16, "d_model": 5, "norm": "rms"},
    "pixels of all channels": {"seq_len": 48, "d_model": 3, "pixel_channels": "all", "n_blocks": 2},
    "patches": {**PATCHES, "d_model": 8, "norm": "rms", "head": "grid"},
    "patches without residual": {**PATCHES, "d_model": 20, "residual": False, "norm": "layer", "head": "mean"},
    "patches by all orders": {**PATCHES, "d_model": 4, "n_blocks": 5, "direction": "cross", "head": "grid"},
    "patches and back": {**PATCHES, "d_model": 4, "n_blocks": 2, "direction": "alternating"},
    "shared weights": {**PATCHES, "d_model": 6, "n_blocks": 3, "shared": True, "direction": "cross", "norm": "rms"},
    "convolutions": {**STEM, "d_model": 18, "norm": "rms", "head": "mean"},
    "convolutions, padded": {**STEM, "padding": True, "stem_channels": 17, "d_model": 33, "head": "grid"},
    "blocks between the convolutions": {**STEM, "stem_blocks": 5, "d_model": 6, "norm": "rms", "direction": "cross",
                                        "padding": True, "head": "grid", "n_blocks": 2},
    "wide blocks between, shared": {**STEM, "stem_channels": 18, "stem_blocks": 2, "d_model": 4, "norm": "layer",
                                    "shared": True, "direction": "alternating", "head": "mean", "n_blocks": 3},
    "blocks between without a norm": {**STEM, "stem_blocks": 1, "d_model": 17, "padding": True, "patch_stride": 1},
    "local convolutions": {**PATCHES, "d_model": 18, "local_conv": 3, "n_blocks": 3, "norm": "rms", "head": "mean"},
    "local convolutions on both rasters": {**STEM, "stem_blocks": 2, "d_model": 9, "local_conv": 5, "n_blocks": 2,
                                           "norm": "rms", "padding": True, "direction": "cross", "head": "mean"},
    "local, more than the raster": {**PATCHES, "patch_size": 4, "patch_stride": 4, "d_model": 5, "local_conv": 7},
    "one state": {**PATCHES, "d_model": 8, "d_state": 1},
    "odd states": {**PATCHES, "d_model": 8, "d_state": 5, "d_state_step": 2, "n_blocks": 2},
    "more states than channels": {**PATCHES, "d_model": 2, "expand": 1, "d_state": 40},
    "no convolution to speak of": {**PATCHES, "d_model": 3, "d_conv": 1},
    "wide convolution, rank": {**PATCHES, "d_model": 3, "d_conv": 7, "dt_rank": 5, "expand": 3},
}  # fmt: skip


def model(shape=(3, 8, 8), classes=10, seed=0, **options):
    torch.manual_seed(seed)
    made = MambaClassifier(shape, classes, **options).eval()
    for parameter in made.parameters():  # norms and skips too
        nn.init.uniform_(parameter, -0.5, 0.5)
    return made


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def task(shape=(3, 8, 8), classes=10):
    return ImageClassification(shape, classes, torch.zeros(shape[0], 1, 1), torch.ones(shape[0], 1, 1))


def ensemble(count=3, **options):
    members = [model(seed=seed, **{**PATCHES, "d_model": 4 + seed, **options}) for seed in range(count)]
    return ProgressiveEnsemble(members, [(0.5, 1.0), (0.75, 0.5), (1.0, 2.0)][:count], task())


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@torch.inference_mode()
def test_a_compiled_student_gives_the_logits_of_the_student(options):
    student, images = model(**options), torch.randn(3, 3, 8, 8)
    close(CompiledStudent(student, (3, 8, 8))(images), student(images))


@torch.inference_mode()
def test_sequences_longer_than_a_chunk_carry_their_state():
    shape = (1, 20, 14)  # more rows than columns
    assert 3 * STEPS < 18 * 12
    student = model(shape, **PATCHES, d_model=4, n_blocks=4, direction="cross", norm="rms", d_state=3)
    images = torch.randn(2, *shape)
    close(CompiledStudent(student, shape)(images), student(images))


@torch.inference_mode()
def test_signals_and_more_classes_than_a_vector():
    student = model((2, 24), 37, seq_len=12, d_model=3)
    signals = torch.randn(4, 2, 24)
    close(CompiledStudent(student, (2, 24))(signals), student(signals))


@torch.inference_mode()
def test_large_step_sizes_and_inputs_stay_finite():
    student, images = model(**PATCHES, d_model=8, norm="rms"), 1e4 * torch.randn(2, 3, 8, 8)
    close(CompiledStudent(student, (3, 8, 8))(images), student(images))


@pytest.mark.parametrize("members", [1, 2, 3, None])
@torch.inference_mode()
def test_every_prefix_is_that_of_the_ensemble(members):
    made, images = ensemble(), torch.randn(5, 3, 8, 8)
    close(made.compiled()(images, members), made(images, members))


@torch.inference_mode()
def test_a_compiled_ensemble_is_used_as_any_other():
    made, images = ensemble(), torch.randn(20, 3, 8, 8)
    compiled = made.compiled()
    for found, expected in zip(compiled.anytime(images), made.anytime(images), strict=True):
        close(found, expected)
    (found, used), (expected, steps) = compiled.early_exit(images, 0.4), made.early_exit(images, 0.4)
    assert used.tolist() == steps.tolist()
    assert len(set(used.tolist())) > 1
    close(found, expected)
    close(compiled.compiled()(images), made(images))
    assert compiled.labels == made.labels
    with pytest.raises(ValueError, match="prefixes of 1 to 3"):
        compiled(images, 4)


@torch.inference_mode()
@pytest.mark.parametrize("count", [8, 50])
def test_threads_share_the_images(monkeypatch, count):
    monkeypatch.setattr("pkd_lightning.kernels.threads.WORTHWHILE", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    made, images = ensemble(), torch.randn(count, 3, 8, 8)
    close(made.compiled()(images), made(images))


@torch.inference_mode()
def test_copies_outlive_what_they_were_copied_from():
    made, images = ensemble(), torch.randn(2, 3, 8, 8)
    expected, compiled = made(images), made.compiled()
    copies = [copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled)), copy.deepcopy(compiled.members[0])]
    for kept in compiled.members:
        kept.weights.fill_(float("nan"))
    close(copies[0](images), expected)
    close(copies[1](images), expected)
    close(copies[2](images), made.members[0](images))


@torch.inference_mode()
def test_weights_are_copies():
    made, images = ensemble(), torch.randn(2, 3, 8, 8)
    expected, compiled = made(images), made.compiled()
    for parameter in made.parameters():
        parameter.zero_()
    close(compiled(images), expected)


@pytest.mark.parametrize("count", [3, 16])
def test_no_image_no_logits_and_a_bad_image_stays_alone(count):
    made = ensemble()
    compiled = made.compiled()
    assert compiled(torch.empty(0, 3, 8, 8)).shape == (0, 10)
    images = torch.randn(count, 3, 8, 8)
    images[1, 0, 4, 4] = float("nan")
    found, others = compiled(images), torch.arange(count) != 1
    assert found[1].isnan().any()
    close(found[others], made(images)[others].detach())
    assert not found.requires_grad


@pytest.mark.parametrize(
    "images",
    [torch.zeros(2, 3, 8, 7), torch.zeros(3, 8, 8), torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
     torch.zeros(2, 3, 8, 8, device="meta")],
    ids=["size", "one", "type", "device"],
)  # fmt: skip
def test_other_images_are_refused_with_what_is_expected(images):
    with pytest.raises(ValueError, match=r"reads preprocessed images \(batch, 3, 8, 8\) of floating point on the CPU"):
        ensemble().compiled()(images)


@torch.inference_mode()
def test_images_of_any_strides_and_precision():
    made, images = ensemble(), torch.randn(4, 8, 8, 3).permute(0, 3, 1, 2)
    expected = made(images)
    close(made.compiled()(images), expected)
    close(made.compiled()(images.double()), expected)


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(192, 10)

    def forward(self, images):
        return self.layer(images.flatten(1))


def hooked(student):
    student.blocks[0].mixer.register_forward_hook(lambda *_: None)


def replaced(student):
    student.head = nn.Sequential(student.head)


def unbiased(student):
    student.head.bias = None


def depthwise(student):
    student.blocks[0].mixer = nn.Identity()


def hook(place):
    return lambda student: student.get_submodule(place).register_forward_hook(lambda *_: None)


def mixing_otherwise(student):
    student.blocks[0].mixer.mix = lambda xz: xz[..., :5]


def without_residual(student):
    student.blocks[0].residual = False


def another_norm(place, norm):
    return lambda student: setattr(student.get_submodule(place), "norm", norm)


def local(**options):
    return lambda student: setattr(student.blocks[0], "local", nn.Conv2d(5, 5, 3, **{"padding": 1, **options}))


def between(student):
    options = {"stem_channels": 3, "stem_blocks": 1, "patch_size": 3, "padding": True}
    student.tokens = MambaClassifier((3, 8, 8), 10, tokeniser="convolutions", d_model=5, **options).tokens
    student.tokens.between = nn.Tanh()
    student.head = nn.Linear(20, 10)


def convolving(**options):
    return lambda student: setattr(student.tokens, "project", nn.Conv2d(3, 5, 3, **options))


@pytest.mark.parametrize(
    ("change", "reason"),
    [(hooked, "the mixer Mamba, which is not as it was built"), (replaced, "a Sequential that is no plain Linear"),
     (unbiased, "a head without a bias"),
     (depthwise, "the mixer Identity"),
     (mixing_otherwise, "the mixer Mamba, which is not as it was built"),
     (hook(""), "a MambaClassifier that is no plain MambaClassifier"),
     (hook("tokens"), "a tokeniser with hooks"),
     (hook("tokens.project"), "a Conv2d that is no plain Conv2d"),
     (hook("blocks.0"), "a block that is not as it was built"),
     (without_residual, "a block that is not as it was built"), (local(groups=1), "a local convolution that is not"),
     (local(groups=5, padding_mode="circular"), "a local convolution that is not as it was built"),
     (between, "a Tanh between the convolutions that is no plain StemBlocks"),
     (hook("blocks.0.norm"), "a Identity that is no plain Identity"),
     (hook("norm"), "a Identity that is no plain Identity"),
     (another_norm("", nn.RMSNorm(5)), "a RMSNorm that is no plain Identity"),
     (another_norm("blocks.0", nn.LayerNorm(5)), "a LayerNorm that is no plain Identity"),
     (another_norm("blocks.0", nn.Softmax(-1)), "a Softmax that is no plain Identity"),
     (convolving(bias=False), "a Conv2d without a bias"),
     (convolving(padding=1, dilation=2), "a Conv2d that is not as it was built"),
     (convolving(padding=1, dilation=2, padding_mode="circular"), "a Conv2d that is not as it was built")],
)  # fmt: skip
@torch.inference_mode()
def test_a_student_without_a_kernel_is_called_as_it_is(change, reason, caplog):
    made, images = ensemble(), torch.randn(2, 3, 8, 8)
    change(made.members[1])
    with caplog.at_level(logging.INFO):
        compiled = made.compiled()
    assert f"student 2 is not compiled: {reason}" in caplog.text
    kinds = [type(member) for member in compiled.members]
    assert kinds == [CompiledStudent, MambaClassifier, CompiledStudent]
    for members in (1, 2, 3):
        close(compiled(images, members), made(images, members))


@torch.inference_mode()
def test_a_student_elsewhere_than_on_the_cpu_or_with_an_embedding_of_ones_own_is_not_compiled():
    with pytest.raises(ValueError, match="no plain Conv2d on the CPU"):
        CompiledStudent(model(**PATCHES).to("meta"), (3, 8, 8))
    student, images = model(seq_len=16), torch.randn(2, 3, 8, 8)
    student.tokens.embed = nn.Linear(1, 1)
    close(CompiledStudent(student, (3, 8, 8))(images), student(images))
    student.tokens.embed = nn.Tanh()
    with pytest.raises(ValueError, match="a Tanh that is no plain Linear"):
        CompiledStudent(student, (3, 8, 8))


@torch.inference_mode()
def test_an_ensemble_of_other_models_works_the_same():
    made, images = ProgressiveEnsemble([Linear()], [(0.0, 1.0)], task()), torch.randn(2, 3, 8, 8)
    close(made.compiled()(images), made(images))


@torch.inference_mode()
def test_the_published_models():
    made, teacher = pretrained.load("mnist")
    images = torch.randn(3, 1, 28, 28)
    close(made.compiled()(images), made(images))
    close(CompiledStudent(teacher, (1, 28, 28))(images), teacher(images))


def test_a_compiled_ensemble_predicts_and_costs_the_same():
    made = ensemble()
    images = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8)
    found, expected = made.compiled().predict(images, budget_macs=10**9), made.predict(images, budget_macs=10**9)
    assert found.macs.tolist() == expected.macs.tolist()
    close(found.logits, expected.logits)


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@torch.inference_mode()
def test_a_batch_gives_the_logits_of_the_student(options):
    student, images = model(**options), torch.randn(19, 3, 8, 8)  # a whole group, and three by themselves
    close(CompiledStudent(student, (3, 8, 8))(images), student(images))


# shape and options of students whose working memory is that of one of their parts
ROOMS = {
    "block": ((3, 11, 11), {**PATCHES, "d_model": 17, "expand": 1, "d_state": 32, "d_conv": 7}),
    "stem": ((3, 48, 48), {**STEM, "padding": True, "stem_channels": 17, "d_model": 2}),
    "head": ((1, 64, 64), {"seq_len": 4096, "d_model": 5}),
    "blocks between": ((3, 48, 48), {**STEM, "stem_blocks": 1, "stem_channels": 17, "d_model": 2, "norm": "rms"}),
    "local convolution": ((3, 40, 40), {**PATCHES, "d_model": 33, "expand": 1, "d_state": 1, "local_conv": 3,
                                        "head": "mean"}),
    "local between": ((1, 70, 70), {**STEM, "stem_blocks": 1, "stem_channels": 2, "d_model": 2, "expand": 1,
                                    "d_state": 1, "local_conv": 3, "norm": "rms", "head": "mean"}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "options"), [*(((3, 8, 8), options) for options in CASES.values()), *ROOMS.values()], ids=[*CASES, *ROOMS]
)
@torch.inference_mode()
def test_the_kernels_write_nothing_beyond_their_working_memory(shape, options, monkeypatch):
    student, guard, used = model(shape, **options), 12345.0, []
    _, of_one = plan_of(student, shape, Weights(WIDTH))
    _, of_batch = batch_plan_of(student, shape, Weights(1))

    @contextmanager
    def guarded(room):
        own = (of_one if used else of_batch) + 10 * WIDTH  # and the prefix's logits
        used.append(room)
        space = torch.full((own + 2**15,), guard)
        yield space.data_ptr()
        assert own <= room
        assert (space[own:] == guard).all()

    monkeypatch.setattr("pkd_lightning.compiled._space", guarded)
    CompiledStudent(student, shape)(torch.randn(16 + 1, *shape))
    assert len(used) == 2


@pytest.mark.parametrize("count", [1, FILLED - 1, FILLED, 15, 16, 17, 16 + FILLED - 1, 16 + FILLED, 33])
@torch.inference_mode()
def test_batches_of_every_size(count):
    made, images = ensemble(), torch.randn(count, 3, 8, 8)
    close(made.compiled()(images), made(images))
