"""Two encoders learn to find each other's rows, in plain PyTorch with `tlk.InfoNCELoss`.

Both see the same hidden vectors, each through a random layer and noise of its own, as a picture and its caption do.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

import tlkernels as tlk

torch.manual_seed(0)
SIZES = (64, 96)  # of the two views
VIEWS = [nn.Sequential(nn.Linear(16, size), nn.Tanh()).requires_grad_(False) for size in SIZES]


def pairs(rows: int) -> list[Tensor]:
    """Return rows of the two views."""
    hidden = torch.randn(rows, 16)
    return [view(hidden) + 0.3 * torch.randn(rows, size) for view, size in zip(VIEWS, SIZES, strict=True)]


def found(encoders: nn.ModuleList) -> float:
    """Return the share of new rows whose nearest row in the other view is their own."""
    with torch.no_grad():
        q, k = (functional.normalize(encode(x)) for encode, x in zip(encoders, pairs(500), strict=True))
    return float(((q @ k.T).argmax(1) == torch.arange(500)).float().mean())


def train(criterion: nn.Module, steps: int = 60) -> tuple[float, float]:
    """Train two new encoders; return the last loss and the share that is found."""
    torch.manual_seed(1)
    encoders = nn.ModuleList(nn.Sequential(nn.Linear(size, 64), nn.GELU(), nn.Linear(64, 32)) for size in SIZES)
    optimizer = torch.optim.AdamW([*encoders.parameters(), *criterion.parameters()], lr=3e-3)
    for _ in range(steps):
        query, key = (encode(x) for encode, x in zip(encoders, pairs(256), strict=True))
        loss = criterion(query, key)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach()), found(encoders)


class Eager(nn.Module):
    """The lines of PyTorch that `tlk.InfoNCELoss` replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.log_logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        logits = self.log_logit_scale.exp() * functional.normalize(query) @ functional.normalize(key).T
        target = torch.arange(len(query))
        return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2


if __name__ == "__main__":
    ours = tlk.InfoNCELoss(symmetric=True, normalize=True, learnable=True)  # the changed line
    for name, criterion in (("eager", Eager()), ("tlkernels", ours)):
        print("{:<9} loss {:.4f}, {:.0%} of the rows found".format(name, *train(criterion)))
