"""A learned exit: is a prefix's class already that of the whole ensemble? A tiny Mamba reads the prefixes so far.

After DYNAMAX (Nogales, Gambella and Roveri, arXiv 2504.20922), where a Mamba block is the classifier of early exits of
language models, trained against the full model's answers. Here its tokens are prefixes, not words: of prefix t it
reads five features z_t, which do not depend on which class is which, nor on how many there are:

    u_t = W z_t + b,  h_t = u_t + Mamba(u_1, ..., u_t),  P(class of F_t = class of F_T) = sigmoid(v . [h_t, z_t] + c_t)

It is trained by cross-entropy, with no labels, on rows that the students were not trained on, and calibrated on others.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pkd_lightning.errors import ConfigError
from pkd_lightning.exits.rules import State, finite
from pkd_lightning.models.mamba import Mamba, MambaState
from pkd_lightning.seeding import generator, seeded

TOP, FEATURES = 3, 5
LEAST = -20.0  # of a log probability as a feature
FIT_ROWS, FIT_STEPS = 4_000, 150  # at most: some seconds on one core


def features_of(logits: Tensor, last: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Features (n, 5) float32 of a prefix with logits (n, L), and its class (n,).

    The three largest log probabilities, the negative entropy, and whether its class is the `last` one (n,), that of the
    prefix before it. They are NaN where the logits are not finite.
    """
    log_p = logits.double().log_softmax(-1)
    classes = log_p.argmax(-1)
    top = log_p.topk(min(TOP, log_p.shape[-1]), -1).values
    top = F.pad(top, (0, TOP - top.shape[-1]), value=LEAST).clamp(min=LEAST)
    entropy = torch.special.entr(log_p.exp()).sum(-1)
    agrees = torch.zeros_like(entropy) if last is None else (classes == last).double()
    features = torch.cat([top, torch.stack([-entropy, agrees], -1)], -1)
    return features.masked_fill(~finite(logits)[:, None], torch.nan).float(), classes


class LearnedExit(nn.Module):
    """The rule. See `learn`, which trains one.

    Args:
        prefixes: T - 1, those that an image can leave at.
        d_model: channels of its tokens.
    """

    name = "learned"

    def __init__(self, prefixes: int, d_model: int = 8) -> None:
        super().__init__()
        self.embed = nn.Linear(FEATURES, d_model)
        self.mamba = Mamba(d_model, d_state=4, d_conv=2, expand=1)
        self.head = nn.Linear(d_model + FEATURES, 1, bias=False)
        self.bias = nn.Parameter(torch.zeros(prefixes))
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("std", torch.ones(FEATURES))

    def forward(self, features: Tensor) -> Tensor:
        """Logits (n, t) that the classes of prefixes 1 to t are the ensemble's, of features (n, t, 5)."""
        features = (features - self.mean) / self.std
        tokens = self.embed(features)
        read = torch.cat([tokens + self.mamba(tokens), features], -1)
        agreeing: Tensor = self.head(read)[..., 0] + self.bias[: features.shape[1]]
        return agreeing

    @torch.no_grad()
    def step(self, logits: Tensor, state: State = ()) -> tuple[Tensor, State]:
        """Scores as of `Rule.step`: logits, because many probabilities are 1 in float64. NaN from the last prefix on.

        The state is the last class, the number of prefixes, and that of the Mamba block, asked as a recurrence.
        """
        last, done, *inner = state or (None, None)
        features, classes = features_of(logits, last)
        features = (features - self.mean) / self.std
        token = self.embed(features)
        mixed, after = self.mamba.step(token, MambaState(*inner) if inner else None)
        t = torch.zeros_like(classes) if done is None else done
        within = t.clamp(max=len(self.bias) - 1)
        score = self.head(torch.cat([token + mixed, features], -1))[:, 0] + self.bias[within]
        score = score.double().masked_fill(t >= len(self.bias), torch.nan)
        return score, (classes, t + 1, *after)

    def macs(self, num_classes: int) -> int:
        """See `Rule.macs`: of features, token, block and head."""
        width = self.embed.out_features
        return num_classes + FEATURES * width + self.mamba.macs(1) + width + FEATURES


@torch.no_grad()
def learn(prefixes: Iterable[Tensor], seed: int = 0) -> tuple[LearnedExit, Tensor]:
    """Train a learned exit on half of the rows, drawn at random.

    Args:
        prefixes: logits (N, L) of prefixes 1, ..., T on rows that the students were not trained on.
        seed: of the draw and of the weights.

    Returns:
        The rule, and the numbers of the rows that it did not see, to calibrate it on.

    Raises:
        ConfigError: see `fit`.
    """
    rows, classes = [], []  # type: list[Tensor], list[Tensor]
    for logits in prefixes:
        features, found = features_of(logits, classes[-1] if classes else None)
        rows.append(features)
        classes.append(found)
    return fit(torch.stack(rows, 1), torch.stack(classes, 1), seed)


def fit(features: Tensor, classes: Tensor, seed: int = 0) -> tuple[LearnedExit, Tensor]:
    """See `learn`; of features (N, T, 5) and classes (N, T).

    Raises:
        ConfigError: for one prefix, which leaves nothing to learn, or fewer than two rows with finite logits.
    """
    count, prefixes = classes.shape
    order = torch.randperm(count, generator=generator(seed, "rows of the learned exit"))
    of_fit, rest = order[: count // 2], order[count // 2 :]
    whole = features[of_fit].isfinite().all(-1).all(-1)
    of_fit = of_fit[whole][:FIT_ROWS]
    if prefixes < 2 or len(of_fit) < 1:
        found = f"{prefixes} prefixes and {count} rows, {len(of_fit)} of them finite and to train on"
        raise ConfigError([f"learned exit: needs two prefixes and two finite rows at least, not {found}"])
    with torch.inference_mode(False), torch.enable_grad(), seeded(seed, "learned exit"):
        model = LearnedExit(prefixes - 1)
        read = features[of_fit, :-1].clone()
        target = (classes[of_fit, :-1] == classes[of_fit, -1:]).float()
        model.mean.copy_(read.flatten(0, 1).mean(0))
        model.std.copy_(read.flatten(0, 1).std(0, correction=0).clamp(min=1e-3))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.01)
        for _ in range(FIT_STEPS):
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(model(read), target).backward()
            optimizer.step()
    return model.eval().requires_grad_(False), rest.sort().values
