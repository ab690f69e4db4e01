"""The network of `tlkernels contrast`: one or two encoders, and the scale of their similarities."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional

from tlkernels.train.contrast_config import ContrastLossConfig, EncodersConfig
from tlkernels.train.dropout import without_dropout
from tlkernels.train.errors import UserError, one_line
from tlkernels.train.images import to_rgb
from tlkernels.train.model import load_encoder, load_preprocessor, pooled

MAX_SCALE = 100.0  # of a learned one, as in CLIP
_KEY = "key"  # the subfolder of the second encoder


class Encoders(nn.Module):
    """An encoder of queries, one of keys, which may be the same, and the parameters of the loss.

    Attributes:
        query, key: transformers encoders; `key` is None if one encoder does both.
        maps: the linear maps of the two, or identities.
        log_scale: the logarithm of what the similarities are multiplied by.
        bias: what is added to them (SigLIP), or None.
    """

    def __init__(
        self, query: Any, key: Any | None, widths: list[int], loss: ContrastLossConfig, config: EncodersConfig
    ) -> None:
        """Add new maps, from the present random numbers; `widths` are those of the encoders."""
        super().__init__()
        self.query, self.key = query, key
        size = config.dimensions
        if size is None and len(set(widths)) > 1:
            raise UserError(f"--model.dimensions must be given: the encoders' widths are {widths[0]} and {widths[1]}")
        self.maps = nn.ModuleList(
            nn.Identity() if size is None else nn.Linear(width, size, bias=False) for width in widths
        )
        # Of shape (1,), since FSDP2 takes no scalars.
        self.log_scale = nn.Parameter(torch.tensor([-math.log(loss.temperature)]), requires_grad=loss.learnable)
        self.bias = nn.Parameter(torch.tensor([loss.bias])) if loss.name == "sigmoid" else None

    def forward(self, rows: dict[str, Any], loss: Callable[..., Tensor]) -> Tensor:
        """Return `loss(query, key, negatives, ids, labels, scale, bias)` of the embeddings; what is absent is None.

        Data parallelism has its hooks here, which is why the loss is computed inside.
        """
        query = self.embed(rows["query"])
        key = None if rows["key"] is None else self.embed(rows["key"], key=True)
        negatives = None if rows["negatives"] is None else self.embed(rows["negatives"], key=True)
        if self.log_scale.requires_grad:
            self.log_scale.data.clamp_(max=math.log(MAX_SCALE))  # .data: to autograd, no weight has changed
        scale, bias = self.log_scale.exp().squeeze(), None if self.bias is None else self.bias.squeeze()
        return loss(query, key, negatives, rows["ids"], rows["labels"], scale, bias)

    def embed(self, inputs: dict[str, Tensor], key: bool = False) -> Tensor:
        """Return the embeddings of queries or of keys, of 2-norm 1."""
        encoder = self.key if key and self.key is not None else self.query
        features = self.maps[-1 if key else 0](pooled(encoder, inputs))
        return functional.normalize(features, dim=-1)


def new_encoders(
    names: list[str], loss: ContrastLossConfig, config: EncodersConfig, dropout: bool, seed: int
) -> Encoders:
    """Return the pretrained encoders of one or two models; new maps depend on `seed`.

    Raises:
        UserError: a model cannot be read, is not an encoder, or the encoders have different widths.
    """
    loaded = [load_encoder(name) for name in names]
    for (encoder, _), name in zip(loaded, names, strict=True):
        if not dropout:
            without_dropout(encoder, name)
    torch.manual_seed(seed)
    encoders = [encoder for encoder, _ in loaded]
    return Encoders(encoders[0], encoders[1] if len(encoders) > 1 else None, [w for _, w in loaded], loss, config)


def save_encoders(folder: Path, network: Any, preprocessors: list[Any], about: dict[str, Any]) -> None:
    """Write everything that `load_encoders` needs. The folder, and `key` in it, are models of transformers."""
    for encoder, preprocessor, place in zip(
        (network.query, network.key), (preprocessors * 2)[:2], (folder, folder / _KEY), strict=True
    ):
        if encoder is not None:
            encoder.save_pretrained(place)
            preprocessor.save_pretrained(place)
    others = {name: value for name, value in network.state_dict().items() if name.split(".")[0] not in ("query", "key")}
    others = {name: value.detach().cpu().contiguous() for name, value in others.items()}
    safetensors.torch.save_file(others, folder / "contrast.safetensors")
    (folder / "about.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def read_encoders(
    folder: Path, loss: ContrastLossConfig, config: EncodersConfig, dropout: bool
) -> tuple[Encoders, dict[str, Any]]:
    """Return the network that `save_encoders` wrote, bit for bit, and its `about`.

    Raises:
        UserError: the folder does not have them.
    """
    try:
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        names = [str(folder), *([str(folder / _KEY)] if (folder / _KEY).is_dir() else [])]
        network = new_encoders(names, loss, config, dropout, seed=0)
        missing, unexpected = network.load_state_dict(
            safetensors.torch.load_file(folder / "contrast.safetensors"), strict=False
        )
        wrong = [*(name for name in missing if name.split(".")[0] not in ("query", "key")), *unexpected]
        if wrong:
            raise ValueError(f"other tensors than {wrong[0]} were expected")
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} has no encoders of tlkernels contrast: {one_line(error)}") from error
    return network, about


@dataclass(frozen=True)
class Embedder:
    """Trained encoders: embeddings of texts, or of PIL images if a side was trained on them."""

    network: Encoders
    preprocessors: list[Any]
    lengths: list[int]
    images: list[bool]

    def queries(self, values: list[Any], batch_size: int = 32) -> Tensor:
        """Return the embeddings of queries, `(values, dimensions)`, of 2-norm 1."""
        return self._embed(values, 0, batch_size)

    def keys(self, values: list[Any], batch_size: int = 32) -> Tensor:
        """Return the embeddings of keys; their products with those of queries are cosine similarities."""
        return self._embed(values, 1, batch_size)

    @torch.no_grad()
    def _embed(self, values: list[Any], side: int, batch_size: int) -> Tensor:
        process, parts = self.preprocessors[side], []
        for start in range(0, len(values), batch_size):
            chosen = values[start : start + batch_size]
            if self.images[side]:
                inputs = {
                    "pixel_values": process(images=[to_rgb(one) for one in chosen], return_tensors="pt")["pixel_values"]
                }
            else:
                cut = {"truncation": True, "max_length": self.lengths[side]}
                encoded = process(chosen, **cut, padding=True, return_tensors="pt")
                inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
            parts.append(self.network.embed(inputs, key=bool(side)))
        return torch.cat(parts)


def load_embedder(run_folder: Path) -> Embedder:
    """Return the best encoders of a run of `tlkernels contrast`, in evaluation mode on the CPU.

    Raises:
        UserError: the folder has none.
    """
    from tlkernels.train.contrast_config import ContrastConfig

    config = ContrastConfig.load(run_folder / "config.json")
    best = run_folder / "trained" / "best"
    network, about = read_encoders(best, config.loss, config.model, dropout=True)
    places = [best, best / _KEY if network.key is not None else best]
    images = about["images"]
    preprocessors = [load_preprocessor(str(place), image) for place, image in zip(places, images, strict=True)]
    return Embedder(network.eval(), preprocessors, about["lengths"], images)
