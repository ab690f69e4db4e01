"""A teacher's cache gives back what the teacher said; kills, damage and another teacher do not go unnoticed."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from tlkernels import linear_topk_distillation
from tlkernels.train import RunError, UserError, teacher_cache
from tlkernels.train.teacher_cache import (
    Identity,
    file_digest,
    is_complete,
    open_cache,
    tokenizer_digest,
    write_cache,
)

VOCABULARY, K, SHARD_ROWS = 40, 5, 4
IDENTITY = Identity(teacher="t1", tokenizer="v1", rows="r1", vocabulary=VOCABULARY)
COUNTS = torch.tensor([3, 0, 7, 1, 0, 0, 0, 0, 2, 5, 4, 6, 1, 3])  # the second shard has no token, the last is short
SHARDS = [f"shard-{number:05d}.safetensors" for number in range(4)]
FILES = sorted(["identity.json", "manifest.json", *SHARDS])


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(teacher_cache, "SHARD_ROWS", SHARD_ROWS)


def distributions(vocabulary=VOCABULARY, counts=COUNTS):
    """Return the teacher's log-probabilities of each row in float64, some of them peaked."""
    draw = torch.Generator().manual_seed(5)
    logits = torch.randn(int(counts.sum()), vocabulary, generator=draw, dtype=torch.float64) * 4
    return logits.log_softmax(-1).split(counts.tolist())


def teacher_of(rows, k=K):
    def teacher(numbers):
        log_probs, index = torch.cat([rows[number] for number in numbers.tolist()]).float().topk(k, -1)
        return index, log_probs

    return teacher


TEACHER = teacher_of(distributions())


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The files of a cache that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_cache, "SHARD_ROWS", SHARD_ROWS)
        assert write_cache(folder, IDENTITY, K, COUNTS, TEACHER)
    return folder


@pytest.fixture
def cache(whole, tmp_path):
    """A copy of the whole cache."""
    return Path(shutil.copytree(whole, tmp_path / "cache"))


# ---- contents ----------------------------------------------------------------------------------------------------


def expected(numbers, k=K, rows=None):
    rows = distributions() if rows is None else rows
    log_probs, index = torch.cat([rows[number] for number in numbers]).topk(k, -1)
    return index, log_probs


@pytest.mark.parametrize("numbers", [
    pytest.param(list(range(14)), id="all"),
    pytest.param([12, 2, 8, 0], id="any-order"),
    pytest.param([9, 9, 2, 9], id="twice"),
    pytest.param([1, 3, 5, 4], id="rows-without-tokens"),
    pytest.param([1, 6], id="only-rows-without-tokens"),
])  # fmt: skip
def test_rows_come_back_in_the_order_that_is_asked_for(whole, numbers):
    index, log_probs = open_cache(whole, IDENTITY, K).rows(torch.tensor(numbers))
    right_index, right = expected(numbers)
    assert index.dtype == torch.int64 and torch.equal(index, right_index)
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs.double(), right, rtol=2**-11, atol=2e-4)
    kept, right_kept = log_probs.double().exp().sum(-1), right.exp().sum(-1)
    torch.testing.assert_close(kept, right_kept, rtol=1e-6, atol=0)


def test_no_rows_are_no_tokens(whole):
    index, log_probs = open_cache(whole, IDENTITY, None).rows(torch.tensor([], dtype=torch.long))
    assert index.shape == log_probs.shape == (0, K)


def test_the_manifest_has_the_mean_mass_and_the_size(whole):
    cache = open_cache(whole, IDENTITY, None)
    _, right = expected(range(14))
    tokens = int(COUNTS.sum())
    assert cache.top_k == K
    assert cache.mass == pytest.approx(float(right.exp().sum(-1).mean()), rel=1e-6)
    assert cache.bytes_per_token == sum(len(contents(whole)[name]) for name in SHARDS) / tokens
    assert sorted(contents(whole)) == FILES


@pytest.mark.parametrize(("vocabulary", "dtype"), [(65536, torch.uint16), (65537, torch.int32)])
def test_the_largest_class_survives(tmp_path, vocabulary, dtype):
    from safetensors.torch import load_file

    index, log_probs = torch.tensor([[vocabulary - 1, 0]]), torch.tensor([[-0.5, -1.5]])
    identity = replace(IDENTITY, vocabulary=vocabulary)
    write_cache(tmp_path / "cache", identity, 2, torch.tensor([1]), lambda numbers: (index, log_probs))
    assert load_file(tmp_path / "cache" / SHARDS[0])["index"].dtype == dtype
    assert torch.equal(open_cache(tmp_path / "cache", identity, 2).rows(torch.tensor([0]))[0], index)


def test_all_classes_of_which_some_are_masked(tmp_path):
    """With K = C the probabilities sum to 1; masked classes have log-probabilities that float16 does not have."""
    log_probs = torch.tensor([[-0.6931472, -0.6931472, -1e9, -torch.inf]])
    identity = replace(IDENTITY, vocabulary=4)
    write_cache(
        tmp_path / "cache", identity, 4, torch.tensor([1]), lambda numbers: (torch.arange(4).view(1, 4), log_probs)
    )
    _, kept = open_cache(tmp_path / "cache", identity, 4).rows(torch.tensor([0]))
    assert kept.isfinite().all()
    torch.testing.assert_close(kept.exp(), torch.tensor([[0.5, 0.5, 0.0, 0.0]]))


def peaked(count, classes, draw):
    """Return log-probabilities of which two classes have all but 1e-2 to 1e-5: float16 alone often sums above 1."""
    logits = torch.randn(count, classes, generator=draw, dtype=torch.float64)
    rest = torch.logspace(-2, -5, count, dtype=torch.float64)[:, None]
    share = 0.1 + 0.8 * torch.rand(count, 1, generator=draw, dtype=torch.float64)
    others = rest.log() + logits[:, 2:].log_softmax(-1)
    return torch.cat([share * (1 - rest), (1 - share) * (1 - rest)], -1).log(), others


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "js"])
def test_the_loss_of_a_cache_is_that_of_float64(tmp_path, divergence):
    """In plain PyTorch, with one more class for all others; the teacher's rest is down to 1e-5."""
    draw = torch.Generator().manual_seed(3)
    top, others = peaked(200, 60, draw)
    full = torch.cat([top, others], -1)
    counts, identity = torch.tensor([50] * 4), replace(IDENTITY, vocabulary=60)
    write_cache(tmp_path / "cache", identity, 16, counts, teacher_of(full.split(50), 16))
    index, log_probs = open_cache(tmp_path / "cache", identity, 16).rows(torch.arange(4))

    features = full + torch.randn(full.shape, generator=draw, dtype=torch.float64)
    mine = features.float().requires_grad_()
    loss = linear_topk_distillation(mine, torch.eye(60), index, log_probs, divergence=divergence)
    loss.backward()

    features.requires_grad_()
    student = features.log_softmax(-1)
    right, right_index = full.topk(16, -1)
    log_q = torch.cat([right, full.exp().scatter(1, right_index, 0).sum(-1, keepdim=True).log()], -1)
    rest = student.exp().scatter(1, right_index, 0).sum(-1, keepdim=True).log()
    log_p = torch.cat([student.gather(1, right_index), rest], -1)

    def kl(target, given):
        return functional.kl_div(given, target, reduction="batchmean", log_target=True)

    middle = torch.stack([log_q, log_p]).logsumexp(0) - torch.tensor(2.0, dtype=torch.float64).log()
    exact = {
        "forward_kl": lambda: kl(log_q, log_p),
        "reverse_kl": lambda: kl(log_p, log_q),
        "js": lambda: (kl(log_q, middle) + kl(log_p, middle)) / 2,
    }[divergence]()
    exact.backward()
    torch.testing.assert_close(loss.double(), exact, rtol=5e-4, atol=0)
    assert (mine.grad.double() - features.grad).norm() < 2e-3 * features.grad.norm()


# ---- kills and other interruptions -------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from tlkernels.train import checkpoint, teacher_cache
from test_train_teacher_cache import COUNTS, IDENTITY, K, SHARD_ROWS, TEACHER
teacher_cache.SHARD_ROWS = SHARD_ROWS
{kill}
teacher_cache.write_cache(Path({folder!r}), IDENTITY, K, COUNTS, TEACHER)
"""
IN_A_SHARD = """
real = Path.write_bytes
def write_bytes(self, data):
    if {name!r} in self.name:
        real(self, data[:len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, data)
Path.write_bytes = write_bytes
"""
BEFORE_THE_RENAME = """
real = Path.replace
def replace(self, target):
    if {name!r} in self.name:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, target)
Path.replace = replace
"""


@pytest.mark.parametrize(("kill", "name", "left"), [
    pytest.param(IN_A_SHARD, SHARDS[2], ["identity.json", *SHARDS[:2], SHARDS[2] + ".new"], id="in-a-shard"),
    pytest.param(
        BEFORE_THE_RENAME, SHARDS[2], ["identity.json", *SHARDS[:2], SHARDS[2] + ".new"], id="before-its-rename",
        marks=pytest.mark.full,
    ),
    pytest.param(BEFORE_THE_RENAME, "identity", ["identity.json.new"], id="identity", marks=pytest.mark.full),
    pytest.param(
        BEFORE_THE_RENAME, "manifest", ["identity.json", "manifest.json.new", *SHARDS], id="manifest",
        marks=pytest.mark.full,
    ),
])  # fmt: skip
def test_a_killed_cache_continues_with_the_missing_shards(kill, name, left, whole, tmp_path):
    folder = tmp_path / "cache"
    script = KILLED.format(tests=str(Path(__file__).parent), kill=kill.format(name=name), folder=str(folder))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert sorted(contents(folder)) == left
    assert not is_complete(folder)
    asked = []

    def teacher(numbers):
        asked.append(int(numbers[0]) // SHARD_ROWS)
        return TEACHER(numbers)

    assert write_cache(folder, IDENTITY, K, COUNTS, teacher)
    assert asked == [number for number in range(4) if SHARDS[number] not in left]
    assert contents(folder) == contents(whole)


def test_stop_ends_after_a_shard(whole, tmp_path):
    folder, calls = tmp_path / "cache", []

    def stop():
        calls.append(len(calls))
        return len(calls) == 2

    assert not write_cache(folder, IDENTITY, K, COUNTS, TEACHER, stop=stop)
    assert sorted(contents(folder)) == ["identity.json", *SHARDS[:2]] and not is_complete(folder)
    with pytest.raises(UserError, match="cache is not complete: it has no manifest"):
        open_cache(folder, IDENTITY, K)
    assert write_cache(folder, IDENTITY, K, COUNTS, TEACHER)
    assert contents(folder) == contents(whole) and is_complete(folder)


@pytest.mark.parametrize("world", [2, 3])
def test_processes_together_write_the_same_files(whole, tmp_path, world, monkeypatch):
    """Each takes other shards, and all ask equally often whether to stop, as a collective operation requires."""
    folder, barrier = tmp_path / "cache", threading.Barrier(world)
    shards, results, stops = {}, {}, {}
    real = teacher_cache.write_file

    def slow(*arguments):
        time.sleep(0.05)
        real(*arguments)

    monkeypatch.setattr(teacher_cache, "write_file", slow)  # no process may go on before these files are there

    def process(rank):
        shards[rank], stops[rank] = [], 0

        def teacher(numbers):
            assert (folder / "identity.json").exists()
            time.sleep(0.02 * rank)
            shards[rank].append(int(numbers[0]) // SHARD_ROWS)
            return TEACHER(numbers)

        def stop():
            stops[rank] += 1
            return False

        results[rank] = write_cache(
            folder, IDENTITY, K, COUNTS, teacher, rank=rank, world=world, stop=stop,
            wait=lambda: barrier.wait(timeout=20) and None,
        ) and is_complete(folder)  # fmt: skip

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(world), True)
    assert shards == {rank: list(range(4))[rank::world] for rank in range(world)}
    assert len(set(stops.values())) == 1
    assert contents(folder) == contents(whole)


def test_a_full_disk_is_one_line_and_leaves_the_shards_before_it(whole, tmp_path):
    folder = tmp_path / "cache"
    sizes = {name: len(data) for name, data in contents(whole).items()}
    limit = sizes[SHARDS[2]] - 1
    assert max(sizes[SHARDS[0]], sizes[SHARDS[1]]) <= limit
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # Python ignores the signal: a write raises instead
    try:
        with pytest.raises(RunError, match=r"^cannot write .*shard-00002.* the shards before it are complete$"):
            write_cache(folder, IDENTITY, K, COUNTS, TEACHER)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(contents(folder)) == ["identity.json", *SHARDS[:2]], "a full disk is not left full"
    assert write_cache(folder, IDENTITY, K, COUNTS, TEACHER)
    assert contents(folder) == contents(whole)


def test_a_shard_reaches_the_disk_before_its_rename(tmp_path, monkeypatch):
    order, real = [], Path.replace
    monkeypatch.setattr(teacher_cache, "to_disk", lambda path: order.append(f"fsync {path.name}"))
    monkeypatch.setattr(Path, "replace", lambda self, to: (order.append(f"rename {self.name}"), real(self, to)))
    write_cache(tmp_path / "cache", IDENTITY, K, COUNTS[:2], TEACHER)
    new = SHARDS[0] + ".new"
    first = order.index(f"rename {new}")
    assert order[first - 1 : first + 2] == [f"fsync {new}", f"rename {new}", "fsync cache"]
    assert order[-1] == "rename manifest.json.new"


def test_values_that_are_not_finite_are_refused(tmp_path):
    def teacher(numbers):
        index, log_probs = TEACHER(numbers)
        return index, log_probs.masked_fill(torch.arange(len(index))[:, None] == 1, torch.nan)

    with pytest.raises(RunError, match=r"log-probabilities for shard 0 of .*cache are not finite"):
        write_cache(tmp_path / "cache", IDENTITY, K, COUNTS, teacher)


@pytest.mark.parametrize(("wrong", "words"), [
    (lambda index, log_probs: (index[1:], log_probs), r"expected two tensors of shape \(11, 5\)"),
    (lambda index, log_probs: (index + VOCABULARY, log_probs), r"expected classes in \[0, 40\), got 40 to 79"),
])  # fmt: skip
def test_a_teacher_that_answers_wrongly_is_a_bug(tmp_path, wrong, words):
    with pytest.raises(ValueError, match=words):
        write_cache(tmp_path / "cache", IDENTITY, K, COUNTS, lambda numbers: wrong(*TEACHER(numbers)))


# ---- whose cache it is -------------------------------------------------------------------------------------------

OTHERS = [
    ({"teacher": "t2"}, r"the cache .*cache was written by another teacher \(t1; now t2\)$"),
    ({"tokenizer": "v2"}, r"the cache .*cache was written with another tokenizer \(v1; now v2\)$"),
    ({"rows": "r2"}, r"the cache .*cache was written for other training rows \(r1; now r2\)$"),
    ({"vocabulary": 41}, r"the cache .*cache was written by a teacher with another number of classes \(40; now 41\)$"),
]


@pytest.mark.parametrize(("change", "words"), OTHERS)
def test_another_identity_is_refused_by_name(change, words, cache):
    before = contents(cache)
    for call in (
        lambda identity: open_cache(cache, identity, K),
        lambda identity: write_cache(cache, identity, K, COUNTS, TEACHER),
    ):
        with pytest.raises(UserError, match=words):
            call(replace(IDENTITY, **change))
    (cache / "manifest.json").unlink()  # it is refused before the cache is complete too
    with pytest.raises(UserError, match=words):
        write_cache(cache, replace(IDENTITY, **change), K, COUNTS, TEACHER)
    assert contents(cache) == {name: data for name, data in before.items() if name != "manifest.json"}


def test_another_number_of_classes_is_refused(cache):
    words = r"^--teacher.top_k must be 5, as in the cache .*cache, or be left out; got 6$"
    with pytest.raises(UserError, match=words):
        open_cache(cache, IDENTITY, 6)
    with pytest.raises(UserError, match=words):
        write_cache(cache, IDENTITY, 6, COUNTS, TEACHER)


@pytest.mark.parametrize("top_k", [0, VOCABULARY + 1])
def test_top_k_is_at_most_the_vocabulary(tmp_path, top_k):
    with pytest.raises(UserError, match=rf"^--teacher.top_k must be from 1 to 40, the teacher's classes, got {top_k}$"):
        write_cache(tmp_path / "cache", IDENTITY, top_k, COUNTS, TEACHER)
    assert not (tmp_path / "cache").exists()


def test_rows_without_a_predicted_token_are_refused(tmp_path):
    with pytest.raises(UserError, match="no token that is predicted"):
        write_cache(tmp_path / "cache", IDENTITY, K, COUNTS[4:8], TEACHER)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"has other files and is not a teacher cache: it has no identity.json$"):
        write_cache(tmp_path, IDENTITY, K, COUNTS, TEACHER)
    with pytest.raises(UserError, match=r"has other files and is not a teacher cache"):
        write_cache(tmp_path / "notes.txt", IDENTITY, K, COUNTS, TEACHER)
    with pytest.raises(UserError, match=r"is not a teacher cache: it has no identity.json$"):
        open_cache(tmp_path, IDENTITY, K)
    assert not is_complete(tmp_path) and contents(tmp_path) == {"notes.txt": b"mine"}


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, monkeypatch):
    def mkdir(self, **options):
        raise OSError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(RunError, match=r"^cannot write .*cache: .*Permission denied"):
        write_cache(tmp_path / "cache", IDENTITY, K, COUNTS, TEACHER)


# ---- damage ------------------------------------------------------------------------------------------------------


def _truncate(file):
    os.truncate(file, file.stat().st_size - 1)


def _scramble_header(file):
    data = bytearray(file.read_bytes())
    data[8:20] = b"not a header"
    file.write_bytes(data)


def _of_other_rows(file):
    shutil.copy(file.with_name(SHARDS[3]), file)


DAMAGES = [
    pytest.param(Path.unlink, "is missing", id="missing"),
    pytest.param(_truncate, "is damaged", id="truncated"),
    pytest.param(lambda file: file.write_bytes(b""), "is damaged", id="empty"),
    pytest.param(_scramble_header, "is damaged", id="header"),
    pytest.param(_of_other_rows, r"is damaged \(counts: expected torch.int32 of shape \(4,\)", id="other-rows"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGES)
def test_a_damaged_shard_is_named(damage, words, cache, whole):
    damage(cache / SHARDS[2])
    with pytest.raises(UserError, match=rf"^.*{SHARDS[2]} of a teacher cache {words}") as caught:
        open_cache(cache, IDENTITY, K)
    assert "delete it and manifest.json, and run with the teacher" in str(caught.value)
    assert "\n" not in str(caught.value)
    for name in (SHARDS[2], "manifest.json"):  # the advice is right
        (cache / name).unlink(missing_ok=True)
    assert write_cache(cache, IDENTITY, K, COUNTS, TEACHER)
    assert contents(cache) == contents(whole)


def test_a_damaged_shard_is_named_when_the_cache_is_finished(cache):
    (cache / "manifest.json").unlink()
    _truncate(cache / SHARDS[1])
    with pytest.raises(UserError, match=rf"{SHARDS[1]} of a teacher cache is damaged"):
        write_cache(cache, IDENTITY, K, COUNTS, TEACHER)
    assert not is_complete(cache)


@pytest.mark.parametrize("file", ["identity.json", "manifest.json"])
@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_damaged_description_is_named(file, text, cache):
    (cache / file).write_text(text)
    with pytest.raises(UserError, match=rf"^cannot read .*{file} of a teacher cache: "):
        open_cache(cache, IDENTITY, K)


# ---- digests -----------------------------------------------------------------------------------------------------


def test_a_teacher_is_known_by_the_contents_of_its_files(tmp_path):
    (tmp_path / "a").mkdir()
    files = {"config.json": b"{}", "model-1.safetensors": b"x" * 3_000_000, "model-2.safetensors": b"y"}
    for name, data in files.items():
        (tmp_path / "a" / name).write_bytes(data)
    digest = file_digest(tmp_path / "a", None)
    (tmp_path / "a/README.md").write_text("about it")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert file_digest(tmp_path / "b", None) == digest
    for name, data in files.items():  # a byte at the end
        (tmp_path / "b" / name).write_bytes(data[:-1] + b"z")
        assert file_digest(tmp_path / "b", None) != digest
        (tmp_path / "b" / name).write_bytes(data)
    (tmp_path / "b/model-2.safetensors").rename(tmp_path / "b/model-3.safetensors")
    assert file_digest(tmp_path / "b", None) != digest


def test_a_teacher_of_one_file(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    digest = file_digest(tmp_path, "model.gguf")
    (tmp_path / "config.json").write_text("{}")
    assert file_digest(tmp_path, "model.gguf") == digest
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(101))
    assert file_digest(tmp_path, "model.gguf") != digest


def test_a_teacher_without_its_files_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no \*.safetensors$"):
        file_digest(tmp_path, None)
    with pytest.raises(UserError, match=r"cannot read the teacher's file .*model.gguf: FileNotFoundError"):
        file_digest(tmp_path, "model.gguf")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"cannot read the teacher's file .*config.json"):
        file_digest(tmp_path, None)


def test_a_tokenizer_is_known_by_its_vocabulary_and_template():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    def load(words=("<unk>", "river", "oven")):
        model = models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), unk_token="<unk>")

    def changed(change):
        tokenizer = load()
        change(tokenizer)
        return tokenizer_digest(tokenizer)

    def template(tokenizer):
        tokenizer.chat_template = "{{ messages }}"

    digests = [
        tokenizer_digest(load()),
        tokenizer_digest(load(("<unk>", "oven", "river"))),
        changed(lambda tokenizer: tokenizer.add_tokens(["new"])),
        changed(lambda tokenizer: tokenizer.add_special_tokens({"bos_token": "new"})),
        changed(template),
    ]
    assert len(set(digests)) == 5
    assert tokenizer_digest(load()) == digests[0]


def test_the_files_say_what_they_are(whole):
    """The format: a change of it must not go unnoticed."""
    assert json.loads((whole / "identity.json").read_text()) == {
        "teacher": "t1", "tokenizer": "v1", "rows": "r1", "vocabulary": 40, "top_k": 5, "shard_rows": 4,
    }  # fmt: skip
    manifest = json.loads((whole / "manifest.json").read_text())
    assert list(manifest) == ["rows", "tokens", "mass", "bytes"]
    assert (manifest["rows"], manifest["tokens"]) == (14, int(COUNTS.sum()))
