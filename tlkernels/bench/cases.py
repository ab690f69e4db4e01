"""The cases of `tlkernels bench`: the losses, sizes and dtypes that a user asks for."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tlkernels.bench import losses
from tlkernels.bench.cost import COSTS
from tlkernels.bench.work import Case, Shape
from tlkernels.train.errors import UserError, one_line

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float64": torch.float64,
    "fp64": torch.float64,
}
USUAL: Mapping[str, Mapping[tuple[str, ...], Shape]] = {
    "cpu": {
        ("N", "V"): (2048, 32000),
        ("N", "H", "V"): (1024, 384, 30522),
        ("N", "H", "T", "V"): (512, 384, 384, 30522),
        ("N", "D"): (4096, 384),
    },
    "cuda": {
        ("N", "V"): (16384, 32000),
        ("N", "H", "V"): (4096, 4096, 128256),
        ("N", "H", "T", "V"): (4096, 4096, 4096, 128256),
        ("N", "D"): (16384, 1024),
    },
}
"""Sizes by the names of the sizes, where the user gives none."""
OF_A_MODEL = ("linear_cross_entropy", "cross_entropy", "linear_distillation")
"""Losses for --from-model, where the user gives none."""


def parse_shape(text: str) -> Shape:
    """Return the sizes in "8192x32000". Raises `UserError` if they are not positive whole numbers."""
    sizes = text.lower().replace("×", "x").split("x")
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise UserError(f"--shape: expected sizes such as 8192x32000, got {text!r}")
    return tuple(map(int, sizes))


def parse_dtype(name: str) -> torch.dtype:
    """Return the dtype. Raises `UserError` if the name is unknown."""
    if name not in DTYPES:
        raise UserError(f"--dtype: expected one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def parse_options(given: Sequence[str]) -> dict[str, Any]:
    """Return the options in ["label_smoothing=0.1", "inplace_grad"]; one without a value is True."""
    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        try:
            found[name] = ast.literal_eval(value) if equals else True
        except (ValueError, SyntaxError):
            found[name] = value  # a word, such as "sum"
    return found


def fits(loss: str, shape: Shape) -> bool:
    """Return whether a loss has this number of sizes; cross entropy's classes may be followed by positions."""
    return len(shape) == len(COSTS[loss].dims) or (loss == "cross_entropy" and len(shape) > 2)


def _chosen(loss: str, shapes: Sequence[Shape], named: Sequence[str]) -> list[Shape]:
    """Return the shapes for a loss: sizes that are exactly those of another loss are no positions of cross entropy."""
    exact = {len(COSTS[name].dims) for name in named}
    return [
        shape
        for shape in shapes
        if fits(loss, shape) and (len(shape) == len(COSTS[loss].dims) or len(shape) not in exact)
    ]


def selected(
    names: Sequence[str], shapes: Sequence[Shape], device: str, model: Mapping[tuple[str, ...], Shape] | None = None
) -> Iterator[tuple[str, Shape]]:
    """Yield each loss with each of the shapes that fit it; without shapes, with those of a model or the usual ones.

    Raises:
        UserError: a loss is unknown, or a loss or a shape has no partner.
    """
    for name in names:
        if name not in COSTS:
            raise UserError(f"--loss: expected one of {', '.join(COSTS)}, got {name!r}")
    losses_named = list(names) or [name for name in (OF_A_MODEL if model else COSTS)]
    if not names and shapes:
        exact = [name for name in COSTS if any(len(shape) == len(COSTS[name].dims) for shape in shapes)]
        losses_named = exact or ["cross_entropy"]
    for shape in shapes:
        if not any(fits(name, shape) for name in losses_named):
            expected = "; ".join(f"{'x'.join(COSTS[name].dims)} for {name}" for name in losses_named or COSTS)
            raise UserError(f"--shape: expected {expected}; got {'x'.join(map(str, shape))}")
    for name in losses_named:
        dims = COSTS[name].dims
        chosen = _chosen(name, shapes, losses_named) if shapes else [(model or USUAL[device])[dims]]
        if not chosen:
            raise UserError(f"--shape: {name} has the sizes {'x'.join(dims)}, and none was given")
        yield from ((name, shape) for shape in chosen)


def of_model(path: str, batch: str) -> dict[tuple[str, ...], Shape]:
    """Return the sizes of the losses on a model: `path` is its folder or .gguf file, `batch` such as 8x512.

    The rows are the tokens of a batch. For losses on embeddings they are its sequences.

    Raises:
        UserError: transformers is missing, or the model or the batch cannot be read.
    """
    sizes = parse_shape(batch)
    if len(sizes) != 2:
        raise UserError(f"--batch: expected sequences x tokens, such as 8x512, got {batch!r}")
    if importlib.util.find_spec("transformers") is None:
        raise UserError("--from-model needs transformers: pip install 'tlkernels[hf]'")
    import transformers

    place, more = Path(path), {}
    if place.suffix == ".gguf":
        place, more = place.parent, {"gguf_file": place.name}
    if not (place / more.get("gguf_file", "config.json")).is_file():
        raise UserError(f"--from-model: expected a folder with a config.json or a .gguf file, got {path!r}")
    try:
        config = transformers.AutoConfig.from_pretrained(str(place), **more).get_text_config()
        features, classes = int(config.hidden_size), int(config.vocab_size)
    except Exception as error:
        raise UserError(f"--from-model: {path} has no vocabulary and hidden size: {one_line(error)}") from error
    tokens = sizes[0] * sizes[1]
    return {
        ("N", "V"): (tokens, classes),
        ("N", "H", "V"): (tokens, features, classes),
        ("N", "H", "T", "V"): (tokens, features, features, classes),
        ("N", "D"): (sizes[0], features),
    }


def case_of(
    loss: str,
    shape: Shape,
    dtype: torch.dtype,
    device: str,
    contestants: tuple[str, ...],
    options: Mapping[str, Any],
    seconds: float,
    cold: bool,
    peers: bool,
) -> Case:
    """Return a case, after a try at a small size. Raises `UserError` if the loss does not take the sizes or options."""
    if loss in ("nt_xent", "sup_con") and (shape[0] < 16 or shape[0] % 2):
        raise UserError(f"--shape: {loss} counts the rows of two views, an even N of at least 16; got N={shape[0]}")
    make = losses.masked_linear_cross_entropy if "counted" in options else getattr(losses, loss)
    case = Case(
        loss, shape, dtype, make, {}, contestants, options, seconds=seconds, device=device, cold=cold, peers=peers
    )
    try:
        small = Case(loss, tuple(min(size, 8) for size in shape), dtype, make, options=options, device=device).work()
        small.ours(*small.inputs)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{loss}, {', '.join(f'{key}={value}' for key, value in options.items())}: {error}") from error
    return case
