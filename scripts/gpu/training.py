"""What `tlkernels profile` is given on a GPU: a loop of plain PyTorch, and a random model for `tlkernels lm`.

    python -m scripts.gpu.training loop [--tiny]             train a small language model on random tokens, in bfloat16
    python -m scripts.gpu.training model FOLDER [--tiny]     save a random Llama, with its tokenizer

With --tiny for a dry run on a CPU.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scripts.gpu.kit import ROOT

STEPS = 64  # the profile ends the script before
CLASSES, FEATURES, LAYERS, HEADS = 50304, 1024, 4, 16
BATCH, TOKENS = 16, 512


class Model(nn.Module):
    """A transformer with a vocabulary head."""

    def __init__(self, classes: int, features: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, features)
        layer = nn.TransformerEncoderLayer(features, HEADS, 4 * features, dropout=0.0, batch_first=True)
        self.trunk = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(features, classes, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits."""
        x: Tensor = self.head(self.trunk(self.embedding(tokens)))
        return x


def loop(tiny: bool) -> None:
    """Train on random tokens."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    classes, features, batch, tokens = (512, 64, 4, 32) if tiny else (CLASSES, FEATURES, BATCH, TOKENS)
    model = Model(classes, features).to(device, torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    for _ in range(STEPS):
        inputs = torch.randint(classes, (batch, tokens + 1)).to(device)
        logits = model(inputs[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), inputs[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def save(folder: Path, tiny: bool) -> None:
    """Save a random Llama with a vocabulary head of 32000 classes, and a tokenizer that uses some of them."""
    import tokenizers
    import transformers

    tokenizer = tokenizers.ByteLevelBPETokenizer()
    texts = [path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))]
    tokenizer.train_from_iterator(texts, vocab_size=8000, special_tokens=["<s>", "</s>"])
    wrapped = transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    )
    features = 64 if tiny else 512
    config = transformers.LlamaConfig(
        vocab_size=8000 if tiny else 32000, hidden_size=features, intermediate_size=3 * features, num_hidden_layers=4,
        num_attention_heads=8, max_position_embeddings=512, bos_token_id=0, eos_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    wrapped.save_pretrained(folder)


def main() -> None:
    """Train, or save the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("loop")
    commands.add_parser("model").add_argument("folder", type=Path)
    for command in commands.choices.values():
        command.add_argument("--tiny", action="store_true", help="for a dry run on a CPU")
    given = parser.parse_args()
    if given.command == "loop":
        loop(given.tiny)
    else:
        save(given.folder, given.tiny)


if __name__ == "__main__":
    main()
