"""A small language model learns from a larger one, in plain PyTorch with `tlk.linear_distillation`.

The text is drawn from a Markov chain. The teacher has seen much of it; the student sees little.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

import tlkernels as tlk

VOCABULARY, LENGTH = 200, 32
torch.manual_seed(0)
NEXT = (4 * torch.randn(VOCABULARY, VOCABULARY)).softmax(-1)  # the chance of each token after each


class Model(nn.Module):
    """Embeddings, a hidden layer, and a vocabulary head that the losses multiply with."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(VOCABULARY, width), nn.Linear(width, width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return functional.gelu(self.layer(self.embedding(tokens)))


def text(rows: int) -> Tensor:
    """Return rows of text."""
    tokens = [torch.randint(VOCABULARY, (rows,))]
    for _ in range(LENGTH):
        tokens.append(torch.multinomial(NEXT[tokens[-1]], 1)[:, 0])
    return torch.stack(tokens, 1)


def train(model: Model, rows: Tensor, teacher: Model | None = None) -> float:
    """Train on the same rows in every step, and return the perplexity on others."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for batch in [*rows.split(32)] * (1600 // len(rows)):
        hidden, target = model(batch[:, :-1]), batch[:, 1:]
        loss = tlk.linear_cross_entropy(hidden, model.head.weight, target)
        if teacher is not None:
            with torch.no_grad():
                told = teacher(batch[:, :-1])
            loss = tlk.linear_distillation(hidden, model.head.weight, told, teacher.head.weight)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        loss = tlk.linear_cross_entropy(model(TEST[:, :-1]), model.head.weight, TEST[:, 1:])
    return float(loss.exp())


if __name__ == "__main__":
    much, little, TEST = text(1600), text(64), text(200)
    teacher = Model(128)
    print(f"teacher, much text               perplexity {train(teacher, much):.1f}")
    print(f"student, little text             perplexity {train(Model(32), little):.1f}")
    print(f"student, little text, distilled  perplexity {train(Model(32), little, teacher):.1f}")
