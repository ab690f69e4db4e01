"""A training loop in plain PyTorch with one line changed: nn.CrossEntropyLoss becomes tlk.CrossEntropyLoss."""

import torch
from torch import nn

import tlkernels as tlk


def losses(criterion: nn.Module) -> list[float]:
    """Train a small network on random data and return the loss of every step."""
    torch.manual_seed(0)
    inputs, target = torch.randn(512, 64), torch.randint(1000, (512,))
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 1000))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    history = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = criterion(model(inputs), target)
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    return history


if __name__ == "__main__":
    before = losses(nn.CrossEntropyLoss(label_smoothing=0.1))
    after = losses(tlk.CrossEntropyLoss(label_smoothing=0.1))  # the changed line
    print(f"loss {after[0]:.4f} -> {after[-1]:.4f}")
    largest = max(abs(a - b) for a, b in zip(after, before, strict=True))
    print(f"largest difference to PyTorch over {len(after)} steps: {largest:.1e}")
