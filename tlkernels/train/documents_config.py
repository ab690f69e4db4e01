"""The options of the documents of `tlkernels lm`."""

from __future__ import annotations

from dataclasses import dataclass

from tlkernels.train.config import check_encoding, check_shares, require


@dataclass
class CorpusConfig:
    """The documents, from which the rows are made: text files, texts of records, or chats.

    A document is one text file, the text of one record, or one chat: a list of {"role": ..., "content": ...}.

    Args:
        path: A text file (.txt, .md, .rst, .py), a file of records (.csv, .tsv, .jsonl, .ndjson, .json, also .gz, or
            .parquet), a folder of one of the two kinds, or a hub name. None: built-in documents, docstrings for masked
            and source files for causal language modelling, both of the installed packages.
        subset: The subset of a hub data set that has several.
        split: The split to train on, if `path` has several. A folder of text files has splits if each file is in a
            subfolder train, validation or test.
        eval: A file or folder like `path`, or another split of `path`, to evaluate on while training. None: a share of
            the documents.
        test: The same for the hold-out of the final table, on which nothing is tuned. None: a share of the documents.
        eval_fraction: Share of the documents for `eval` if none is named, 0 < share < 1. The built-in docstrings have
            the sides of `tlkernels finetune`, whatever the shares.
        test_fraction: Share of the documents for `test` if none is named, 0 <= share < 1.
            0: the final table uses the documents of `eval`.
        text_column: Column with the text.
        chat_column: Column with the chat, used if there is no text column; in .jsonl, .ndjson, .json and .parquet.
        encoding: Encoding of text files, by its name in Python, such as cp1252 or utf-16. None: UTF-8, or that of the
            file's byte order mark.
        length: The largest number of tokens in a row, special tokens included, 8 or more; never more than the model's
            positions. A longer document is cut into pieces. None: 128, and 256 for causal models.
        pack: Whether a row holds as many pieces as fit. A piece attends to no other one.
        documents: Built-in data only: the number of documents, all splits together, 3 or more.
            None: 3200 docstrings; 40 source files, and 9 in `distill`.
    """

    path: str | None = None
    subset: str | None = None
    split: str = "train"
    eval: str | None = None
    test: str | None = None
    eval_fraction: float = 0.1
    test_fraction: float = 0.1
    text_column: str = "text"
    chat_column: str = "messages"
    encoding: str | None = None
    length: int | None = None
    pack: bool = True
    documents: int | None = None

    def tokens(self, causal: bool) -> int:
        """Return `length`, or its default."""
        return self.length or (256 if causal else 128)


def check_corpus(config: CorpusConfig) -> None:
    """Raise `UserError` with the name of the first option whose value is out of range."""
    check_encoding(config.encoding)
    require(config.length is None or config.length >= 8, "data.length", "8 or more", config.length)
    require(config.documents is None or config.documents >= 3, "data.documents", "3 or more", config.documents)
    check_shares(config.eval_fraction, config.test_fraction)
    columns = (config.text_column, config.chat_column)
    require(columns[0] != columns[1], "data.text_column and --data.chat_column", "two columns", columns[0])
