"""The ladder that `find_weak_learner` climbs: model classes F_1, F_2, ... of growing size, each a rung."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from pkd_lightning.checks import under
from pkd_lightning.errors import ConfigError
from pkd_lightning.models.building import InputShape, build_classifier, configured, import_model


class Ladder:
    """Rungs, model classes, in the order in which they are tried.

    Args:
        model: import path of the student's class, or of a function annotated to return a module. It is called with
            the rung's options, and with `input_shape` (or `image_shape`) and `num_classes` where it names them.
        rungs: options of each, smallest first.
        common: options all rungs share; a rung's own win.
        repeat: whether a rung may give several students. Without, each accepted student uses its rung up.
    """

    def __init__(
        self,
        model: str,
        rungs: Sequence[Mapping[str, Any]],
        common: Mapping[str, Any] | None = None,
        repeat: bool = False,
    ) -> None:
        if not rungs:
            raise ConfigError(["rungs: a ladder needs at least one rung"])
        self.model = import_model(model, trust=True)
        configured.add(model)
        self.path = model
        self.rungs = [{**_plain(common or {}), **_plain(rung)} for rung in rungs]
        faults = []
        for index, rung in enumerate(self.rungs):
            for key, value in rung.items():
                try:  # a student's options are saved beside its weights; it is built from what will be read there
                    rung[key] = json.loads(json.dumps(value, allow_nan=False))
                except (TypeError, ValueError) as error:
                    faults.append(f"rungs.{index}.{key}={value!r}: cannot be saved as JSON ({error})")
        if faults:
            raise ConfigError(faults)
        self.repeat = repeat

    def __len__(self) -> int:
        return len(self.rungs)

    def build(
        self,
        index: int,
        input_shape: InputShape,
        num_classes: int,
        earlier: Callable[[], Sequence[nn.Module]] = tuple,
    ) -> nn.Module:
        """A new student of rung `index` (from 0), randomly initialised, to follow the students that `earlier` gives."""
        return build_classifier(self.model, self.rungs[index], input_shape, num_classes, earlier)

    def faults(self, rounds: int, input_shape: InputShape | None = None) -> list[str]:
        """Every reason why `rounds` students cannot be built; those that depend on the inputs only with their shape."""
        found = []
        if rounds > len(self) and not self.repeat:
            found.append(
                f"rungs: {rounds} rounds (boosting.rounds) on a ladder of {len(self)} rungs need student.repeat=true,"
                " or more rungs"
            )
        check = getattr(self.model, "faults", None)
        if check is not None:
            for index, rung in enumerate(self.rungs):
                found += under(f"rungs.{index}", check(rung, input_shape))
        return found


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(options, (DictConfig, ListConfig)):
        options = OmegaConf.to_container(options, resolve=True)  # type: ignore[assignment]
    return {str(key): value for key, value in options.items()}
