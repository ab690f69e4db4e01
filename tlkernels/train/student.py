"""The students that distillation begins with, and whether a student and its teacher fit together."""

from __future__ import annotations

import math
from typing import Any

import torch

from tlkernels.train import language
from tlkernels.train.blocks import block_list, chosen_blocks, from_config, same_vocabulary, with_blocks
from tlkernels.train.distill_config import DistillClassifierConfig, DistillConfig, HintConfig, StudentConfig
from tlkernels.train.dropout import without_dropout
from tlkernels.train.errors import UserError
from tlkernels.train.language import LanguageModel
from tlkernels.train.lm_config import LmModelConfig
from tlkernels.train.model import (
    Classifier,
    load_encoder,
    load_preprocessor,
    position_offset,
    positions,
    source,
    width_of,
)
from tlkernels.train.packed_inputs import takes_additive_mask, verify_packing

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
        packaged = config.teacher.path in (None, "smollm2")
        network = LanguageModel(_cut(teacher.model, student, _SMOLLM2_LAYERS if packaged else None))
        if network.bias is not None and teacher.bias is not None:
            network.bias.data.copy_(teacher.bias)
    network.requires_grad_(True)
    if not student.dropout:
        without_dropout(network.model, "the student", "--student.dropout")
    return network


def new_classifier_student(config: DistillClassifierConfig, teacher: Classifier, preprocessor: Any) -> Classifier:
    """Return the student of a classifier with the weights that it begins with, the head those of the teacher's blocks.

    Raises:
        UserError: there is no such model, its tokens are not those of the teacher, or the teacher cannot be cut.
    """
    student = config.student
    if student.path is not None:
        encoder, width = load_encoder(source(student.path))
        if encoder.main_input_name == "input_ids":
            own = load_preprocessor(source(student.path), images=False)
            sizes = [len(model.get_input_embeddings().weight) for model in (teacher.encoder, encoder)]
            same_vocabulary(preprocessor, own, *sizes)
    elif student.config is not None:
        encoder = from_config(student.config, teacher.encoder, None, config.run.seed)
        width = width_of(encoder.config)
    else:
        encoder, width = _cut(teacher.encoder, student), teacher.head.in_features
    encoder.requires_grad_(True)
    if not student.dropout:
        without_dropout(encoder, "the student", "--student.dropout")
    torch.manual_seed(config.run.seed)
    network = Classifier(encoder, width, teacher.head.out_features)
    if student.path is None and student.config is None:
        network.head.load_state_dict(teacher.head.state_dict())
    return network


def _cut(model: Any, config: StudentConfig, usual: int | None = None) -> Any:
    """Return the blocks of a teacher that a student begins with; half of them if neither says how many."""
    total = len(block_list(model)[1])
    layers = config.layers or (usual if usual is not None and usual < total else math.ceil(total / 2))
    return with_blocks(model, chosen_blocks(layers, total))


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
    check_hints(config.hints, student.model, teacher.model)


def check_hints(hints: HintConfig, student: Any, teacher: Any) -> None:
    """Raise `UserError` unless the two transformers models have the blocks of the hints."""
    for place, (whose, model) in enumerate((("student", student), ("teacher", teacher))):
        total = len(block_list(model)[1]) if hints.blocks else 0
        for pair in hints.blocks:
            if not 0 <= pair[place] < total:
                raise UserError(
                    f"--hints.blocks: the {whose} has the blocks 0 to {total - 1}, got {pair[place]} in {list(pair)}"
                )


def head_rows(network: LanguageModel) -> int:
    """Return the number of rows of a network's head."""
    head = network.head
    return len(network.model.get_input_embeddings().weight if head is None else head.linear.weight)
