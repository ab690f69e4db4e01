"""Cases of cross entropy, and the PyTorch lines that it replaces, which in float64 are the oracle."""

import itertools
from typing import NamedTuple

import harness
import torch
import torch.nn.functional as F
from module_case import SUM, ModuleCase, X, Y

import tlkernels as tlk


def pytorch(input, target, weight=None, *, ignore_index=-100, reduction="mean", label_smoothing=0.0,
            temperature=1.0, softcap=None, z_loss=0.0, row_weight=None):  # fmt: skip
    """The PyTorch lines of the docstring, in the dtype of the input."""
    axis = min(input.dim() - 1, 1)
    if target.is_floating_point():
        target = target.to(input.dtype)
    x = input if softcap is None else softcap * torch.tanh(input / softcap)
    x = x / temperature
    smoothing = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    if not z_loss and row_weight is None:
        return F.cross_entropy(x, target, weight, reduction=reduction, **smoothing)
    rows = F.cross_entropy(x, target, weight, reduction="none", **smoothing)
    penalty = z_loss * torch.logsumexp(x, axis).square() if z_loss else torch.zeros_like(rows)
    if target.is_floating_point():
        count = rows.numel()
    else:
        counted = target != ignore_index
        penalty = torch.where(counted, penalty, torch.zeros_like(penalty))
        count = counted.sum() if weight is None else weight[target[counted]].sum()
    rows = rows + penalty
    rows = rows if row_weight is None else rows * row_weight
    return {"none": lambda: rows, "sum": rows.sum, "mean": lambda: rows.sum() / count}[reduction]()


class Case(NamedTuple):
    """One call; a seed gives its random numbers."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    target: str = "indices"  # or "probabilities", "probabilities32": float32 whatever the input
    weighted: bool = False
    layout: str = "contiguous"
    options: tuple[tuple[str, object], ...] = ()

    def __str__(self) -> str:
        words = ["x".join(map(str, self.shape)), str(self.dtype).removeprefix("torch."), self.target]
        words += ["weighted"] * self.weighted + [self.layout] * (self.layout != "contiguous")
        return "-".join(words + [f"{name}={value}" for name, value in self.options])

    def make(self, seed):
        """Return input, target, weight and the options."""
        generator = harness.generator(seed)
        axis = min(len(self.shape) - 1, 1)
        positions = self.shape[:axis] + self.shape[axis + 1 :]
        dense = harness.logits(self.shape, self.dtype, generator)
        if self.target == "indices":
            index = dict(self.options).get("ignore_index", -100)
            target = harness.class_indices(positions, self.shape[axis], generator, index)
        else:
            dtype = torch.float32 if self.target == "probabilities32" else self.dtype
            target = torch.randn(self.shape, generator=generator, dtype=torch.float64).mul(2).softmax(axis).to(dtype)
            target = harness.lay_out(target, self.layout)
        weight = torch.rand(self.shape[axis], generator=generator).to(self.dtype) if self.weighted else None
        options = dict(self.options)
        if "row_weight" in options:  # some 0, some negative
            row_weight = torch.randint(-2, 5, positions, generator=generator) * 0.375
            options["row_weight"] = row_weight.to(self.dtype)
        return harness.lay_out(dense, self.layout), target, weight, options

    def functions(self, target, weight, options, impl):
        """Return three losses as functions of the input: ours, eager's, the oracle's."""
        wide = harness.widened({"weight": weight, **options})
        return (
            lambda x: tlk.cross_entropy(x, target, weight, impl=impl, **options),
            lambda x: pytorch(x, target, weight, **options),
            lambda x: pytorch(x, target, **wide),
        )

    def check(self, target, most=30, first=3, place=lambda input: input):
        """Check loss and gradient against float64; `place(input)` returns the same logits in other memory."""

        def draw(seed):
            input, classes, weight, options = self.make(seed)
            with harness.forced(target) as impl:
                ours, eager, oracle = self.functions(classes, weight, options, impl)
                value = oracle(input.double())
                upstream = 0.5 + torch.rand(value.shape, generator=harness.generator(seed))
                result, grad = harness.gradients(ours, place(input), upstream)
            assert result.dtype == grad.dtype == input.dtype
            eager_result, eager_grad = harness.gradients(eager, input, upstream)
            right, right_grad = harness.gradients(oracle, input.double(), upstream.to(result.dtype).double())
            return [("loss", result, eager_result, right), ("gradient", grad, eager_grad, right_grad)]

        harness.check_budgets(self.dtype, draw, most, first)

    def for_battery(self, small=False):
        def make(seed):
            input, target, weight, options = self.make(seed)
            input = input / 20 if small else input  # smooth
            return {"input": input, "target": target, "weight": weight, **options}

        grads = ("input", "target") if small and self.target == "probabilities" else ("input",)
        grads += ("row_weight",) if "row_weight" in dict(self.options) else ()
        return harness.LossCase(f"small-{self}" if small else str(self), self.dtype, make, grads, small)


F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16

# Every combination of options, on rows with whole vectors and a tail.
SETTINGS = (("label_smoothing", 0.1), ("temperature", 2.5), ("softcap", 5.0), ("z_loss", 0.01), ("row_weight", True),
            ("reduction", "none"))  # fmt: skip
OPTIONS = [
    Case((6, 37), dtype, target, weighted, "contiguous", tuple(itertools.compress(SETTINGS, chosen)))
    for dtype in (F64, F32)
    for target in ("indices", "probabilities")
    for weighted in (False, True)
    for chosen in itertools.product((False, True), repeat=len(SETTINGS))
]

# One class; fewer than a vector; whole vectors; the longest row in registers and one more; odd; prime; a block of the
# long-row kernel and one more; several blocks. Then positions after the class axis: one vector, less, odd lines,
# several tiles, a class axis longer than a partial sum, more than two merged axes.
SHAPES = [
    (5,), (1, 1), (7, 1), (3, 2), (5, 16), (4, 64), (4, 65), (9, 129), (3, 4096), (3, 4097), (2, 12289), (300, 45),
    (2, 3, 1), (3, 1, 5), (2, 5, 16), (2, 21, 7, 41), (1, 4, 600), (2, 300, 3), (2, 3, 2, 3, 2),
]  # fmt: skip
MIXED = (("label_smoothing", 0.1), ("softcap", 8.0), ("temperature", 1.5), ("z_loss", 1e-3), ("reduction", "none"))
GRID = [
    Case(shape, dtype, target, weighted, "contiguous", options)
    for shape in SHAPES
    for dtype in (F64, F32, BF16, F16)
    for target, weighted, options in (
        ("indices", False, ()),
        ("indices", True, (*MIXED, ("row_weight", True))),
        ("probabilities", False, (("reduction", "sum"),)),
    )
]
LAID_OUT = [
    Case(shape, dtype, target, False, layout, (("label_smoothing", 0.1),))
    for layout in harness.LAYOUTS[1:]
    for shape in ((6, 37), (3, 5, 4, 18))
    for dtype in (F32, BF16)
    for target in ("indices", "probabilities", "probabilities32")
]

SMALL = [
    Case((4, 5), F64), Case((4, 5), F64, options=(*MIXED[:4], ("reduction", "none"))), Case((5,), F64, "probabilities"),
    Case((2, 3, 2), F64, weighted=True, options=(("row_weight", True), ("reduction", "sum"))),
    Case((3, 4), F64, "probabilities", True, options=(*MIXED[:4], ("row_weight", True))),
]  # fmt: skip

# For every row strategy of the CUDA kernels (csrc/cross_entropy/cuda_table.h) the numbers of classes to test: one,
# fewer than a pack, the end of a thread's part and one more, odd, several packs a thread.
ROW_STRATEGIES = {
    "lanes": (1, 17, 45, 256),
    "warp": (1, 33, 97, 128),
    "registers": (1, 9, 256, 1027),
    "shared": (1, 9, 4099),
    "cluster": (1, 9, 517, 4099),
    "large shared": (1027,),
    "sweeps": (1, 9, 4099),
}
COLUMN_STRATEGIES = {"columns": (2, 7, 8, 9), "column sweeps": (2, 7, 8, 9, 101)}
STRATEGY_OPTIONS = ((), (("z_loss", 1e-2), ("reduction", "none")), MIXED)
STRATEGY_CASES = [
    (name, Case(shape, dtype, options=options).for_battery())
    for sizes, rest in ((ROW_STRATEGIES, ()), (COLUMN_STRATEGIES, (5, 31)))
    for name, classes in sizes.items()
    for shape in [(3, count, *rest) for count in classes]
    for dtype in (F64, F32, BF16, F16)
    for options in (STRATEGY_OPTIONS[:2] if shape[1] == 1 else STRATEGY_OPTIONS)
]


def ops():
    from tlkernels.losses.cross_entropy import ops

    options = (torch.rand(5), -100, 0.1, 2.0, 3.0, 0.01, None)
    for made in (ops.NATIVE, ops.TRITON):
        for requires_grad in (False, True):
            for y in (torch.randint(0, 5, (4, 3)), torch.randn(4, 5, 3).softmax(1)):
                x, (g, peak, log_sum, entropy) = torch.randn(4, 5, 3), torch.rand(4, 4, 3)
                yield made.backward_, (g, None, None, x.clone(), y, peak, log_sum, None, *options)
                x.requires_grad_(requires_grad)
                yield made.forward, (x, y, *options)
                yield made.forward_stats, (x, y, *options)
                yield made.backward, (g, g, g, x, y, peak, log_sum, entropy, *options)
                yield made.total, (x, y, *options, g, True)
                yield made.step, (x, y, *options, g, True)
                if made.directional:
                    yield made.directional, (torch.randn(4, 5, 3), g, g, g, x.detach(), y, *options)


LOSS = harness.Loss(
    tlk.cross_entropy,
    pytorch,
    [*(case.for_battery() for case in (*GRID, *LAID_OUT)), *(case.for_battery(small=True) for case in SMALL)],
    tlk.CrossEntropyLoss,
    ops,
)
OPTIONS_OF_MODULE = {"weight": torch.arange(1.0, 6), "ignore_index": 1, "label_smoothing": 0.2, "temperature": 2.0,
                     "softcap": 1.0, "z_loss": 0.1, **SUM}  # fmt: skip
MODULE = ModuleCase(tlk.CrossEntropyLoss, tlk.cross_entropy, (X, Y), {**OPTIONS_OF_MODULE, "inplace_grad": True})
