"""Real models in the Trainer of transformers, with their own loss and patched: losses, time of a step, peak memory.

    python -m bench.hosts.hf [--models smollm2 minilm] [--accumulation 1 4] [--steps 20] [--batch 8] [--length 128]
                             [--no-float64]

SmolLM2-135M-Instruct is trained as a causal, all-MiniLM-L6-v2 as a masked language model (its head's transform is new),
with AdamW in float32, on Python source files. Each training has a process of its own. The errors are the largest
relative differences from the losses of the same training in float64 with PyTorch's loss.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
import transformers
from transformers import Trainer, TrainerCallback, TrainingArguments

from tlkernels.integrations import hf
from tlkernels.machine import machine
from tlkernels.train import docstrings, language
from tlkernels.train.lm_config import LmModelConfig
from tlkernels.train.memory import own_mappings, reset_resident, resident
from tlkernels.train.model import source

MODELS = {"smollm2": "SmolLM2-135M, causal", "minilm": "MiniLM-L6, masked"}
WAYS = ("own", "patched", "float64")


def load(name: str) -> tuple[Any, Any]:
    """Return model and tokenizer, in float32 and without dropout."""
    torch.manual_seed(0)
    if name == "smollm2":
        path, extra = language.find("smollm2")
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **extra)
        return language.new_model(path, extra, True, LmModelConfig(path="smollm2")).model, tokenizer
    path = source(None)
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = transformers.AutoModelForMaskedLM.from_pretrained(path, dtype=torch.float32, **off)
    return model, transformers.AutoTokenizer.from_pretrained(path)


def rows(tokenizer: Any, count: int, length: int, masked: bool) -> list[dict[str, torch.Tensor]]:
    """Return rows of source text; every fourth is padded from its middle and has fewer labels."""
    ids: list[int] = []
    for text in docstrings.sources(64).values():
        ids += tokenizer(text[:20_000], add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= count * length:
            break
    generator, data = torch.Generator().manual_seed(0), []
    for k in range(count):
        row = torch.tensor(ids[k * length : (k + 1) * length])
        mask, labels = torch.ones_like(row), row.clone()
        if masked:
            chosen = torch.rand(length, generator=generator) < 0.15
            labels, row = torch.where(chosen, row, -100), torch.where(chosen, tokenizer.mask_token_id, row)
        if k % 4 == 3:
            mask[length // 2 :], labels[length // 2 :] = 0, -100
        data.append({"input_ids": row, "attention_mask": mask, "labels": labels})
    return data


class _Times(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began)


def train(name: str, way: str, accumulation: int, steps: int, batch: int, length: int) -> dict[str, Any]:
    """Return the losses, the seconds of each step and the peak above the loaded model."""
    model, tokenizer = load(name)
    if way == "float64":  # transformers' own loss is in float32 there too
        hf.patch(model.double(), impl="reference")
    if way == "patched":
        hf.patch(model)
    data, times = rows(tokenizer, steps * batch, length, masked=name == "minilm"), _Times()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=batch // accumulation,
            gradient_accumulation_steps=accumulation, learning_rate=5e-5, logging_steps=1, report_to="none",
            save_strategy="no", disable_tqdm=True, use_cpu=True, seed=0,
        )  # fmt: skip
        trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[times])
        with own_mappings():
            reset_resident()
            before = resident("VmRSS")
            trainer.train()
            peak = resident("VmHWM") - before
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {"losses": losses, "seconds": times.seconds, "peak": peak}


def distance(one: list[float], other: list[float]) -> float:
    """Return the largest relative difference of two curves of losses."""
    return max(abs(a - b) / abs(b) for a, b in zip(one, other, strict=True))


def main() -> None:
    """Train and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--accumulation", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--float64", action=argparse.BooleanOptionalAction, default=True, help="also the errors")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(train(*json.loads(given.one))))
        return
    info = machine()
    packages = ", ".join(f"{key} {info['packages'][key]}" for key in ("torch", "transformers"))
    print(f"{info['processor']}, {info['threads']} threads, {packages}; {given.steps} steps of {given.batch} rows of "
          f"{given.length} tokens\n")  # fmt: skip
    print("| model | micro-batches | step, own (s) | step, patched (s) | peak, own (GB) | peak, patched (GB) "
          "| error, own | error, patched |\n" + "| --- " * 8 + "|")  # fmt: skip
    for name in given.models:
        for accumulation in given.accumulation:
            found = {}
            for way in WAYS if given.float64 else WAYS[:2]:
                job = json.dumps([name, way, accumulation, given.steps, given.batch, given.length])
                command = [sys.executable, "-m", "bench.hosts.hf", "--one", job]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                found[way] = json.loads(done.stdout.splitlines()[-1])
            own, patched = found["own"], found["patched"]
            seconds = [statistics.median(its["seconds"][1:]) for its in (own, patched)]
            off = ["", ""]
            if given.float64:
                off = [f"{distance(its['losses'], found['float64']['losses']):.1e}" for its in (own, patched)]
            print(f"| {MODELS[name]} | {accumulation} | {seconds[0]:.2f} | {seconds[1]:.2f} | {own['peak'] / 1e9:.2f} "
                  f"| {patched['peak'] / 1e9:.2f} | {off[0]} | {off[1]} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
