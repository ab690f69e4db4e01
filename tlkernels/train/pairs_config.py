"""The options of the data of `tlkernels contrast`."""

from __future__ import annotations

from dataclasses import dataclass

from tlkernels.train.config import check_encoding, check_separator, check_shares, require


@dataclass
class PairsConfig:
    """The rows: pairs of a query and a key, or texts or images with or without labels.

    Args:
        path: A .csv, .tsv, .jsonl, .ndjson, .json (also .gz) or .parquet file, a folder of images or data files, or a
            hub name. None: built-in pairs, docstrings and their functions in the installed packages.
        subset: The subset of a hub data set that has several.
        split: The split to train on, if `path` has several.
        eval: A file like `path`, or another split of `path`, to evaluate on while training. None: a share of the rows.
        test: The same for the hold-out of the final table, on which nothing is tuned. None: a share of the rows.
        eval_fraction: Share of the rows for `eval` if none is named, 0 < share < 1. Rows with the same id, query or key
            stay together; of the built-in pairs, whole packages do.
        test_fraction: Share of the rows for `test` if none is named, 0 <= share < 1.
            0: the final table uses the rows of `eval`.
        query_column: Column with the text of the query.
        key_column: Column with the text of the key, which matches the query.
        negative_column: Column with the hard negatives, used if it exists: a text or a list of texts, which do not
            match the query. In a .csv or .tsv file, a list is written as JSON. Every row has the same number.
        id_column: Column with an id, used if it exists. Rows with the same id are not taken as negatives of each other,
            and neither are rows with the same query or key. That is for the loss `info_nce`; other losses do not look
            at it. In the scores of pairs, the keys of such rows all belong to the query.
        label_column: Column with the label, if rows with the same label are to be similar.
        image_column: Column with the image. The keys are images if there is no key column; where the rows are no
            pairs, they are images if there is no query column.
        encoding: Encoding of text files, by its name in Python, such as cp1252 or utf-16. None: UTF-8, or that of the
            file's byte order mark.
        separator: The character between the fields of .csv and .tsv files; \\t is a tab. None: a comma, a tab in .tsv.
        quotes: Whether quotation marks may enclose the fields of .csv and .tsv files (a doubled one stands for one of
            the text). Otherwise they are text. None: true in .csv, false in .tsv.
        query_length: The number of tokens after which a query is cut, special tokens included, 3 or more; never more
            than the model's positions. None: 64.
        key_length: The same for keys and hard negatives. None: 128.
        packages: Built-in data only: the largest number of packages to read. None: as many as `pairs` need.
        pairs: Built-in data only: the number of pairs, all splits together, 3 or more. None: 5000.
        negatives: Built-in data only: hard negatives of each pair, other functions of the same file.
    """

    path: str | None = None
    subset: str | None = None
    split: str = "train"
    eval: str | None = None
    test: str | None = None
    eval_fraction: float = 0.1
    test_fraction: float = 0.1
    query_column: str = "query"
    key_column: str = "key"
    negative_column: str = "negative"
    id_column: str = "id"
    label_column: str = "label"
    image_column: str = "image"
    encoding: str | None = None
    separator: str | None = None
    quotes: bool | None = None
    query_length: int | None = None
    key_length: int | None = None
    packages: int | None = None
    pairs: int | None = None
    negatives: int = 0

    @property
    def query_tokens(self) -> int:
        """`query_length`, or its default."""
        return self.query_length or 64

    @property
    def key_tokens(self) -> int:
        """`key_length`, or its default."""
        return self.key_length or 128


def check_pairs(config: PairsConfig) -> None:
    """Raise `UserError` with the name of the first option whose value is out of range."""
    check_encoding(config.encoding)
    check_separator(config.separator)
    least = {"query_length": 3, "key_length": 3, "packages": 1, "pairs": 3, "negatives": 0}
    for name, smallest in least.items():
        value = getattr(config, name)
        require(value is None or value >= smallest, f"data.{name}", f"{smallest} or more", value)
    check_shares(config.eval_fraction, config.test_fraction)
    names = ("query_column", "key_column", "negative_column", "id_column", "label_column", "image_column")
    columns: dict[str, str] = {}
    for name in names:
        column = getattr(config, name)
        require(column not in columns, f"data.{name}", f"another column than {columns.get(column)}", repr(column))
        columns[column] = name
