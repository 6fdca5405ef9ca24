"""What a term of knowledge is: a loss of a student's and a teacher's outputs, with a weight."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Self

from torch import Tensor, nn

from pkd_lightning.checks import Faults, collect
from pkd_lightning.errors import ConfigError
from pkd_lightning.knowledge.tokens import Grid, as_planes, grid_of
from pkd_lightning.outputs import Output, paths_of


class Pair(NamedTuple):
    """What a term sees of one batch of training images.

    Attributes:
        student: its logits (batch, L), and what its modules at `Term.student_features` gave.
        teacher: the same of the teacher, without gradients: features are of the very images that the student sees.
        target: (batch,) labels.
        index: (batch,) sample index, of the training rows.
    """

    student: Output
    teacher: Output
    target: Tensor
    index: Tensor  # type: ignore[assignment]  # tuples have a method of that name


@dataclass(frozen=True)
class Term:
    """A term of knowledge. Subclasses are frozen dataclasses of their options, and give `loss`.

    It is added to the objective's loss of training rows. The best epoch is chosen by the objective's loss alone, which
    is the same whatever terms there are.

    Attributes:
        weight: multiplies the loss.
        schedule: of the weight, from progress of the fit in [0, 1] to a multiplier (a Hydra partial); None for 1.
    """

    weight: float = 1.0
    schedule: Callable[[float], float] | None = None

    within_batch: ClassVar[bool] = False  # whether samples of a batch are compared with each other

    def __post_init__(self) -> None:
        self._faults().raise_if_any()

    def _faults(self) -> Faults:
        """What is wrong with the options; subclasses add to it."""
        faults = Faults(self)
        faults.number("weight", 0)
        faults.called("schedule", optional=True)
        if callable(self.schedule) and not faults.misspelt("schedule"):
            faults.works("schedule", lambda: [float(self.weight_at(progress)) for progress in (0.0, 0.5, 1.0)])
        return faults

    @property
    def student_features(self) -> Sequence[str]:
        """Paths of the student's modules whose outputs the loss needs, as in `outputs.Taps`."""
        return ()

    @property
    def teacher_features(self) -> Sequence[str]:
        """Paths of the teacher's."""
        return ()

    def weight_at(self, progress: float) -> float:
        """The weight after this part of the fit's steps, from 0 to 1."""
        return self.weight if self.schedule is None else self.weight * self.schedule(progress)

    def for_models(self, student: nn.Module, teacher: nn.Module | None) -> Self:
        """The term with what only the models tell, such as how many blocks they have; itself where that is nothing.

        Raises:
            ConfigError: where a model has not what the term needs.
        """
        return self

    def parts(self, pair: Pair, samples: int) -> nn.Module:
        """What is trained with the student for this term's sake and dropped afterwards, such as a regressor.

        Args:
            pair: of two samples, for its shapes.
            samples: number of training rows.

        Raises:
            ConfigError: where shapes do not go together.
        """
        return nn.Module()

    def loss(self, pair: Pair, parts: nn.Module) -> Tensor:
        """The scalar loss of a batch, without the weight; `parts` is what `parts` gave, on the student's device."""
        raise NotImplementedError


def listed(paths: str | Sequence[str]) -> tuple[str, ...]:
    """One path or several, as several."""
    return (paths,) if isinstance(paths, str) else tuple(paths)


def path_faults(name: str, paths: object) -> list[str]:
    """What is wrong with the option `name`, which is to be the path of a module, or a list of them."""
    given = [paths] if isinstance(paths, str) else paths
    if isinstance(given, Sequence) and all(isinstance(path, str) and path for path in given):
        return []
    return [f"{name}={paths!r}: must be the path of a module, or a list of them"]


def by_depth(student: int, teacher: int) -> list[tuple[int, int]]:
    """Pairs of indices of a student's and a teacher's modules, of which there are so many, by their relative depth.

    Each of the model with fewer has the first of the other that is at least as deep: module i of n has depth
    (i + 1) / n. So the last ones are a pair, and none is in two.
    """
    fewer, more = min(student, teacher), max(student, teacher)
    chosen = [-(-(i + 1) * more // fewer) - 1 for i in range(fewer)]  # rounded up
    return list(zip(range(fewer), chosen, strict=True) if fewer == student else zip(chosen, range(fewer), strict=True))


@dataclass(frozen=True)
class FeatureTerm(Term):
    """A term of intermediate tensors: of modules of the student and as many of the teacher, pair by pair.

    Subclasses give `between`, and `made` where something is trained for a pair.

    Args:
        student: path of the student's module, or several: `blocks.0`, `blocks.-1` for the last of several, `blocks.*`
            for all of them.
        teacher: of the teacher's. Where any path has a `*`, all modules are matched by relative depth, see
            `by_depth`: one option then fits models of any number of blocks.
        grids: of the tokens of each pair of modules, where the models tell (`tokens.grid_of`); is found by
            `for_models`, and no option.
    """

    student: str | Sequence[str] = ()
    teacher: str | Sequence[str] = ()
    grids: Sequence[tuple[Grid | None, Grid | None]] = ()

    def _faults(self) -> Faults:
        faults = super()._faults()
        for name in ("student", "teacher"):
            paths = getattr(self, name)
            missing = [] if paths else [f"{name}: is missing; the path of a module, such as blocks.-1"]
            faults.found += path_faults(name, paths) or missing
        if not faults.found and not self._by_depth and len(self.student_features) != len(self.teacher_features):
            faults.found.append(
                f"teacher={self.teacher!r}: {len(self.teacher_features)} modules for {len(self.student_features)}"
                " of the student; they are taken in pairs"
            )
        return faults

    @property
    def student_features(self) -> Sequence[str]:
        """Paths of the student's modules."""
        return listed(self.student)

    @property
    def teacher_features(self) -> Sequence[str]:
        """Paths of the teacher's modules, one for each of the student's."""
        return listed(self.teacher)

    @property
    def _by_depth(self) -> bool:
        return any("*" in path for path in (*self.student_features, *self.teacher_features))

    def for_models(self, student: nn.Module, teacher: nn.Module | None) -> Self:
        """The term of the modules that are meant, by depth where a path has a `*`, with the rasters of their tokens."""
        if teacher is None:
            return self
        if not self._by_depth:
            return self._with_grids(student, teacher)
        faults: list[str] = []
        own = collect(faults, "student", lambda: paths_of(student, self.student_features))
        its = collect(faults, "teacher", lambda: paths_of(teacher, self.teacher_features))
        if own is None or its is None:
            raise ConfigError(faults)
        pairs = by_depth(len(own), len(its))
        term = replace(self, student=[own[i] for i, _ in pairs], teacher=[its[j] for _, j in pairs])
        return term._with_grids(student, teacher)

    def _with_grids(self, student: nn.Module, teacher: nn.Module) -> Self:
        paths = zip(self.student_features, self.teacher_features, strict=True)
        return replace(self, grids=[(grid_of(student, own), grid_of(teacher, its)) for own, its in paths])

    def taken(self, pair: Pair) -> list[tuple[Tensor, Tensor]]:
        """The features of the student and of the teacher, pair by pair: tokens of a known raster as planes."""
        paths = list(zip(self.student_features, self.teacher_features, strict=True))
        grids = self.grids or [(None, None)] * len(paths)
        return [
            (as_planes(pair.student.features[own], grid), as_planes(pair.teacher.features[its], other))
            for (own, its), (grid, other) in zip(paths, grids, strict=True)
        ]

    def parts(self, pair: Pair, samples: int) -> nn.Module:
        """What `made` gives for each pair of features."""
        return nn.ModuleList([self.made(own, its) for own, its in self.taken(pair)])

    def made(self, student: Tensor, teacher: Tensor) -> nn.Module:
        """What is trained for a pair of features, given those of two samples.

        Raises:
            ConfigError: where their shapes do not go together.
        """
        return nn.Module()

    def loss(self, pair: Pair, parts: nn.Module) -> Tensor:
        """The mean of `between` over the pairs."""
        assert isinstance(parts, nn.ModuleList)
        losses = [self.between(*taken, part) for taken, part in zip(self.taken(pair), parts, strict=True)]
        return sum(losses[1:], losses[0]) / len(losses)

    def between(self, student: Tensor, teacher: Tensor, part: nn.Module) -> Tensor:
        """The scalar loss of one pair of features (batch, ...)."""
        raise NotImplementedError
