"""The split, the batches with their sample indices, and the order, on images whose pixels say which sample they are."""

import json
import math
import re
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pkd_lightning.assembling import assemble
from pkd_lightning.data.images import ImageSet
from pkd_lightning.data.module import BatchDataset, DataConfig, DataModule
from pkd_lightning.ensemble import ProgressiveEnsemble
from pkd_lightning.errors import ConfigError, DataError
from pkd_lightning.fitting import predict
from pkd_lightning.run import run
from pkd_lightning.rundir import RunDirectory
from pkd_lightning.weights import load_weights
from tests.support import patterns, tiny_config

CLASSES = 7


def numbered(root: str | None = None, samples: int = 100, train_size: int | None = None) -> ImageSet:
    """Sample n has n in its four pixels, in base 256, and n % CLASSES as its label."""
    n = torch.arange(samples)
    images = torch.stack([n // 256**k % 256 for k in range(4)], dim=1).to(torch.uint8).reshape(samples, 1, 2, 2)
    return ImageSet("numbered", images, n % CLASSES, CLASSES, samples * 6 // 7 if train_size is None else train_size)


def numbers(images: Tensor) -> Tensor:
    """Which sample each uint8 image is."""
    return (images.flatten(1).long() * 256 ** torch.arange(4)).sum(1)


def module(samples: int = 100, train_size: int | None = None, **options: object) -> DataModule:
    return DataModule(DataConfig(source=partial(numbered, samples=samples, train_size=train_size), **options))


def parts(data: DataModule) -> list[Tensor]:
    """The source's sample numbers of training, validation and test."""
    return [numbers(data.inputs[rows.start : rows.stop]) for rows in (data.training, data.validation, data.test)]


def batches(data: DataModule, epoch: int = 0, seed: int = 0, stage: str = "teacher", workers: int = 0, size: int = 16):
    loader = data.training_loader(size, seed, stage, workers)
    loader.sampler.set_epoch(epoch)
    return list(loader)


def order(*args: object, **kwargs: object) -> list[int]:
    return torch.cat([batch.index for batch in batches(*args, **kwargs)]).tolist()


def add_noise(images: Tensor, generator: torch.Generator) -> Tensor:
    return images + torch.randint(1, 200, images.shape, generator=generator).to(torch.uint8)


# ---------------------------------------------------------------------------------- split


@pytest.mark.parametrize(
    ("samples", "pool", "test"), [(70_000, 49_000, 21_000), (60_000, 42_000, 18_000), (10, 7, 3), (1797, 1257, 540)]
)
def test_the_papers_split_sizes(samples, pool, test):
    data = module(samples)
    training, validation, tested = data.sizes
    assert (training + validation, tested) == (pool, test)
    assert abs(validation - pool / 10) <= 1
    assert (len(data.training), len(data.validation), len(data.test)) == data.sizes
    everything = torch.cat(parts(data))
    assert torch.equal(everything.sort().values, torch.arange(samples))  # disjoint and complete
    assert torch.equal(data.labels, everything % CLASSES)


@pytest.mark.parametrize("percent", range(1, 100, 3))
def test_a_split_in_whole_percents_is_exact(percent):
    # where 10000 * (1 - 0.34) is 6599.999999999999
    assert module(10_000, test_fraction=percent / 100).sizes[2] == 100 * percent


@pytest.mark.parametrize("split", ["paper", "official"])
def test_parts_are_drawn_at_random_as_a_function_of_the_split_seed_alone(split):
    results = []
    for global_seed, split_seed in [(0, 0), (1, 0), (0, 1)]:
        torch.manual_seed(global_seed)
        results.append(parts(module(700, split=split, split_seed=split_seed)))
    first, same, other = results
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert set(first[1].tolist()) != set(other[1].tolist())
    if split == "paper":
        assert set(first[2].tolist()) != set(other[2].tolist())
    for part in first[:2]:  # not a block of the source's samples, which may be sorted by class
        assert len(set((part % CLASSES).tolist())) == CLASSES
        assert part.max() - part.min() > 500


def test_the_runs_seed_moves_no_sample_between_the_parts():
    data = module(100)
    assert set(order(data, seed=0)) == set(order(data, seed=1)) == set(data.training)


@pytest.mark.parametrize("limit", [None, 40])
def test_the_official_split_keeps_the_test_part_of_the_source(limit):
    data = module(100, train_size=80, split="official", validation_fraction=0.25, limit=limit)
    training, validation, test = parts(data)
    assert torch.cat([training, validation]).max() < 80
    assert test.min() >= 80
    if limit is None:
        assert data.sizes == (60, 20, 20)
        assert test.sort().values.tolist() == list(range(80, 100))
    else:
        assert sum(data.sizes) == limit


def test_limit_takes_a_random_subset():
    data = module(1000, limit=100)
    chosen = torch.cat(parts(data))
    assert data.sizes == (63, 7, 30)
    assert len(chosen.unique()) == 100
    assert chosen.max() > 500
    assert len(module(50, limit=10_000).labels) == 50


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        ({"limit": 1}, "training, validation"),
        ({"samples": 5, "validation_fraction": 0.01}, "validation"),
        ({"samples": 10, "validation_fraction": 0.99}, "training"),
        ({"samples": 10, "train_size": 10, "split": "official"}, "test"),
        ({"samples": 10, "train_size": 0, "split": "official"}, "training, validation"),
        ({"samples": 10, "test_fraction": 0.999}, "training, validation"),
    ],
)
def test_a_part_without_samples_is_a_configuration_error(options, missing):
    with pytest.raises(ConfigError, match=f"no sample is left for {missing}$"):
        module(**options)


def test_every_bad_value_is_named_at_once():
    with pytest.raises(ConfigError) as caught:
        DataConfig(numbered, split="papr", test_fraction=1.0, validation_fraction=0, split_seed=-1, limit=0)
    names = [fault.split("=")[0] for fault in caught.value.faults]
    assert sorted(names) == ["limit", "split", "split_seed", "test_fraction", "validation_fraction"]
    assert "Did you mean 'paper'" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("test_fraction", math.nan),
        ("test_fraction", 0.0),
        ("test_fraction", "0.3"),
        ("validation_fraction", 1),
        ("split_seed", 0.5),
        ("split_seed", True),
        ("limit", 1.5),
        ("split", None),
        ("copies", -1),
        ("copies", 1.5),
        ("empty_classes", "drop"),
        ("copies", 3),  # without `augment`
    ],
)
def test_one_bad_value(name, value):
    with pytest.raises(ConfigError, match=f"^the configuration has 1 fault.*\n  - {name}="):
        DataConfig(numbered, **{name: value})


# ---------------------------------------------------------------------------------- batches


def test_batches_carry_the_row_the_image_and_the_label_of_each_sample():
    data = module(300)
    seen = batches(data)
    assert [len(batch.index) for batch in seen] == [16] * (len(data.training) // 16) + [len(data.training) % 16]
    assert len(data.training_loader(16, 0, "teacher")) == len(seen)
    for batch in seen:
        index, images, labels = batch
        assert index is batch.index
        assert (index.dtype, images.dtype, labels.dtype) == (torch.int64, torch.float32, torch.int64)
        pixels = (images * data.task.std + data.task.mean) * 255
        assert torch.equal(numbers(pixels.round()), numbers(data.inputs[index]))
        assert torch.equal(labels, numbers(pixels.round()) % CLASSES)


@pytest.mark.parametrize("part", ["training", "validation", "test"])
def test_plain_loaders_go_through_their_rows_in_order(part):
    data = module(100, augment=add_noise)
    rows = getattr(data, part)
    seen = list(data.loader(rows, 16))
    assert torch.cat([batch.index for batch in seen]).tolist() == list(rows)
    images = torch.cat([batch.inputs for batch in seen])
    assert torch.equal(images, data.task.prepare(data.inputs[rows.start : rows.stop]))  # never augmented


def test_each_epoch_is_another_permutation_of_the_training_rows():
    data = module(300)
    orders = [order(data, epoch) for epoch in range(3)]
    for one in orders:
        assert sorted(one) == list(data.training)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert list(data.training) not in orders


def test_the_order_is_a_function_of_seed_stage_and_epoch_alone():
    data = module(300)
    torch.manual_seed(0)
    base = order(data, epoch=2, seed=1, stage="round-01")
    torch.manual_seed(99)
    torch.rand(5)
    assert order(module(300), epoch=2, seed=1, stage="round-01") == base
    assert order(data, epoch=2, seed=1, stage="round-01", size=7) == base
    others = [order(data, epoch=3, seed=1, stage="round-01"), order(data, epoch=2, seed=2, stage="round-01")]
    others.append(order(data, epoch=2, seed=1, stage="round-02"))
    assert base not in others
    # an epoch does not depend on the ones before it: a resumed run continues with the order it would have had
    loader = data.training_loader(16, 1, "round-01")
    for epoch in (0, 1, 2):
        loader.sampler.set_epoch(epoch)
        last = torch.cat([batch.index for batch in loader]).tolist()
    assert last == base


def test_workers_deliver_the_same_batches():
    data = module(100, augment=add_noise)
    loader = data.training_loader(16, 3, "teacher", num_workers=2)
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)
        ours, theirs = list(loader), batches(data, epoch, seed=3)
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("augment", [None, add_noise])
def test_a_group_of_batches_equals_the_batches_one_by_one(augment):
    data = module(100, augment=augment)
    keys = list(data.training_loader(16, 0, "teacher").sampler)
    dataset = BatchDataset(data)
    stored = data.inputs.clone()
    for some in (keys, keys[-1:], keys[1:3]):
        group = dataset.__getitems__(some)
        assert len(group) == len(some)
        for k, key in enumerate(some):
            assert all(torch.equal(a, b) for a, b in zip(group[k], dataset[key], strict=True))
            group[k].inputs.fill_(math.nan)  # each batch is the trainer's own: neither its neighbours
    assert torch.equal(data.inputs, stored)  # nor the stored images change with it


# ---------------------------------------------------------------------------------- normalisation, augmentation


def colours(root: str | None = None) -> ImageSet:
    """Three channels of different statistics; the second is constant in the training part and everywhere."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (200, 3, 4, 4), generator=generator)
    images[:, 1] = 77
    images[:, 2] = images[:, 2] // 4 + 100
    return ImageSet("colours", images.to(torch.uint8), torch.arange(200) % 2, 2, 100)


def test_training_pixels_have_mean_zero_and_deviation_one():
    data = DataModule(DataConfig(colours))
    assert data.task.input_shape == (3, 4, 4)
    pixels = torch.cat([batch.inputs for batch in batches(data)]).double().transpose(0, 1).flatten(1)
    assert pixels.mean(1)[[0, 2]].abs().max() < 1e-6
    assert (pixels.std(1, correction=0)[[0, 2]] - 1).abs().max() < 1e-6
    # of the training rows, not of all: these differ in a sample this small
    everything = data.task.prepare(data.inputs).double().transpose(0, 1).flatten(1)
    assert everything.mean(1)[[0, 2]].abs().min() > 1e-4
    direct = data.inputs[: data.sizes[0]].double().transpose(0, 1).flatten(1) / 255
    torch.testing.assert_close(data.task.mean.flatten().double(), direct.mean(1), rtol=1e-6, atol=0)


def test_normalised_pixels_are_those_of_the_definition():
    data = DataModule(DataConfig(colours))
    levels = torch.arange(256, dtype=torch.uint8).expand(3, -1)[None, :, None]
    direct = (levels.double() / 255 - data.task.mean.double()) / data.task.std.double()
    ours = data.task.prepare(levels)[:, [0, 2]]  # the constant channel has no scale
    torch.testing.assert_close(ours.double(), direct[:, [0, 2]], rtol=1e-6, atol=1e-6)


def test_a_constant_channel_stays_finite_and_small():
    data = DataModule(DataConfig(colours))
    images = data.task.prepare(data.inputs)
    assert images.isfinite().all()
    assert images[:, 1].abs().max() < 1


def test_augmentation_is_in_the_training_loader_only_and_reproducible():
    plain, noisy = module(100), module(100, augment=add_noise)
    stored = noisy.inputs.clone()
    first, again, later, other = (
        batches(noisy), batches(noisy), batches(noisy, epoch=1), batches(noisy, stage="round-00")
    )  # fmt: skip
    assert order(noisy) == order(plain)  # augmentation does not change the order
    for one, other_time in zip(first, again, strict=True):
        assert torch.equal(one.inputs, other_time.inputs)
    for one, clean in zip(first, batches(plain), strict=True):
        assert (one.inputs != clean.inputs).all()
    assert torch.equal(noisy.inputs, stored)
    assert torch.equal(noisy.task.mean, plain.task.mean)  # the statistics are those of the images as they are

    def noise(seen: list) -> Tensor:
        """What was added to each sample, in the order of the batches."""
        index = torch.cat([batch.index for batch in seen])
        pixels = ((torch.cat([batch.inputs for batch in seen]) * noisy.task.std + noisy.task.mean) * 255).round().long()
        return ((pixels - stored[index].long()) % 256).flatten(1)

    draws = [noise(seen) for seen in (first, later, other)]
    assert all((draw > 0).all() for draw in draws)
    for one, another in [(0, 1), (0, 2), (1, 2)]:  # a new draw for each epoch and stage,
        assert not torch.equal(draws[one][:16], draws[another][:16])
    assert not torch.equal(draws[0][:16], draws[0][16:32])  # and for each step


# ---------------------------------------------------------------------------------- copies


def test_copies_are_further_training_rows_and_move_no_image_between_the_parts():
    plain, data = module(700), module(700, augment=add_noise, copies=2)
    n, validation, test = plain.sizes
    assert data.sizes == (3 * n, validation, test)
    assert data.originals == plain.originals == n
    assert (data.training, data.validation) == (range(3 * n), range(3 * n, 3 * n + validation))
    for rows, same in [(range(n), plain.training), (data.validation, plain.validation), (data.test, plain.test)]:
        assert torch.equal(data.inputs[rows.start : rows.stop], plain.inputs[same.start : same.stop])
        assert torch.equal(data.labels[rows.start : rows.stop], plain.labels[same.start : same.stop])
    assert torch.equal(data.labels[: 3 * n], plain.labels[:n].repeat(3))
    noise = (data.inputs[n : 3 * n].long() - plain.inputs[:n].long().repeat(2, 1, 1, 1)) % 256
    assert ((noise >= 1) & (noise < 200)).all()  # each is its own original, augmented
    assert len(noise.flatten(1).unique(dim=0)) > 2 * n - 5  # and each anew
    assert torch.equal(data.task.mean, plain.task.mean)
    assert torch.equal(data.task.std, plain.task.std)


def test_copies_are_a_function_of_the_split_seed_alone():
    results = []
    for global_seed in (0, 1):
        torch.manual_seed(global_seed)
        results.append(module(300, augment=add_noise, copies=2))
    first, same = results
    more, other = module(300, augment=add_noise, copies=3), module(300, augment=add_noise, copies=2, split_seed=1)
    assert torch.equal(first.inputs, same.inputs)
    assert first.fingerprint == same.fingerprint
    n = first.originals
    assert torch.equal(more.inputs[: 3 * n], first.inputs[: 3 * n])
    noises = [(data.inputs[n : 2 * n].long() - data.inputs[:n].long()) % 256 for data in (first, other)]
    assert not torch.equal(*noises)


def test_the_fingerprint_covers_the_copies():
    plain, data = module(100), module(100, augment=add_noise, copies=1)
    changed = module(100, augment=add_noise, copies=1)
    changed.inputs[2 * changed.originals - 1] += 1  # the last copy
    assert len({plain.fingerprint, data.fingerprint, changed.fingerprint}) == 3
    # augmentation of batches is not part of the data
    assert module(100, augment=add_noise).fingerprint == plain.fingerprint


def test_batches_of_copies_are_the_stored_images():
    data = module(100, augment=add_noise, copies=2)
    for epoch in (0, 1):
        seen = batches(data, epoch)
        assert sorted(torch.cat([batch.index for batch in seen]).tolist()) == list(range(3 * data.originals))
        for batch in seen:
            assert torch.equal(batch.inputs, data.task.prepare(data.inputs[batch.index]))
            assert torch.equal(batch.labels, data.labels[batch.index])


def test_a_run_asks_the_teacher_on_each_copy(tmp_path, monkeypatch):
    monkeypatch.setattr(RunDirectory, "tidy", lambda self: None)  # the logits stay
    augment = "{_target_: pkd_lightning.data.augment.affine, _partial_: true, elastic: 0.5}"
    config = tiny_config(tmp_path, f"data.augment={augment}", "data.copies=2", "boosting.rounds=1")
    results = run(config)
    experiment = assemble(config)
    data = DataModule(experiment.data)
    assert results["sizes"]["train"] == len(data.training) == 3 * data.originals
    model = experiment.teacher.build(data.task.input_shape, data.num_classes)
    load_weights(model, next(tmp_path.rglob("teacher.safetensors")))
    (stored,) = load_file(next(tmp_path.rglob("logits.safetensors"))).values()
    direct = predict(model, data, range(data.validation.stop), torch.device("cpu"))
    torch.testing.assert_close(stored, direct)
    copies = stored[data.originals : 2 * data.originals]
    assert not torch.equal(copies, stored[: data.originals])


def blank(images: Tensor, generator: torch.Generator) -> Tensor:
    return images.zero_()


def transposed(images: Tensor, generator: torch.Generator) -> Tensor:
    return images.transpose(2, 3)


@pytest.mark.parametrize("augment", [blank, transposed])
def test_an_augmentation_may_write_to_its_images_and_give_a_view_of_them(augment):
    plain, data = module(400), module(400, augment=augment, copies=1)
    originals = plain.inputs[: plain.originals]
    assert torch.equal(data.inputs[: data.originals], originals)
    assert torch.equal(data.inputs[data.originals : data.sizes[0]], augment(originals.clone(), torch.Generator()))


def fails(images: Tensor, generator: torch.Generator) -> Tensor:
    raise ValueError("too small")


@pytest.mark.parametrize(
    ("augment", "said"),
    [
        (fails, "data.augment: fails (ValueError: too small)"),
        (lambda images, generator: images.float(), "data.augment: gives no torch.uint8 tensor of shape (63, 1, 2, 2)"),
        (lambda images, generator: images[..., 1:], "data.augment: gives no torch.uint8 tensor of shape (63, 1, 2, 2)"),
        (lambda images, generator: None, "data.augment: gives no torch.uint8 tensor of shape (63, 1, 2, 2)"),
    ],
)
def test_an_augmentation_that_makes_no_copies_is_a_configuration_error(augment, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        module(100, augment=augment, copies=1)


def test_copies_without_an_augmentation_name_what_they_need():
    with pytest.raises(ConfigError, match=r"copies=3: needs data\.augment$"):
        DataConfig(numbered, copies=3)


# ---------------------------------------------------------------------------------- the form of the data


# ---------------------------------------------------------------------------------- classes without samples


def gapped(root: str | None = None, labels: tuple[int, ...] = (2, 5, 11), classes: int = 20) -> ImageSet:
    """`numbered`, sample n with the label n % len(labels) of `labels`."""
    plain = numbered(samples=90)
    chosen = torch.tensor(labels)[torch.arange(90) % len(labels)]
    return ImageSet("gapped", plain.inputs, chosen, classes, 60)


def test_classes_without_samples_get_no_output_and_are_named(caplog):
    data = DataModule(DataConfig(gapped))
    assert data.num_classes == 3
    assert data.class_labels == [2, 5, 11]
    n = numbers(data.inputs)
    assert torch.equal(torch.tensor(data.class_labels)[data.labels], torch.tensor([2, 5, 11])[n % 3])
    (said,) = caplog.messages
    assert "'gapped': no sample has label 0 to 1, 3 to 4, 6 to 10, 12 to 19: the outputs are the other 3 cl" in said


def test_labels_that_only_end_early_stay_as_they_are():
    data = DataModule(DataConfig(partial(gapped, labels=(0, 1, 2))))
    assert (data.num_classes, data.class_labels) == (3, None)


def test_classes_without_samples_can_be_kept(caplog):
    data = DataModule(DataConfig(gapped, empty_classes="keep"))
    assert (data.num_classes, data.class_labels) == (20, None)
    assert torch.equal(data.labels, torch.tensor([2, 5, 11])[numbers(data.inputs) % 3])
    assert "no sample has label 0 to 1, 3 to 4, 6 to 10, 12 to 19; these classes have outputs" in caplog.messages[0]


def test_a_set_of_one_class_is_refused():
    with pytest.raises(DataError, match="no sample has label 0 to 6, 8 to 19, so there is one class"):
        DataModule(DataConfig(partial(gapped, labels=(7,))))


def test_a_limit_changes_no_output_and_what_it_leaves_without_samples_is_named(caplog):
    data = module(limit=10)
    assert data.num_classes == CLASSES
    training = data.labels[: data.originals].unique().tolist()
    missing = [label for label in range(CLASSES) if label not in training]
    assert missing
    (said,) = caplog.messages
    named = re.fullmatch(r"no training sample has label (.*), which cannot be learned", said)[1].split(", ")
    spans = [[int(number) for number in word.split(" to ")] for word in named]
    assert [label for span in spans for label in range(span[0], span[-1] + 1)] == missing


def test_a_class_of_the_test_part_alone_is_named_by_its_label(caplog):
    def source(root: str | None = None) -> ImageSet:
        data = gapped()
        return ImageSet("late", data.inputs, torch.where(torch.arange(90) < 60, data.labels.clamp(max=5), 11), 20, 60)

    data = DataModule(DataConfig(source, split="official"))
    assert data.num_classes == 3
    assert caplog.messages[1:] == ["no training sample has label 11, which cannot be learned"]


def test_a_set_with_samples_of_every_class_says_nothing(caplog):
    assert module(700).class_labels is None
    assert caplog.messages == []


def test_predictions_are_read_back_as_the_labels_of_the_data_set(tmp_path):
    source = ["data.source._target_=tests.test_data_module.striped", "boosting.rounds=1"]
    results = run(tiny_config(tmp_path, *source))
    assert results["labels"] == [10, 30, 200]
    assert results["rounds"][0]["edges"]["classes"] == 3
    ensemble = ProgressiveEnsemble.load(next(tmp_path.rglob("ensemble.json")).parent)
    assert ensemble.labels == [10, 30, 200]
    assert ensemble.predicted(torch.eye(3)).tolist() == [10, 30, 200]
    plain = run(tiny_config(tmp_path, "name=plain", "boosting.rounds=1"))
    assert plain["labels"] is None
    ensemble = ProgressiveEnsemble.load(next((tmp_path / "plain").rglob("ensemble.json")).parent)
    assert ensemble.predicted(torch.eye(3)).tolist() == [0, 1, 2]


def striped(root: str | None = None) -> ImageSet:
    plain = patterns()
    return ImageSet("striped", plain.inputs, torch.tensor([10, 30, 200])[plain.labels], 201, plain.train_size)


def channels_last(images: Tensor) -> Tensor:
    return torch.from_numpy(images.numpy().transpose(0, 2, 3, 1).copy()).permute(0, 3, 1, 2)


def read_only(images: Tensor) -> Tensor:
    array = images.numpy().copy()
    array.setflags(write=False)
    return torch.from_numpy(array)


def every_other(images: Tensor) -> Tensor:
    return torch.stack([images, 255 - images], dim=-1)[..., 0]


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize("layout", [channels_last, read_only, every_other])
def test_the_layout_of_the_sources_tensors_changes_nothing(layout):
    def source(root: str | None = None) -> ImageSet:
        plain = colours()
        labels = torch.stack([plain.labels, plain.labels + 1], dim=1)[:, 0]
        return ImageSet("colours", layout(plain.inputs), labels, 2, 100)

    plain = DataModule(DataConfig(colours, augment=add_noise, copies=1))
    data = DataModule(DataConfig(source, augment=add_noise, copies=1))
    assert data.inputs.is_contiguous()
    assert data.labels.is_contiguous()
    assert torch.equal(data.inputs, plain.inputs)
    assert torch.equal(data.labels, plain.labels)
    assert data.fingerprint == plain.fingerprint


def test_images_of_a_mapped_file_are_not_written_to(tmp_path):
    np.save(tmp_path / "images.npy", colours().images.numpy().transpose(0, 2, 3, 1))
    stored = (tmp_path / "images.npy").read_bytes()

    def source(root: str | None = None) -> ImageSet:
        images = np.load(tmp_path / "images.npy", mmap_mode="r+")
        return ImageSet("colours", torch.from_numpy(images).permute(0, 3, 1, 2), colours().labels, 2, 100)

    data = DataModule(DataConfig(source, augment=add_noise, copies=2))
    assert data.fingerprint == DataModule(DataConfig(colours, augment=add_noise, copies=2)).fingerprint
    assert (tmp_path / "images.npy").read_bytes() == stored


def forgets_root() -> ImageSet:
    return colours()


def breaks(root: str | None = None) -> ImageSet:
    raise TypeError("expected str, not int")


def lacks_data(root: str | None = None) -> ImageSet:
    raise DataError("mine lacks train.npz")


@pytest.mark.parametrize(
    ("source", "kind", "said"),
    [
        (forgets_root, ConfigError, "data.source: cannot be called with root=None (got an unexpected"),
        (breaks, ConfigError, "data.source: fails (TypeError: expected str, not int)"),
        (lacks_data, DataError, "mine lacks train.npz"),
        (lambda root: {"images": colours().images}, ConfigError, "data.source: gives a dict, not an ImageSet or other"),
        (lambda root: None, ConfigError, "data.source: gives a NoneType"),
        (7, ConfigError, "source=7: must be a `_target_` with `_partial_: true`"),
    ],
)
def test_a_source_that_gives_no_image_set_is_one_error(source, kind, said):
    with pytest.raises(kind, match=re.escape(said)):
        DataModule(DataConfig(source))


def test_numbers_of_numpy_and_torch_become_plain_ones():
    data = ImageSet("mine", colours().images, colours().labels, np.int64(2), torch.tensor(100))
    assert json.dumps([data.num_classes, data.train_size]) == "[2, 100]"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"images": torch.zeros(4, 1, 2, 2)}, "torch.float32 of shape (4, 1, 2, 2), not torch.uint8 of (N, C, H, W)"),
        ({"images": torch.zeros(4, 2, 2, dtype=torch.uint8)}, "(4, 2, 2), not torch.uint8 of (N, C, H, W): give grey"),
        ({"images": torch.zeros(4, 8, 8, 3, dtype=torch.uint8)}, "have their channels last"),
        ({"images": torch.zeros(4, 8, 6, 1, dtype=torch.uint8)}, "images.permute(0, 3, 1, 2)"),
        ({"images": torch.zeros(4, 3, 0, 8, dtype=torch.uint8)}, "have no pixels"),
        ({"images": np.zeros((4, 1, 2, 2), np.uint8)}, "images are a ndarray, not a tensor"),
        ({"images": torch.zeros(4, 1, 2, 2, dtype=torch.uint8, device="meta")}, "on meta, not a dense one on the CPU"),
        ({"labels": [0, 1, 0, 1]}, "labels are a list, not a tensor"),
        ({"labels": torch.tensor([[0], [1], [0], [1]], dtype=torch.uint8)}, "give labels.reshape(-1).long()"),
        ({"labels": torch.tensor([0.0, 1.0, 0.0, 1.0])}, "labels are torch.float32"),
        ({"num_classes": 2.0}, "num_classes is 2.0, not a whole number"),
        ({"train_size": None}, "train_size is None, not a whole number"),
        ({"name": 5}, "name is 5, not a word"),
        ({"labels": torch.tensor([0, 1, 2, 0])}, "labels go from 0 to 2, not within 0 to 1"),
        ({"labels": torch.tensor([0, 1, 0])}, "one per image"),
        ({"labels": torch.zeros(4, dtype=torch.int64), "num_classes": 1}, "at least 2"),
        ({"train_size": 5}, "train_size=5"),
    ],
)
def test_an_image_set_of_another_form_is_refused(change, said):
    good = {
        "name": "mine", "images": torch.zeros(4, 1, 2, 2, dtype=torch.uint8), "labels": torch.tensor([0, 1, 0, 1]),
        "num_classes": 2, "train_size": 3,
    }  # fmt: skip
    ImageSet(**good)
    with pytest.raises(DataError, match=re.escape(said)):
        ImageSet(**{**good, **change})
