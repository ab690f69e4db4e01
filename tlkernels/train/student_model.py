"""The student that `tlkernels distill` begins with, and whether it and its teacher fit together."""

from __future__ import annotations

import math
from typing import Any

from tlkernels.train import language
from tlkernels.train.distill_config import DistillConfig
from tlkernels.train.errors import UserError
from tlkernels.train.language import LanguageModel
from tlkernels.train.lm_config import LmModelConfig
from tlkernels.train.model import load_preprocessor, position_offset, positions
from tlkernels.train.packed_inputs import takes_additive_mask, verify_packing
from tlkernels.train.student import block_list, chosen_blocks, from_config, same_vocabulary, with_blocks

_SMOLLM2_LAYERS = 10  # of 30, so that the demonstration's student is small beside its head


def new_student(config: DistillConfig, teacher: LanguageModel, causal: bool) -> LanguageModel:
    """Return the student with the weights that it begins with.

    Raises:
        UserError: there is no such model, or the teacher cannot be cut to its blocks.
    """
    student, options = config.student, LmModelConfig(dropout=config.student.dropout)
    if student.path is not None:
        name, extra = language.find(student.path)
        if language.is_causal(name, extra, config.teacher.objective) != causal:
            raise UserError("--student.path must be causal if the teacher is, and otherwise masked")
        return language.new_model(name, extra, causal, options)
    if student.config is not None:
        kind = causal or (None if teacher.head is None else False)
        network = LanguageModel(from_config(student.config, teacher.model, kind, config.run.seed))
    else:
        total = len(block_list(teacher.model)[1])
        packaged = config.teacher.path in (None, "smollm2") and total > _SMOLLM2_LAYERS
        layers = student.layers or (_SMOLLM2_LAYERS if packaged else math.ceil(total / 2))
        network = LanguageModel(with_blocks(teacher.model, chosen_blocks(layers, total)))
        if network.bias is not None and teacher.bias is not None:
            network.bias.data.copy_(teacher.bias)
    network.requires_grad_(True)
    if not student.dropout:
        language.without_dropout(network.model, "the student")
    return network


def check_student(
    config: DistillConfig, teacher: LanguageModel, student: LanguageModel, tokenizer: Any, length: int, causal: bool
) -> None:
    """Raise `UserError` unless the student and the hints fit the teacher, whose rows have up to `length` tokens."""
    for whose, network in (("teacher", teacher), ("student", student)):
        head = network.head
        if head is not None and head.temperature != 1 and head.softcap is not None:
            raise UserError(f"the {whose}'s head has a scale and a softcap, which distillation cannot combine")
    if config.student.path is not None:
        name, extra = language.find(config.student.path)
        own = load_preprocessor(name, images=False, **extra)
        same_vocabulary(tokenizer, own, head_rows(teacher), head_rows(student))
    limit = positions(student.model)
    if limit is not None and limit < length:
        raise UserError(f"--data.length must be at most {limit}, the student's positions, got {length}")
    own_ways, ways = ((position_offset(n.model), takes_additive_mask(n.model)) for n in (student, teacher))
    if own_ways != ways:
        raise UserError("the student numbers its positions, or masks its attention, in another way than the teacher")
    if config.data.pack:
        verify_packing(student.model, "the student", length, causal=causal)
    for place, (whose, network) in enumerate((("student", student), ("teacher", teacher))):
        total = len(block_list(network.model)[1]) if config.hints.blocks else 0
        for pair in config.hints.blocks:
            if not 0 <= pair[place] < total:
                raise UserError(
                    f"--hints.blocks: the {whose} has the blocks 0 to {total - 1}, got {pair[place]} in {list(pair)}"
                )


def head_rows(network: LanguageModel) -> int:
    """Return the number of rows of a network's head."""
    head = network.head
    return len(network.model.get_input_embeddings().weight if head is None else head.linear.weight)
