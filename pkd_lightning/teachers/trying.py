"""What a run will do to each of those that teach, tried before anything is trained."""

from collections.abc import Callable
from functools import partial

from torch import nn

from pkd_lightning.checks import collect
from pkd_lightning.data.module import DataModule
from pkd_lightning.teacher import TeacherConfig, is_trained
from pkd_lightning.teachers.combining import CombinedTeacher
from pkd_lightning.teachers.options import AssistantConfig, TeachersConfig

Attempt = Callable[..., None]  # `try_model` of these data


def try_teacher(
    config: TeacherConfig, data: DataModule, attempt: Attempt, faults: list[str], option: str = "teacher"
) -> nn.Module | None:
    """Try one model, once where it is not trained: it may be large. None where there are faults, which are added."""
    name = f"{option}.model"
    build = partial(config.build, data.task.input_shape, data.num_classes)
    model = collect(faults, name, build)
    if model is None:
        return None
    loaded = config.checkpoint is not None or is_trained(model)
    if loaded and isinstance(config, AssistantConfig):
        faults.append(f"{name}: none of its parameters requires a gradient, and an assistant is trained")
        return None
    trainer = None if loaded else config.trainer
    collect(faults, name, partial(attempt, name, build, trainer=trainer, model=model))
    return model


def try_teachers(config: TeachersConfig, data: DataModule, attempt: Attempt, faults: list[str]) -> nn.Module | None:
    """Try each model of those that teach; the one that teaches the students, None where one cannot be built."""
    models = {
        option: try_teacher(one, data, attempt, faults, option) for option, one in (config.first | config.chain).items()
    }
    found = [model for model in models.values() if model is not None]
    if len(found) < len(models):
        return None
    if config.assistants or not config.members:
        return found[-1]
    return CombinedTeacher(dict(zip(config.members, found, strict=True)), config.combine)
