"""The blocks of a transformers model: models with fewer of them, and what they compute."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tlkernels.train.dropout import probe_inputs
from tlkernels.train.errors import RunError, UserError, listed, one_line, shown
from tlkernels.train.model import load_from

# Attributes of modules that the student need not share with the teacher.
_MODES = {"training", "gradient_checkpointing"}


def block_list(model: Any) -> tuple[str, nn.ModuleList]:
    """Return the name and the list of a transformers model's blocks.

    Raises:
        UserError: the model does not have exactly one list of as many modules as its configuration has layers. Lists
            inside such a list do not count.
    """
    kind = type(model).__name__
    config = model.config.get_text_config()
    total = getattr(config, "num_hidden_layers", None)
    if not isinstance(total, int) or hasattr(config, "depths"):
        what = "stages of several depths" if hasattr(config, "depths") else "no num_hidden_layers"
        raise UserError(f"{kind} has no list of equal blocks: its configuration has {what}")
    lists: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():  # a list comes before those inside it
        inside = any(name.startswith(f"{outer}.") for outer, _ in lists)
        if isinstance(module, nn.ModuleList) and len(module) == total and not inside:
            lists.append((name, module))
    if len(lists) != 1:
        raise UserError(f"{kind} has {len(lists)} lists of {total} blocks; expected one")
    return lists[0]


def chosen_blocks(layers: int | list[int], total: int) -> list[int]:
    """Return the numbers of the blocks that a student takes from a teacher with `total` of them, counted from 0.

    Args:
        layers: The numbers themselves, or how many: these are spread evenly from the first block to the last. A single
            one is the first, which is the only block that knows the embeddings.
        total: The teacher's number of blocks.

    Raises:
        UserError: there are no such blocks, or they are not in ascending order.
    """
    if isinstance(layers, int):
        if not 1 <= layers <= total:
            raise UserError(f"--student.layers must be from 1 to {total}, the teacher's number of blocks, got {layers}")
        return [round(i * (total - 1) / max(layers - 1, 1)) for i in range(layers)]
    in_range = all(0 <= block < total for block in layers)
    if not layers or not in_range or layers != sorted(set(layers)):
        raise UserError(
            f"--student.layers must be different blocks of the teacher, from 0 to {total - 1}, in ascending order, "
            f"got {shown(layers)}"
        )
    return list(layers)


def with_blocks(model: Any, blocks: list[int]) -> Any:
    """Return a new model that has only these blocks of `model`, with copies of its weights in float32.

    A block keeps what its number meant in `model`, such as its kind of attention. The new model is compared with
    `model` without the other blocks, on a few tokens or pixels; `model` is left in the mode that it was in.

    Args:
        model: a transformers.PreTrainedModel in float32.
        blocks: what `chosen_blocks` returned.

    Raises:
        UserError: a model of this class cannot be cut so that it computes what its blocks compute in `model`.
    """
    name, teacher_blocks = block_list(model)
    try:
        config = _cut_config(model.config, blocks, len(teacher_blocks))
        with torch.random.fork_rng(devices=[]):
            student = type(model)._from_config(config, dtype=torch.float32)
        student.load_state_dict(_cut_weights(model.state_dict(), name, blocks))
        if model.can_generate():
            student.generation_config = copy.deepcopy(model.generation_config)
        student.to(model.device)
        _check_attributes(teacher_blocks, student.get_submodule(name), blocks)
        _check_outputs(model, student, teacher_blocks, blocks)
    except Exception as error:  # of transformers' classes, which raise anything
        raise UserError(
            f"--student.layers: {type(model).__name__} cannot be cut to the blocks {listed([str(b) for b in blocks])}: "
            f"{one_line(error)}"
        ) from error
    return student


def _cut_config(config: Any, blocks: list[int], total: int) -> Any:
    """Return the configuration of a model with only these blocks, as it will be after saving and loading."""
    text, options = config.get_text_config(), config.to_dict()
    changed = options
    if text is not config:
        parts = {key: part for key in config.sub_configs if (part := getattr(config, key)) is not None}
        others = [key for key, part in parts.items() if part is not text]
        if others:
            raise UserError(f"it is not a model of texts alone: its configuration has {listed(others)}")
        changed = options[next(key for key, part in parts.items() if part is text)]
    for key in ("out_features", "out_indices"):  # of a backbone; the default is the last block
        changed.pop(key, None)
    common = transformers.PreTrainedConfig().to_dict()  # these are not of layers
    for key, value in changed.items():
        if isinstance(value, list | tuple) and len(value) == total and key not in common and "token" not in key:
            changed[key] = [value[block] for block in blocks]
    changed[text.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(blocks)
    cut = type(config).from_dict(options)
    cut._attn_implementation = config._attn_implementation  # is not saved
    return cut


def _cut_weights(weights: dict[str, Tensor], name: str, blocks: list[int]) -> dict[str, Tensor]:
    """Return the weights without those of the other blocks, and with the chosen blocks numbered from 0."""
    numbers = {str(block): str(number) for number, block in enumerate(blocks)}
    kept = {}
    for key, value in weights.items():
        if key.startswith(f"{name}."):
            block, _, rest = key.removeprefix(f"{name}.").partition(".")
            if block not in numbers:
                continue
            key = f"{name}.{numbers[block]}.{rest}"
        kept[key] = value
    return kept


def _check_attributes(teacher: nn.ModuleList, student: nn.ModuleList, blocks: list[int]) -> None:
    """Compare the options that the blocks' modules hold, such as the window of the attention.

    The few tokens of `_check_outputs` cannot show a window that is longer.
    """
    for number, block in enumerate(blocks):
        pairs = zip(teacher[block].named_modules(), student[number].named_modules(), strict=True)
        for (name, expected), (_, found) in pairs:
            for key, value in vars(expected).items():
                if key.startswith("_") or key in _MODES or "drop" in key or isinstance(expected, nn.Dropout):
                    continue
                other = vars(found).get(key)
                if isinstance(value, int | float | str | None) and value != other and (value, other) != (block, number):
                    where = f"{name}.{key}".lstrip(".")
                    raise UserError(f"{where} of block {block} would be {shown(other)}, it is {shown(value)}")


def _check_outputs(model: Any, student: Any, teacher_blocks: nn.ModuleList, blocks: list[int]) -> None:
    """Compare the student with the teacher whose other blocks return their input."""
    inputs = probe_inputs(model)
    training = model.training
    model.eval()
    student.eval()
    try:
        with torch.no_grad():
            found = student(**inputs)[0]
            with _skipped([block for n, block in enumerate(teacher_blocks) if n not in blocks]):
                expected = model(**inputs)[0]
    finally:
        model.train(training)
        student.train(training)
    error, scale = (found - expected).abs().max(), expected.abs().max()
    if not error <= 1e-4 * scale:
        raise UserError(f"its output differs by {error:.2g} from that of the teacher's blocks (at most {scale:.2g})")


@contextmanager
def _skipped(modules: list[nn.Module]) -> Iterator[None]:
    def skip(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handles = [module.register_forward_hook(skip, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def from_config(file: str, teacher_model: Any, causal: bool | None, seed: int) -> Any:
    """Return a model of a configuration, with random weights that depend on `seed`, in float32.

    Args:
        file: config.json, or its folder.
        teacher_model: the transformers model whose vocabulary it must have.
        causal: whether it is a causal language model, or a masked one; None: an encoder without a head.
        seed: of the random weights.

    Raises:
        UserError: there is no such file, no such model, or it has another number of tokens than the teacher.
    """
    path = Path(file).expanduser()
    if not path.is_file() and not (path / "config.json").is_file():
        raise UserError(f"--student.config: expected a config.json or its folder, got {file}")
    config = load_from(transformers.AutoConfig, str(path))
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"--student.config: {file} is an encoder-decoder; expected an encoder or a decoder")
    found, expected = (getattr(c.get_text_config(), "vocab_size", None) for c in (config, teacher_model.config))
    if found != expected:
        raise UserError(f"--student.config: vocab_size must be {expected}, as in the teacher, got {found}")
    auto: Any = {
        True: transformers.AutoModelForCausalLM,
        False: transformers.AutoModelForMaskedLM,
        None: transformers.AutoModel,
    }[causal]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return auto.from_config(config, dtype=torch.float32, trust_remote_code=False)
        except (ValueError, RuntimeError, ImportError) as error:
            raise UserError(f"--student.config: cannot make {auto.__name__} of {file}: {one_line(error)}") from error


class BlockOutputs:
    """The hidden states after some blocks of a model in one forward pass, with autograd.

    Those after the last block are not normalised yet. Call the model once inside, and `backward` outside, where
    activation checkpointing runs the blocks again:

        with BlockOutputs(model, [1, 3]) as outputs:
            model(input_ids=tokens)
        outputs.values[3]

    Attributes:
        values: the output of each block, `(rows, tokens, width)`, by its number.
    """

    values: dict[int, Tensor]

    def __init__(self, model: Any, blocks: list[int]) -> None:
        """Choose the blocks. Raises `UserError` if the model has no list of blocks."""
        self._model, self._list = type(model).__name__, block_list(model)[1]
        self._blocks = blocks
        self._handles: list[RemovableHandle] = []
        self.values = {}

    def __enter__(self) -> BlockOutputs:
        """Add the hooks."""
        self.values = {}
        for number in self._blocks:
            self._handles.append(self._list[number].register_forward_hook(self._hook(number)))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Remove the hooks. Raises `RunError` if a block was not called."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        missing = [str(number) for number in self._blocks if number not in self.values]
        if missing and kind is None:
            raise RunError(f"{self._model} did not call its blocks {listed(missing)}; expected one call of each")

    def _hook(self, number: int) -> Any:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            if number in self.values:
                raise RunError(f"{self._model} called its block {number} twice; expected one call")
            self.values[number] = output[0] if isinstance(output, tuple) else output

        return keep


def same_vocabulary(teacher_tokenizer: Any, student_tokenizer: Any, teacher_rows: int, student_rows: int) -> None:
    """Check that two models number their tokens alike, as the loss compares their logits one by one.

    Raises:
        UserError: a token has another number, or one of the heads has more rows.
    """
    teacher, student = teacher_tokenizer.get_vocab(), student_tokenizer.get_vocab()
    for token in sorted(teacher | student, key=lambda token: teacher.get(token, len(teacher) + student.get(token, 0))):
        ids = [str(vocabulary.get(token, "missing")) for vocabulary in (teacher, student)]
        if ids[0] != ids[1]:
            raise UserError(
                f"the student has another vocabulary: the token {shown(token)} is {ids[0]} in the teacher and {ids[1]} "
                "in the student"
            )
    if teacher_rows != student_rows:
        raise UserError(
            f"the student has another vocabulary: its head has {student_rows} rows, that of the teacher {teacher_rows}"
        )
