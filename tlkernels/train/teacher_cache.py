"""The most probable classes of a teacher, stored once, so that the training of a student needs no teacher.

A cache is a folder. `identity.json` says what it belongs to, and is written first. Then come the shards, each for a
fixed number of consecutive rows, and at the end `manifest.json`. Every file appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tlkernels.train.checkpoint import to_disk, write_file
from tlkernels.train.errors import RunError, UserError, one_line

SHARD_ROWS = 128  # 4 MB with 256 tokens a row, 32 classes a token and a vocabulary of at most 65536

Teacher = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Row numbers -> the classes and their log-probabilities, each (tokens of these rows, K)."""


@dataclass(frozen=True)
class Identity:
    """What a cache belongs to.

    Attributes:
        teacher: `file_digest` of the teacher, or its name on a hub with the commit.
        tokenizer: `tokenizer_digest`.
        rows: the fingerprint of the training rows.
        vocabulary: the number of the teacher's classes.
    """

    teacher: str
    tokenizer: str
    rows: str
    vocabulary: int


@dataclass(frozen=True)
class _Shard:
    """The tensors of one file; of mapped files, only the pages that are used are read.

    Rounding to float16 changes a log-probability by up to 2^-11 of it. That is little for each class, but much for the
    probability of all other classes, which is 1 minus a sum near 1: so the log of that sum is stored in float32.
    """

    counts: Tensor  # int32, (rows,): tokens of each row
    index: Tensor  # uint16 or int32, (tokens, K)
    log_probs: Tensor  # float16, (tokens, K)
    log_mass: Tensor  # float32, (tokens,)


def file_digest(folder: Path, file: str | None) -> str:
    """Return a digest of a model's configuration and weights, or of one file of its folder, such as a GGUF file.

    It covers the names and the whole contents.

    Raises:
        UserError: a file is missing or cannot be read.
    """
    names = [file] if file is not None else ["config.json", *sorted(path.name for path in folder.glob("*.safetensors"))]
    if file is None and len(names) == 1:
        raise UserError(f"the teacher's folder {folder} has no *.safetensors")
    digest = hashlib.blake2b(digest_size=16)
    for name in names:
        try:
            with (folder / name).open("rb") as handle:
                contents = hashlib.file_digest(handle, lambda: hashlib.blake2b(digest_size=16))
        except OSError as error:
            raise UserError(f"cannot read the teacher's file {folder / name}: {one_line(error)}") from error
        digest.update(f"{name} {contents.hexdigest()}\n".encode())
    return digest.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """Return a digest of a tokenizer's vocabulary, added tokens and chat template."""
    added = {number: [token.content, token.special] for number, token in tokenizer.added_tokens_decoder.items()}
    parts = [tokenizer.get_vocab(), added, getattr(tokenizer, "chat_template", None)]
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def write_cache(
    folder: Path,
    identity: Identity,
    top_k: int,
    counts: Tensor,
    teacher: Teacher,
    *,
    rank: int = 0,
    world: int = 1,
    stop: Callable[[], bool] = lambda: False,
    wait: Callable[[], None] = lambda: None,
) -> bool:
    """Write a cache, or the shards that it does not have yet; return whether it is complete.

    After a kill at any moment, another call writes the missing shards.

    Args:
        folder: of the cache; it is made if needed.
        identity: what the cache belongs to.
        top_k: classes that are kept of each token.
        counts: the number of predicted tokens of each row, int64.
        teacher: called with the row numbers of a shard, once for each.
        rank: the number of this process; it writes every `world`-th shard.
        world: the number of processes.
        stop: whether to stop after a shard. Every process calls it equally often, and it must return the same on all.
        wait: returns when all processes have called it.

    Raises:
        UserError: `top_k` is out of range; the folder belongs to another cache, or has other files; a shard is damaged.
        RunError: writing failed, or the teacher's log-probabilities are not finite; the shards before are complete.
    """
    if not 1 <= top_k <= identity.vocabulary:
        raise UserError(f"--teacher.top_k must be from 1 to {identity.vocabulary}, the teacher's classes, got {top_k}")
    if not int(counts.sum()):
        raise UserError("the training rows have no token that is predicted")
    shard_rows = _claim(folder, identity, top_k, rank)
    wait()  # no process writes a shard before the folder says whose it is
    numbers = torch.arange(len(counts)).split(shard_rows)
    for first in range(0, len(numbers), world):
        number = first + rank
        if number < len(numbers) and not _place(folder, number).exists():
            index, log_probs = teacher(numbers[number])
            shard = _shard(index, log_probs, counts[numbers[number]], identity.vocabulary, top_k)
            if not shard.log_mass.isfinite().all():
                raise RunError(f"the teacher's log-probabilities for shard {number} of {folder} are not finite")
            _write_shard(_place(folder, number), shard)
        if stop():
            return False
    wait()
    if rank == 0:
        _finish(folder, len(counts), shard_rows, identity.vocabulary, top_k)
    wait()
    return True


def is_complete(folder: Path) -> bool:
    """Return whether the folder is a cache that `write_cache` has finished."""
    return (folder / "identity.json").is_file() and (folder / "manifest.json").is_file()


class TeacherCache:
    """A cache that `open_cache` has opened.

    Attributes:
        top_k: classes of each token.
        mass: their probability together, as a mean over the tokens.
        bytes_per_token: the size of the files, divided by the number of tokens.
    """

    def __init__(self, shards: list[_Shard], shard_rows: int, top_k: int, mass: float, bytes_per_token: float) -> None:
        self.top_k, self.mass, self.bytes_per_token = top_k, mass, bytes_per_token
        self._shards, self._shard_rows = shards, shard_rows
        self._counts = torch.cat([shard.counts for shard in shards]).long()
        self._ends = torch.cat([shard.counts.cumsum(0) for shard in shards])  # in the row's own shard

    def rows(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Return the classes (int64) and log-probabilities (float32) of the rows with these numbers, in their order.

        Both have the shape (tokens of these rows, K). Only these rows are read.
        """
        counts = self._counts[numbers]
        index = torch.empty(int(counts.sum()), self.top_k, dtype=torch.long)
        log_probs, log_mass = torch.empty(index.shape), torch.empty(len(index), 1)
        end = 0
        for number, count, stop in zip(numbers.tolist(), counts.tolist(), self._ends[numbers].tolist(), strict=True):
            shard, source, place = self._shards[number // self._shard_rows], slice(stop - count, stop), end
            end += count
            index[place:end] = shard.index[source]
            log_probs[place:end] = shard.log_probs[source]
            log_mass[place:end, 0] = shard.log_mass[source]
        return index, log_probs + (log_mass - log_probs.logsumexp(-1, keepdim=True))


def written_top_k(folder: Path) -> int | None:
    """Return the classes that a cache keeps of each token, or None if the folder is none yet."""
    file = folder / "identity.json"
    return int(_read(file, "top_k")["top_k"]) if file.is_file() else None


def open_cache(folder: Path, identity: Identity, top_k: int | None) -> TeacherCache:
    """Open a cache; `top_k=None` takes it as it was written.

    Raises:
        UserError: the folder is not a cache, is not complete, or belongs to another teacher, tokenizer, rows or
            `top_k`; a file is missing or damaged.
    """
    known = _identity(folder, identity, top_k)
    if not is_complete(folder):
        raise UserError(f"the cache {folder} is not complete: it has no manifest.json")
    manifest = _read(folder / "manifest.json", "rows", "tokens", "mass", "bytes")
    kept, rows = known["top_k"], known["shard_rows"]
    shards = _open_shards(folder, manifest["rows"], rows, identity.vocabulary, kept)
    return TeacherCache(shards, rows, kept, manifest["mass"], manifest["bytes"] / manifest["tokens"])


def _claim(folder: Path, identity: Identity, top_k: int, rank: int) -> int:
    """Write identity.json, or check it if it exists; return the rows of a shard."""
    file = folder / "identity.json"
    if file.exists():
        return int(_identity(folder, identity, top_k)["shard_rows"])
    if folder.exists():
        # What a kill leaves of identity.json, or what another process writes at this moment, does not count.
        foreign = not folder.is_dir() or any(not path.name.startswith(file.name) for path in folder.iterdir())
        if foreign:
            raise UserError(f"{folder} has other files and is not a teacher cache: it has no {file.name}")
    if rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"cannot write {folder}: {one_line(error)}") from error
        write_file(file, json.dumps(asdict(identity) | {"top_k": top_k, "shard_rows": SHARD_ROWS}, indent=2) + "\n")
    return SHARD_ROWS


def _identity(folder: Path, identity: Identity, top_k: int | None) -> dict[str, Any]:
    """Return the contents of identity.json, if they fit."""
    file = folder / "identity.json"
    if not file.is_file():
        raise UserError(f"{folder} is not a teacher cache: it has no {file.name}")
    known = _read(file, *asdict(identity), "top_k", "shard_rows")
    for name, what in (
        ("teacher", "was written by another teacher"),
        ("tokenizer", "was written with another tokenizer"),
        ("rows", "was written for other training rows"),
        ("vocabulary", "was written by a teacher with another number of classes"),
    ):
        ours = getattr(identity, name)
        if known[name] != ours:
            raise UserError(f"the cache {folder} {what} ({known[name]}; now {ours})")
    if top_k is not None and top_k != known["top_k"]:
        raise UserError(
            f"--teacher.top_k must be {known['top_k']}, as in the cache {folder}, or be left out; got {top_k}"
        )
    return known


def _read(file: Path, *names: str) -> dict[str, Any]:
    """Return the entries of a JSON file, which must have these names."""
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
        return {name: contents[name] for name in names}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"cannot read {file} of a teacher cache: {one_line(error)}") from error


def _finish(folder: Path, rows: int, shard_rows: int, vocabulary: int, top_k: int) -> None:
    """Write manifest.json, which says that the cache is complete."""
    shards = _open_shards(folder, rows, shard_rows, vocabulary, top_k)
    tokens = sum(len(shard.index) for shard in shards)
    mass = math.fsum(float(shard.log_mass.double().exp().sum()) for shard in shards) / tokens
    size = sum(_place(folder, number).stat().st_size for number in range(len(shards)))
    contents = {"rows": rows, "tokens": tokens, "mass": mass, "bytes": size}
    write_file(folder / "manifest.json", json.dumps(contents, indent=2) + "\n")


def _place(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def _index_dtype(vocabulary: int) -> torch.dtype:
    return torch.uint16 if vocabulary <= 1 << 16 else torch.int32


def _shard(index: Tensor, log_probs: Tensor, counts: Tensor, vocabulary: int, top_k: int) -> _Shard:
    """Return what is stored of a teacher's answer. Raises `ValueError` if that does not fit the rows."""
    shape = (int(counts.sum()), top_k)
    if index.shape != shape or log_probs.shape != shape:
        raise ValueError(f"teacher: expected two tensors of shape {shape}, got {index.shape} and {log_probs.shape}")
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < vocabulary:
        raise ValueError(
            f"teacher: expected classes in [0, {vocabulary}), got {int(index.min())} to {int(index.max())}"
        )
    index, log_probs = index.cpu().to(_index_dtype(vocabulary)), log_probs.cpu()
    half = log_probs.clamp(min=torch.finfo(torch.float16).min).half()  # masked classes can have less than that
    return _Shard(counts.int(), index.contiguous(), half.contiguous(), log_probs.double().logsumexp(-1).float())


def _write_shard(final: Path, shard: _Shard) -> None:
    """Write a shard under another name, flush it to the disk and rename it."""
    new = final.with_name(final.name + ".new")
    try:
        new.write_bytes(save(vars(shard)))
        to_disk(new)
        new.replace(final)
        to_disk(final.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)  # a full disk is not left full
        raise RunError(f"cannot write {final}: {one_line(error)}; the shards before it are complete") from error


def _open_shards(folder: Path, rows: int, shard_rows: int, vocabulary: int, top_k: int) -> list[_Shard]:
    return [
        _open_shard(_place(folder, number), min(shard_rows, rows - first), vocabulary, top_k)
        for number, first in enumerate(range(0, rows, shard_rows))
    ]


def _open_shard(file: Path, rows: int, vocabulary: int, top_k: int) -> _Shard:
    """Return the mapped tensors of a file, which must be of `rows` rows."""
    again = "to write it again, delete it and manifest.json, and run with the teacher"
    try:
        with safe_open(file, "pt") as opened:
            shard = _Shard(**{name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    except FileNotFoundError as error:
        raise UserError(f"{file} of a teacher cache is missing; {again}") from error
    except (OSError, SafetensorError, TypeError) as error:
        raise UserError(f"{file} of a teacher cache is damaged ({one_line(error)}); {again}") from error
    tokens = int(shard.counts.sum())
    expected = {
        "counts": (torch.int32, (rows,)),
        "index": (_index_dtype(vocabulary), (tokens, top_k)),
        "log_probs": (torch.float16, (tokens, top_k)),
        "log_mass": (torch.float32, (tokens,)),
    }
    for name, (dtype, shape) in expected.items():
        values = getattr(shard, name)
        if values.dtype != dtype or values.shape != shape:
            raise UserError(
                f"{file} of a teacher cache is damaged ({name}: expected {dtype} of shape {shape}, got {values.dtype} "
                f"of shape {tuple(values.shape)}); {again}"
            )
    return shard
