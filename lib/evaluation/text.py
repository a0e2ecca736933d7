"""Corpora and the rules that turn them into fixed-length blocks of token ids.

A corpus is a list of *rows* (paragraphs), because every paper of the suite samples rows and joins them with a blank
line. `load_corpus` finds the rows, `tokens_of` and `windows` build the evaluation text, `sample_blocks` the
calibration set.
"""

from __future__ import annotations

import codecs
import functools
import gzip
import hashlib
import io
import json
import os
import re
import shlex
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from lib.evaluation.wiki_a import WIKI_DUMP, wiki_a_articles, wiki_a_split
from lib.primitives.checks import COUNTS, FROM_ZERO, check_settings, choose_one

DATA_DIR_VARIABLE = "PARED_DATA_DIR"
SPLITS = ("train", "validation", "test")
SEPARATOR = "\n\n"  # how the papers of the suite join rows before tokenising


@dataclass(frozen=True)
class Corpus:
    """Rows of text, with the facts by which results are traced to them."""

    name: str
    split: str
    rows: tuple[str, ...]
    source: str  # hub id, file name inside the data directory, or package resource
    sha256: str  # of the joined text

    @property
    def text(self) -> str:
        return SEPARATOR.join(self.rows)

    def record(self) -> dict:
        """The corpus as written into manifests and ledger keys."""
        return {"corpus": self.name, "split": self.split, "source": self.source, "sha256": self.sha256}


def load_corpus(name: str, split: str = "train") -> Corpus:
    """Rows of `name`: `wiki-a` (embedded), `wikitext2` (or `wikitext-2`), `ptb`, `c4`, `alpaca`, or the path of a .txt file.

    Hub corpora are read from the folder named by the environment variable PARED_DATA_DIR where it is set, and from the hub
    otherwise; the corpus keeps the same name and rows either way. The paragraphs of a .txt file are
    split in order, the first 80 % to train, 10 % each to validation and test.

    Raises ValueError for an unknown name or split, an empty corpus or a file that is not UTF-8, FileNotFoundError for a missing
    file, PermissionError for one that may not be read.
    """
    name = "wikitext2" if name == "wikitext-2" else name
    choose_one("split", split, SPLITS)
    if str(name).endswith(".txt"):
        path = Path(name).expanduser()
        if not path.is_file():
            found = "is a folder" if path.is_dir() else "does not exist"
            raise FileNotFoundError(f"the text file {path} {found}: give the path of an existing .txt file")
        rows, source = _text_file_rows(path, split), path.name
    elif name == "wiki-a":
        rows, source = _wiki_a_rows(split), WIKI_DUMP
    elif name in HUB_CORPORA:
        folder = os.environ.get(DATA_DIR_VARIABLE)
        rows, source = _local_rows(name, split, Path(folder)) if folder else _hub_rows(name, split)
    else:
        known = ", ".join(["wiki-a", *HUB_CORPORA])
        raise ValueError(f"unknown corpus {name!r}: choose one of {known}, or the path of a .txt file")
    if not any(row.strip() for row in rows):
        raise ValueError(f"corpus {name!r} ({split}) from {source} is empty: nothing to calibrate or evaluate on")
    digest = hashlib.sha256(SEPARATOR.join(rows).encode()).hexdigest()
    return Corpus(str(name), split, tuple(rows), source, digest)


def evaluation_text(name: str) -> Corpus:
    """The part of a corpus on which models are evaluated: its test split; of C4, which has none, the validation split."""
    return load_corpus(name, "validation" if name == "c4" else "test")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, packed by gzip where its name ends in .gz, without byte order mark, with line ends \\n.

    Raises ValueError, with the place and a remedy, for other encodings and damaged files, PermissionError for a file that may not
    be read.
    """
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except PermissionError as error:
        raise PermissionError(f"{path} may not be read: change its permissions (`chmod +r`), or give another file") from error
    except (OSError, EOFError, zlib.error) as error:  # of gzip
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error}): it is damaged, fetch it again") from error
    place = data.find(b"\0")  # UTF-16 of plain English is valid UTF-8, in which every second character is a zero
    if place < 0:
        try:
            return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError as error:
            place = error.start
    raise ValueError(f"{path} is not UTF-8 text, as byte {place} shows: {_remedy(path, data, place)}")


def _remedy(path: Path, data: bytes, place: int) -> str:
    """What to do about a file that is not UTF-8, as its byte `place` shows."""
    if path.suffix == ".gz":
        return "it is damaged, fetch it again"
    encoding = "latin1"
    if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        encoding = "utf-16"
    elif data[place] == 0:
        encoding = "utf-16le" if place % 2 else "utf-16be"
    command = f"iconv -f {encoding} -t utf-8 {shlex.quote(path.name)} > new{path.suffix}"
    return f"convert it with `{command}`, where -f names its encoding, probably {encoding}"


def _wiki_a_rows(split: str) -> list[str]:
    return [row for i, (_, rows) in enumerate(wiki_a_articles()) if wiki_a_split(i) == split for row in rows]


# --- the papers' corpora, from the hub or from a folder --------------------------------------------------------------


@dataclass(frozen=True)
class _HubCorpus:
    """Where a corpus lives: hub id, configuration and column, and the file of each split in a data directory."""

    hub_id: str
    config: str | None
    column: str
    files: dict[str, str]
    splits: dict[str, str] | None = None  # our split -> the hub's, where they differ


HUB_CORPORA = {
    "wikitext2": _HubCorpus(
        "Salesforce/wikitext", "wikitext-2-raw-v1", "text",
        {
            "train": "wikitext-2-raw/wiki.train.first1MB.raw",
            "validation": "wikitext-2-raw/wiki.valid.raw",
            "test": "wikitext-2-raw/wiki.test.raw",
        },
    ),
    "ptb": _HubCorpus(
        "ptb-text-only/ptb_text_only", "penn_treebank", "sentence",
        {"train": "ptb/ptb.train.txt", "validation": "ptb/ptb.valid.txt", "test": "ptb/ptb.test.txt"},
    ),
    "c4": _HubCorpus(
        "allenai/c4", "en", "text",
        {"train": "calibration/c4_pf_decoding.jsonl.gz", "validation": "calibration/c4_en_demo300.jsonl.gz"},
    ),
    "alpaca": _HubCorpus(
        "tatsu-lab/alpaca", None, "text", {"train": "calibration/alpaca_2000.jsonl.gz"},
    ),
}  # fmt: skip

_ALPACA_INTRO = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."


def _alpaca_text(record: dict) -> str:
    """Stanford Alpaca's published prompt template, which the hub's `text` column holds ready-made."""
    given = record.get("input", "")
    intro = _ALPACA_INTRO.format(", paired with an input that provides further context" if given else "")
    middle = f"\n\n### Input:\n{given}" if given else ""
    return f"{intro}\n\n### Instruction:\n{record['instruction']}{middle}\n\n### Response:\n{record['output']}"


def _local_rows(name: str, split: str, folder: Path) -> tuple[list[str], str]:
    if not folder.is_dir():
        raise FileNotFoundError(f"data directory {folder} does not exist: set {DATA_DIR_VARIABLE} or --data-dir to a folder")
    if split not in HUB_CORPORA[name].files:
        held = ", ".join(HUB_CORPORA[name].files)
        raise ValueError(
            f"corpus {name!r} has only {held} in a data directory, no {split}: for {split} use {_with_split(split, local=True)}"
        )
    relative = HUB_CORPORA[name].files[split]
    path = folder / relative
    if not path.is_file():
        raise FileNotFoundError(
            f"data directory {folder} has no {relative}, the {split} split of {name}: add that file, or leave out --data-dir and "
            f"{DATA_DIR_VARIABLE} to use the hub"
        )
    lines = io.StringIO(read_text(path))
    if ".jsonl" not in path.name:
        return _lines_as_rows(name, lines), relative
    return [_row(line, name, f"{relative}, line {i}") for i, line in enumerate(lines, 1) if line.strip()], relative


def _row(line: str, name: str, place: str) -> str:
    """The text of a line of a JSON file of the corpus `name`."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not a JSON record ({error}): fetch the file again") from error
    column = HUB_CORPORA[name].column
    if isinstance(record, dict) and column in record:
        return record[column]
    if not isinstance(record, dict) or not {"instruction", "output"} <= set(record):
        held = f"columns {sorted(record)}" if isinstance(record, dict) else f"a {type(record).__name__}"
        raise ValueError(f"{place} has {held}, but {name} needs {column!r}")
    return _alpaca_text(record)


def _with_split(split: str, local: bool) -> str:
    """The corpora that have a split, in words; local: in a data directory."""
    on_hub = {"c4": ("train", "validation")}  # the others have all three there
    known = [name for name, spec in HUB_CORPORA.items() if split in (spec.files if local else on_hub.get(name, SPLITS))]
    return f"{', '.join(['wiki-a', *known])}, or a .txt file"


def _hub_rows(name: str, split: str) -> tuple[list[str], str]:
    import datasets

    spec = HUB_CORPORA[name]
    try:
        if name == "c4":  # hundreds of gigabytes: only the first shard, as every paper does
            shard = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}
            if split not in shard:
                raise ValueError(
                    f"corpus 'c4' has only train, validation, no {split}: for {split} use {_with_split(split, local=False)}"
                )
            table = datasets.load_dataset(spec.hub_id, data_files={split: shard[split]}, split=split)
        elif name == "alpaca":  # one published split; the SliceGPT code cuts it 80/10/10 by two seeded draws
            whole = datasets.load_dataset(spec.hub_id, split="train").train_test_split(test_size=0.2, seed=42)
            rest = whole["test"].train_test_split(test_size=0.5, seed=42)
            table = {"train": whole["train"], "validation": rest["test"], "test": rest["train"]}[split]
        elif name == "ptb":  # published as a loading script, which is not run here: the hub's own conversion is used
            table = datasets.load_dataset(spec.hub_id, spec.config, split=split, revision="refs/convert/parquet")
        else:
            table = datasets.load_dataset(spec.hub_id, spec.config, split=split)
    except (OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise FileNotFoundError(
            f"corpus {name!r} could not be read from the hub ({spec.hub_id}): {type(error).__name__}. Without a network, "
            f"put {spec.files.get(split, 'the file')} into a folder and name that folder in {DATA_DIR_VARIABLE} or "
            "--data-dir, or use the embedded corpus wiki-a."
        ) from error
    return list(table[spec.column]), spec.hub_id


def _lines_as_rows(name: str, file) -> list[str]:
    """Lines of a raw text file as the hub's rows: WikiText keeps line ends and empties blank lines, PTB has neither."""
    if name == "wikitext2":
        return [line if line.strip() else "" for line in file]
    return [line.rstrip("\n") for line in file]


def _text_file_rows(path: Path, split: str) -> list[str]:
    rows = [p.strip("\n") for p in re.split(r"\n\s*\n", read_text(path)) if p.strip()]
    if len(rows) < 10:
        raise ValueError(
            f"{path.name} has {len(rows)} paragraphs: at least 10, separated by blank lines, are needed to split it into train, "
            "validation and test"
        )
    first, second = len(rows) * 8 // 10, len(rows) * 9 // 10
    return {"train": rows[:first], "validation": rows[first:second], "test": rows[second:]}[split]


# --- rows to token ids -----------------------------------------------------------------------------------------------


def tokens_of(corpus: Corpus, tokenizer) -> torch.Tensor:
    """All rows joined with a blank line and tokenised once, as in the perplexity protocol. Returns ids [n_tokens]."""
    ids = tokenizer(corpus.text, return_tensors="pt", verbose=False).input_ids[0]
    return ids.to(torch.long)


def windows(tokens: torch.Tensor, length: int) -> torch.Tensor:
    """Cut ids [n_tokens] into non-overlapping windows [n, length]; the incomplete tail is dropped."""
    count = len(tokens) // length
    if count == 0:
        raise ValueError(f"the text has {len(tokens)} tokens, fewer than one window of {length}: use a longer text")
    return tokens[: count * length].view(count, length)


SAMPLING_RULES = ("rows", "rows-retokenised", "offsets")


def sample_blocks(
    corpus: Corpus, tokenizer, samples: int, length: int, generator: torch.Generator, rule: str = "rows"
) -> torch.Tensor:
    """Draw a calibration set of token ids [samples, length], every position real (no padding).

    - `rows`: SliceGPT's rule. Start at a random row, join the rows that follow until `length` tokens are there, cut;
      used rows are not drawn again.
    - `rows-retokenised`: the same, then decoded and tokenised again as the authors' code does, which can move token
      borders and adds the tokenizer's BOS; cut to `length` once more.
    - `offsets`: the rule of GPTQ and SVD-LLM. Tokenise the joined text once and cut at random offsets (overlaps happen).
    """
    choose_one("sampling rule", rule, SAMPLING_RULES)
    if samples < 1 or length < 2:
        raise ValueError(f"a calibration set needs at least 1 sample of 2 tokens, not {samples} of {length}")
    if rule == "offsets":
        tokens = tokens_of(corpus, tokenizer)
        if len(tokens) <= length:
            raise _too_short(corpus, samples, length)
        starts = torch.randint(len(tokens) - length, (samples,), generator=generator)
        return torch.stack([tokens[s : s + length] for s in starts.tolist()])

    rows = [row for row in corpus.rows if row.strip()]
    blocks: list[list[int]] = []
    while len(blocks) < samples:
        if not rows:
            raise _too_short(corpus, samples, length, len(blocks))
        start = int(torch.randint(len(rows), (1,), generator=generator))
        ids, stop = _fill(rows, start, tokenizer, length)
        if ids is None:  # the rows from here to the end of the corpus are too short for a block
            del rows[start:]
            continue
        if rule == "rows-retokenised":
            ids = tokenizer(tokenizer.decode(ids, skip_special_tokens=True), verbose=False).input_ids[:length]
            if len(ids) < length:  # fewer tokens than before: the reference pads, we draw another start
                del rows[start:stop]
                continue
        blocks.append(ids[:length])
        del rows[start:stop]
    return torch.tensor(blocks)


def _fill(rows: list[str], start: int, tokenizer, length: int) -> tuple[list[int] | None, int]:
    """Join rows from `start` until they hold `length` tokens. Returns (ids cut to length, index after the last row)."""
    stop = start
    while stop < len(rows):
        stop += 1
        text = SEPARATOR.join(rows[start:stop])
        if len(text.encode()) < length:  # a token covers at least one byte: not worth tokenising yet
            continue
        ids = tokenizer(text, verbose=False).input_ids
        if len(ids) >= length:
            return ids[:length], stop
    return None, stop


def _too_short(corpus: Corpus, samples: int, length: int, found: int = 0) -> ValueError:
    return ValueError(
        f"corpus {corpus.name!r} ({corpus.split}) gives only {found} of the {samples} blocks of {length} tokens: "
        "use fewer or shorter samples, or a larger corpus"
    )


def spread(count: int, some: int | None) -> list[int]:
    """The positions of `some` windows of `count`, evenly spread over the text; None: all of them."""
    some = count if some is None else min(some, count)
    return [i * count // some for i in range(some)]


@functools.lru_cache(maxsize=2)
def calibration_text(name: str, split: str = "train") -> Corpus:
    """A split of a corpus, cached: every draw of calibration text needs it, and a hub corpus is large."""
    return load_corpus(name, split)


@dataclass(frozen=True)
class Calibration:
    """How a calibration set is drawn: corpus, number and length of samples, seed, sampling rule, split of the corpus.

    Raises ValueError for values that cannot be.
    """

    corpus: str
    samples: int
    length: int
    seed: int = 0
    rule: str = "rows"
    split: str = "train"

    def __post_init__(self):
        check_settings(self, samples=COUNTS, length="[2, inf)", seed=FROM_ZERO, rule=SAMPLING_RULES, split=SPLITS)

    def record(self) -> dict:
        return asdict(self) | {"sha256": calibration_text(self.corpus, self.split).sha256}
