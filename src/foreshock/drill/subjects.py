"""The two real trainings that faults are tried on: a small GPT on text, an MLP on digits.

Shapes: N images, B rows of a batch, P pixels of an image, K classes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from foreshock.drill import gpt
from foreshock.drill.gpt import GPTConfig, Recipe
from foreshock.drill.text import TextBatches, random_word

SubjectName = Literal["gpt", "mlp"]
Batch = tuple[Tensor, Tensor]

_PIXELS, _CLASSES = 64, 10


@dataclasses.dataclass
class Training:
    """A training run before its first step, or at any later one."""

    model: nn.Module
    optimizer: AdamW
    scheduler: LambdaLR
    batch_at: Callable[[int], Batch]
    """Batch of a step: a pure function of it."""
    loss_of: Callable[[Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Subject:
    """A training that can be built from a seed, and where faults strike it."""

    name: SubjectName
    what: str
    build: Callable[[int], Training]
    struck_parameter: str
    """A weight in the middle of the model."""
    struck_module: str
    """A module in the middle of the model, whose output an activation fault strikes."""
    input_module: str | None
    """Module whose output stands for an input of tokens; None: the input itself."""
    attention_modules: tuple[str, ...]
    healthy_steps: int
    """Steps of the healthy twin in the full drill."""


GPT_RECIPE = Recipe(
    model=GPTConfig(context=32, width=48, num_blocks=2, num_heads=2),
    batch_size=8,
    learning_rate=3e-3,
    warmup_steps=20,
)
MAX_NORM = 1.0


def _build_gpt(seed: int) -> Training:
    run = gpt.build(seed, GPT_RECIPE)
    batches: TextBatches = run.batches
    return Training(run.model, run.optimizer, run.scheduler, batches.batch_at, gpt.next_token_loss)


class DigitClassifier(nn.Module):
    """Three layers with ReLU between them; returns logits_BK of images x_BP."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.first = nn.Linear(_PIXELS, width)
        self.middle = nn.Linear(width, width)
        self.last = nn.Linear(width, _CLASSES)

    def forward(self, x_BP: Tensor) -> Tensor:
        h_BC = torch.relu(self.middle(torch.relu(self.first(x_BP))))
        logits_BK: Tensor = self.last(h_BC)
        return logits_BK


@functools.cache
def load_digits() -> Batch:
    """(x_NP, y_N): scikit-learn's 1797 handwritten digits, pixels from -1 to 1.

    Raises:
        ImportError: scikit-learn is not installed; names the extra that brings it.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            "the drill's MLP is trained on scikit-learn's digits: pip install "
            "'foreshock[surprise]', or drill the GPT alone with --model gpt"
        ) from error
    digits: Any = datasets.load_digits()
    x_NP = torch.from_numpy(digits.data).float() / 8 - 1
    return x_NP, torch.from_numpy(digits.target).long()


class DigitBatches:
    """Batches of noisy digits; batch i is a pure function of (seed, i).

    The noise keeps the training from ever being done: with a loss that falls to 0 everything would
    be a spike.
    """

    def __init__(self, seed: int, batch_size: int = 32, noise: float = 1.0) -> None:
        self._x_NP, self._y_N = load_digits()
        self._seed, self._batch_size, self._noise = seed, batch_size, noise

    def batch_at(self, index: int) -> Batch:
        """The images of a step, and their classes."""
        generator = torch.Generator().manual_seed(random_word(self._seed, index) % 2**63)
        drawn_B = torch.randint(len(self._y_N), (self._batch_size,), generator=generator)
        x_BP = self._x_NP[drawn_B]
        noise_BP = torch.randn(x_BP.shape, generator=generator)
        return x_BP + self._noise * noise_BP, self._y_N[drawn_B]


def _build_mlp(seed: int) -> Training:
    torch.manual_seed(seed)
    model = DigitClassifier()
    optimizer = AdamW(model.parameters(), lr=3e-3, weight_decay=0.1, fused=True)
    scheduler = LambdaLR(optimizer, gpt.warmup(20))
    return Training(model, optimizer, scheduler, DigitBatches(seed).batch_at, F.cross_entropy)


SUBJECTS: dict[str, Subject] = {
    "gpt": Subject(
        "gpt",
        "GPT of 2 blocks and width 48 on Python's documentation, AdamW with beta2 0.95",
        _build_gpt,
        struck_parameter="blocks.1.mlp.up.weight",
        struck_module="blocks.1.mlp.up",
        input_module="token_embedding",
        attention_modules=("blocks.0.attention", "blocks.1.attention"),
        healthy_steps=1500,
    ),
    "mlp": Subject(
        "mlp",
        "MLP of 3 layers and width 64 on noisy digits, AdamW with beta2 0.999",
        _build_mlp,
        struck_parameter="middle.weight",
        struck_module="middle",
        input_module=None,
        attention_modules=(),
        healthy_steps=6000,
    ),
}
"""Both, by name."""
