"""The terms of one fit, with what is trained beside the student for their sake, and how each of them pulls."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pkd_lightning.checks import under
from pkd_lightning.errors import ConfigError
from pkd_lightning.knowledge.term import Pair, Term
from pkd_lightning.models.building import brief
from pkd_lightning.outputs import Output, Taps


class Knowledge(nn.Module):
    """Terms by name, each with its trained parts.

    Args:
        terms: by name, as `for_models` gives them.
        pair: outputs for two samples, for the shapes of the parts.
        samples: number of training rows.

    Raises:
        ConfigError: where a term cannot be had of these features, under its name.
    """

    def __init__(self, terms: Mapping[str, Term], pair: Pair, samples: int) -> None:
        super().__init__()
        self.terms = dict(terms)
        self.attached = nn.ModuleDict()
        for name, term in self.terms.items():
            with named(name, "its parts"):
                self.attached[name] = term.parts(pair, samples)

    @property
    def student_features(self) -> list[str]:
        """Paths of the student's modules that the terms need."""
        return features(self.terms, "student_features")

    @property
    def teacher_features(self) -> list[str]:
        """Paths of the teacher's."""
        return features(self.terms, "teacher_features")

    def losses(self, pair: Pair, progress: float) -> dict[str, Tensor]:
        """Each term's weighted loss by its name, after this part of the fit's steps, from 0 to 1."""
        return {
            name: term.weight_at(progress) * term.loss(pair, self.attached[name]) for name, term in self.terms.items()
        }


def shares(losses: Mapping[str, Tensor], parameters: Sequence[Tensor]) -> dict[str, Tensor]:
    """Each loss's share of the sum of the norms of their gradients by the parameters. The graph is kept."""
    norms = {}
    for name, loss in losses.items():
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) if loss.grad_fn else ()
        parts = [part.norm() for part in found if part is not None]
        norms[name] = torch.stack(parts).norm() if parts else torch.zeros((), device=loss.device)
    total = torch.stack(list(norms.values())).sum().clamp(min=torch.finfo(torch.float32).tiny)
    return {name: norm / total for name, norm in norms.items()}


def features(terms: Mapping[str, Term], key: str) -> list[str]:
    """All paths at `key` of the terms, each once."""
    return list(dict.fromkeys(path for term in terms.values() for path in getattr(term, key)))


def for_models(terms: Mapping[str, Term], student: nn.Module, teacher: nn.Module | None) -> dict[str, Term]:
    """Each term's `for_models`.

    Raises:
        ConfigError: where a model has not what a term needs, under its name.
    """
    found: dict[str, Term] = {}
    faults: list[str] = []
    for name, term in terms.items():
        try:
            with named(name, "what it needs of the models"):
                found[name] = term.for_models(student, teacher)
        except ConfigError as error:
            faults += error.faults
    if faults:
        raise ConfigError(faults)
    return found


@torch.no_grad()
def example(
    terms: Mapping[str, Term],
    student: nn.Module,
    asked: nn.Module,
    teacher: nn.Module | None,
    inputs: Tensor,
    classes: int,
) -> Pair:
    """What the terms see of two samples in evaluation mode. Where no term needs features, no model is called.

    Args:
        terms: by name, those of these models (`for_models`).
        student: whose modules are meant.
        asked: what is called for them: the student, or the student together with earlier ones that it reads.
        teacher: the teacher.
        inputs: (2, ...), prepared.
        classes: L.

    Raises:
        ConfigError: where a model has no such module, under the names of the terms and their options.
    """
    logits, outputs = torch.zeros(len(inputs), classes), []
    for key, model, called in (("student", student, asked), ("teacher", teacher, teacher)):  # in the order of `Pair`
        paths = features(terms, f"{key}_features")
        if not paths or model is None or called is None:
            outputs.append(Output(logits))
            continue
        faults = [fault for name, term in terms.items() for fault in _missing(model, name, key, term)]
        if faults:
            raise ConfigError(faults)
        training = called.training
        called.eval()
        try:
            with Taps(model, paths) as taps:
                outputs.append(Output(logits, taps.call(called, inputs).features))
        finally:
            called.train(training)
    own, its = outputs
    return Pair(own, its, torch.zeros(len(inputs), dtype=torch.int64), torch.arange(len(inputs)))


def _missing(model: nn.Module, name: str, key: str, term: Term) -> list[str]:
    try:
        Taps(model, getattr(term, f"{key}_features"))
    except ConfigError as error:
        return under(f"{name}.{key}", error.faults)
    return []


def try_losses(knowledge: Knowledge, pair: Pair) -> None:
    """Compute every term once.

    Raises:
        ConfigError: where one fails, or gives no scalar that is finite, under its name.
    """
    faults = []
    for name, term in knowledge.terms.items():
        try:
            with named(name, "its loss"):
                loss = term.loss(pair, knowledge.attached[name])
                if not isinstance(loss, Tensor) or loss.ndim != 0 or not loss.isfinite():
                    raise ConfigError([f"gives no finite scalar tensor on two samples, but {loss!r}"])
        except ConfigError as error:
            faults += error.faults
    if faults:
        raise ConfigError(faults)


@contextmanager
def named(name: str, what: str) -> Iterator[None]:
    """Whatever is raised in the block, as a `ConfigError` of the term `name`."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(under(name, error.faults)) from error
    except Exception as error:  # whatever the user's term raises
        raise ConfigError([f"{name}: {what} cannot be computed ({brief(error)})"]) from error
