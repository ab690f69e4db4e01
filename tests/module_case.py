"""The case of a loss's module for tests/test_modules.py: `MODULE` in tests/<loss>_cases.py."""

from typing import NamedTuple

import torch

X, Y = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3, 1, 0])
"""Logits and class indices."""
A, B = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(1)).unbind()
"""Features."""
W, V = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(2)).unbind()
"""Weights of linear layers."""
SUM = {"reduction": "sum", "impl": "reference"}
SCALE = {"temperature": 0.5, "logit_scale": torch.tensor([3.0])}


class ModuleCase(NamedTuple):
    make: type
    function: object
    tensors: tuple
    options: dict
    """For each option of the constructor, a value other than the default."""
    base: dict = {}  # noqa: RUF012
    """Arguments that the constructor needs, or that make each option matter."""

    def build(self, **options):
        torch.manual_seed(3)  # for a layer's weights
        return self.make(**{**self.base, **options})

    def expected(self, module, **options):
        """Return the function's result with these options; other tests compare the function with float64."""
        options = {**{k: v for k, v in self.base.items() if k in self.options}, **options}
        tensors = self.tensors
        if hasattr(module, "linear"):
            features, *others = tensors
            tensors = features, module.linear.weight, *others
        return self.function(*tensors, **options)
