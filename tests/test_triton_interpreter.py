"""Checks of Triton's interpreter, on which the other tests rely."""

import pytest
import torch

from tlkernels._core import triton as core
from tlkernels._core.triton.launch import launch

pytestmark = pytest.mark.skipif(not (core.INTERPRETED and core.available()), reason="needs TRITON_INTERPRET=1")


def test_bfloat16_is_rounded_to_nearest():
    import triton
    import triton.language as tl

    @triton.jit
    def convert(x, y, z, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        narrow = tl.load(x + i).to(tl.bfloat16)
        tl.store(y + i, narrow)
        tl.store(z + i, narrow.to(tl.float32))

    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4e38, 1e-40, 1.99999988])
    x = torch.cat([special, torch.randn(1016) * 100])
    y, z = torch.empty(1024, dtype=torch.bfloat16), torch.empty(1024)
    launch(convert, (1,), x, y, z, BLOCK=1024)
    torch.testing.assert_close(y, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(z, x.bfloat16().float(), rtol=0, atol=0, equal_nan=True)
