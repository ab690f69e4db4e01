"""What the tests of profiles share: models that sleep in known places, and a loop."""

import sys
import time
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import data

import tlkernels as tlk
from tlkernels.bench import ceilings
from tlkernels.profiling import profile, replay

CLASSES, WIDTH, LENGTH, ROWS = 50, 16, 6, 4
CEILING = 5e9


@contextmanager
def quickly(monkeypatch):
    """A replay of three rounds; the ceiling is a number, since measuring it takes seconds. Nothing was compiled yet."""
    if "torch._dynamo.utils" in sys.modules:
        sys.modules["torch._dynamo.utils"].counters.clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(replay, "SECONDS", 0.0)
    monkeypatch.setattr(replay, "peak_bytes", lambda run: (run(), 1000)[1])  # without collecting all garbage
    monkeypatch.setattr(ceilings, "matmul", lambda device, dtype: torch.randn(3) is not None and CEILING)
    yield
    torch.set_num_threads(threads)


class Rows(data.Dataset):
    def __init__(self, seconds=0.0):
        self.seconds = seconds
        self.ids = torch.randint(CLASSES, (2000, LENGTH), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, row):
        time.sleep(self.seconds)
        return self.ids[row]


class SlowBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, seconds):
        ctx.seconds = seconds
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        time.sleep(ctx.seconds)
        return grad, None


class SlowHead(nn.Linear):
    """Sleeps in the forward and in the backward."""

    forward_seconds = backward_seconds = 0.0

    def forward(self, x):
        time.sleep(self.forward_seconds)
        return super().forward(SlowBackward.apply(x, self.backward_seconds))


class Net(nn.Module):
    def __init__(self, dropout=0.0, trunk_seconds=(0.0, 0.0)):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(CLASSES, WIDTH)
        self.trunk = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(dropout))
        self.head = SlowHead(WIDTH, CLASSES)
        self.trunk_seconds = trunk_seconds

    def hidden(self, ids):
        time.sleep(self.trunk_seconds[0])
        return SlowBackward.apply(self.trunk(self.embedding(ids)), self.trunk_seconds[1])

    def forward(self, ids):
        return self.head(self.hidden(ids))


class LossInside(Net):
    def forward(self, ids):
        return tlk.linear_cross_entropy(self.hidden(ids), self.head.weight, ids, linear_bias=self.head.bias)


class Tied(Net):
    def forward(self, ids):
        return F.linear(self.hidden(ids), self.embedding.weight)


class SlowSGD(torch.optim.SGD):
    seconds = 0.0

    def step(self, closure=None):
        time.sleep(self.seconds)
        return super().step(closure)


def eager(logits, ids):
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten())


def ours(logits, ids):
    return tlk.cross_entropy(logits.flatten(0, 1), ids.flatten())


def train(net, loss, folder, *, steps=1000, micro=1, seconds=0.0, optimiser=None, given=True, **options):
    """Train until all is measured; return the profile."""
    optimiser = optimiser or SlowSGD(net.parameters(), lr=0.1)
    loader = iter(data.DataLoader(Rows(seconds), batch_size=ROWS))
    options = {"steps": 3, "warmup": 2, "compare": False} | options
    with profile(net if given else None, folder=folder, **options) as p:
        for _ in range(steps):
            for ids in (next(loader) for _ in range(micro)):
                output = net(ids)
                (output if loss is None else loss(output, ids)).div(micro).backward()
            optimiser.step()
            optimiser.zero_grad()
            if p.step():
                break
    return p


def phases_of(p):
    return {row["name"]: row["seconds"] for row in p.result["phases"]}
