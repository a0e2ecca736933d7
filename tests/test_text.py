"""Corpora, splits and sampling rules, on the real embedded text and on toys that can be read."""

import gzip
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from lib.evaluation import text, wiki_a
from lib.evaluation.text import Corpus, load_corpus, sample_blocks, tokens_of, wiki_a_articles, windows
from lib.models.load import load

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="no folder of benchmark files beside the repository")

WIKI_A_CHARACTERS = {"train": 2493634, "validation": 114811, "test": 184746}
WIKI_A_TEST_SHA256 = "ba4fe54a65d403753c7445b2ed41cf73c55674a2b098e6ca868647ba958352d3"


class Letters:
    """A tokenizer that anyone can check: one id per character."""

    def __call__(self, text, return_tensors=None, verbose=True):
        ids = [ord(c) for c in text]
        return type("Encoded", (), {"input_ids": torch.tensor([ids]) if return_tensors else ids})

    def decode(self, ids, skip_special_tokens=False):
        return "".join(map(chr, ids))


class LettersWithStart(Letters):
    """Adds a start token, as Llama's tokenizer does."""

    def __call__(self, text, return_tensors=None, verbose=True):
        return super().__call__("^" + text, return_tensors)

    def decode(self, ids, skip_special_tokens=False):
        return super().decode(ids).replace("^", "" if skip_special_tokens else "^")


def corpus(*rows):
    return Corpus("toy", "train", rows, "toy", "0")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_wiki_a_is_the_text_of_the_committed_results():
    articles = wiki_a_articles()
    assert len(articles) == 100
    assert articles[0][0] == "Anarchism"
    splits = {split: load_corpus("wiki-a", split) for split in text.SPLITS}
    assert {split: len(c.text) for split, c in splits.items()} == WIKI_A_CHARACTERS
    assert splits["test"].sha256 == WIKI_A_TEST_SHA256


def test_wiki_a_splits_share_no_article():
    titles = {split: set() for split in text.SPLITS}
    for position, (title, _) in enumerate(wiki_a_articles()):
        titles[text.wiki_a_split(position)].add(title)
    assert {split: len(t) for split, t in titles.items()} == {"train": 84, "validation": 8, "test": 8}
    assert len(set.union(*titles.values())) == 100


def test_wiki_a_is_prose():
    rows = load_corpus("wiki-a", "test").rows
    assert not [row for row in rows if "[[" in row or "{{" in row or "'''" in row]
    assert "= References =" not in rows


@pytest.fixture
def cacheless(tmp_path, monkeypatch):
    """An empty cache, and nothing remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    wiki_a_articles.cache_clear()
    yield tmp_path / "cache"
    monkeypatch.undo()
    wiki_a_articles.cache_clear()


def test_the_articles_are_parsed_once_and_kept(cacheless, monkeypatch):
    """A damaged cache is parsed anew; one that is whole is read without gensim."""
    fresh = wiki_a_articles()
    [kept] = (cacheless / "pared-down").iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-1])
    wiki_a_articles.cache_clear()
    assert wiki_a_articles() == fresh
    assert kept.read_bytes() == whole
    monkeypatch.setattr(wiki_a, "_parsed", lambda: pytest.fail("parsed"))
    wiki_a_articles.cache_clear()
    assert wiki_a_articles() == fresh


def test_no_cache_is_needed(cacheless):
    cacheless.write_text("a file where the folder should be")
    assert len(wiki_a_articles()) == 100


def test_another_dump_is_refused(cacheless, monkeypatch):
    monkeypatch.setattr(wiki_a, "WIKI_DUMP_SHA256", "0" * 64)
    wiki_a_articles.cache_clear()
    with pytest.raises(ValueError, match="reinstall gensim"):
        load_corpus("wiki-a")


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [("wiki-b", "train", "wiki-a, wikitext2, ptb, c4, alpaca"), ("wiki-a", "dev", "train, validation, test")],
)
def test_unknown_names_list_the_known_ones(name, split, message):
    with pytest.raises(ValueError, match=message):
        load_corpus(name, split)


def test_text_files_are_split_in_order(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("\n\n".join(["zero\nlines", *map(str, range(1, 19)), "\n19"]) + "\n")
    train, validation, test = (load_corpus(str(file), split).rows for split in text.SPLITS)
    assert train == ("zero\nlines", *map(str, range(1, 16)))
    assert (validation, test) == (("16", "17"), ("18", "19"))
    file.write_text("  \n\n")
    with pytest.raises(ValueError, match="at least 10"):
        load_corpus(str(file))
    with pytest.raises(FileNotFoundError, match="does not exist: give the path of an existing .txt"):
        load_corpus(str(tmp_path / "none.txt"))
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(FileNotFoundError, match="is a folder"):
        load_corpus(str(tmp_path / "folder.txt"))


PLAIN = "\n\n".join(f"Paragraph {i} of Zürich.\nIts second line." for i in range(12))


def test_byte_order_mark_and_line_ends_change_nothing(tmp_path):
    _, tokenizer = load("wiki-a-llama")
    written = {"plain": PLAIN, "mark": "\ufeff" + PLAIN, "crlf": PLAIN.replace("\n", "\r\n"), "cr": PLAIN.replace("\n", "\r")}
    found = []
    for name, content in written.items():
        (tmp_path / f"{name}.txt").write_bytes(content.encode())
        found.append(load_corpus(str(tmp_path / f"{name}.txt")))
    assert len({corpus.sha256 for corpus in found}) == 1
    assert len({tuple(tokens_of(corpus, tokenizer).tolist()) for corpus in found}) == 1
    assert found[0].rows[0] == "Paragraph 0 of Zürich.\nIts second line."


@pytest.mark.parametrize(
    ("encoding", "place", "guess"),
    [("latin1", 16, "latin1"), ("utf-16", 0, "utf-16"), ("utf-16le", 1, "utf-16le"), ("utf-16be", 0, "utf-16be")],
)
def test_other_encodings_are_refused_with_a_remedy_that_works(tmp_path, encoding, place, guess):
    (tmp_path / "old.txt").write_bytes(PLAIN.encode(encoding))
    with pytest.raises(
        ValueError, match=rf"old.txt is not UTF-8 text, as byte \d+ shows: convert it with `iconv -f {guess} "
    ) as refused:
        load_corpus(str(tmp_path / "old.txt"))
    if encoding != "utf-16":  # whose first zero comes behind the mark
        assert f"byte {place} shows" in str(refused.value)
    if shutil.which("iconv"):
        subprocess.run(str(refused.value).split("`")[1], shell=True, check=True, cwd=tmp_path)
        assert load_corpus(str(tmp_path / "new.txt")).rows[0] == "Paragraph 0 of Zürich.\nIts second line."


def test_files_of_a_data_directory_are_read_in_the_same_way(tmp_path, data_dir):
    data_dir(tmp_path)
    (tmp_path / "ptb").mkdir()
    file = tmp_path / "ptb" / "ptb.test.txt"
    file.write_bytes("\ufeff no it was n't \r\n black monday \r\n".encode())
    assert load_corpus("ptb", "test").rows == (" no it was n't ", " black monday ")
    file.write_bytes("no caf\xe9".encode("latin1"))
    with pytest.raises(ValueError, match="byte 6 shows: convert it with `iconv -f latin1"):
        load_corpus("ptb", "test")
    (tmp_path / "calibration").mkdir()
    packed = tmp_path / "calibration" / "c4_pf_decoding.jsonl.gz"
    for content, message in (
        (gzip.compress(b'{"text": "x"}\n')[:-9], "cannot be read .*damaged, fetch it again"),
        (gzip.compress(b'{"text": "caf\xe9"}\n'), "not UTF-8 text, as byte 13 shows: it is damaged"),
        (gzip.compress(b'{"text": "x"}\n{"text"'), "line 2 is not a JSON record"),
        (gzip.compress(b'{"text": "x"}\n[1]\n'), "line 2 has a list, but c4 needs 'text'"),
        (gzip.compress(b'{"text": "x"}\n{"url": "y"}\n'), r"line 2 has columns \['url'\], but c4 needs 'text'"),
    ):
        packed.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_corpus("c4", "train")


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text(PLAIN)

    def refuse(path):
        raise PermissionError(13, "Permission denied")  # root may read everything

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(PermissionError, match="mine.txt may not be read: change its permissions"):
        load_corpus(str(tmp_path / "mine.txt"))


@pytest.mark.parametrize(
    "wrong", [{"samples": 0}, {"length": 1}, {"seed": -1}, {"rule": "best"}, {"samples": 2.5}, {"corpus": 3}]
)
def test_draws_that_cannot_be_are_refused_by_name(wrong):
    [name] = wrong
    with pytest.raises(ValueError, match=name):
        text.Calibration(**{"corpus": "wiki-a", "samples": 2, "length": 8} | wrong)


def test_data_directory_errors_name_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv(text.DATA_DIR_VARIABLE, str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"wikitext-2-raw/wiki.test.raw.*test split of wikitext2"):
        load_corpus("wikitext2", "test")
    with pytest.raises(
        ValueError, match="has only train, validation in .*, no test: for test use wiki-a, wikitext2, ptb, or a .txt"
    ):
        load_corpus("c4", "test")
    monkeypatch.delenv(text.DATA_DIR_VARIABLE)
    with pytest.raises(
        ValueError, match="has only train, validation, no test: for test use wiki-a, wikitext2, ptb, alpaca, or a"
    ):
        load_corpus("c4", "test")
    monkeypatch.setenv(text.DATA_DIR_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_corpus("wikitext2", "test")


def test_data_directory_by_environment(tmp_path, monkeypatch):
    monkeypatch.setenv(text.DATA_DIR_VARIABLE, str(tmp_path))
    (tmp_path / "wikitext-2-raw").mkdir()
    (tmp_path / "wikitext-2-raw" / "wiki.test.raw").write_text(" = A = \n \n words \n")
    # The hub's rows: a line keeps its end, a blank line is an empty row, and there is no row behind the last line.
    assert load_corpus("wikitext2", "test").rows == (" = A = \n", "", " words \n")
    (tmp_path / "ptb").mkdir()
    (tmp_path / "ptb" / "ptb.test.txt").write_text(" no it was n't \n black monday \n")
    assert load_corpus("ptb", "test").rows == (" no it was n't ", " black monday ")


def test_records_without_the_column_are_refused(tmp_path, data_dir):
    data_dir(tmp_path)
    (tmp_path / "calibration").mkdir()
    with gzip.open(tmp_path / "calibration" / "c4_pf_decoding.jsonl.gz", "wt") as file:
        file.write(json.dumps({"url": "x"}) + "\n")
    with pytest.raises(ValueError, match="'text'"):
        load_corpus("c4", "train")


def test_alpaca_prompts(tmp_path, data_dir):
    data_dir(tmp_path)
    (tmp_path / "calibration").mkdir()
    with gzip.open(tmp_path / "calibration" / "alpaca_2000.jsonl.gz", "wt") as file:
        for given in ("", "2, 3"):
            file.write(json.dumps({"instruction": "Add.", "input": given, "output": "5"}) + "\n")
    plain, with_input = load_corpus("alpaca", "train").rows
    assert plain.endswith("request.\n\n### Instruction:\nAdd.\n\n### Response:\n5")
    assert "further context" in with_input
    assert "### Input:\n2, 3\n\n### Response" in with_input


@needs_data
def test_wikitext_from_the_data_directory(data_dir):
    data_dir(SHARED)
    corpus = load_corpus("wikitext2", "test")
    assert len(corpus.rows) == 4358
    assert corpus.rows[1] == " = Robert Boulter = \n"
    for name, split in (("wikitext2", "train"), ("c4", "train"), ("c4", "validation"), ("alpaca", "train")):
        assert len(load_corpus(name, split).text) > 100_000


def test_without_a_network_the_error_says_what_to_do(monkeypatch):
    monkeypatch.delenv(text.DATA_DIR_VARIABLE, raising=False)
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(FileNotFoundError, match=r"--data-dir, or use the embedded corpus wiki-a"):
        load_corpus("wikitext2", "test")


def test_stream_is_one_join():
    assert tokens_of(corpus("ab", "", "c"), Letters()).tolist() == [ord(c) for c in "ab\n\n\n\nc"]


def test_windows_drop_the_tail():
    assert windows(torch.arange(10), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(ValueError, match="fewer than one window"):
        windows(torch.arange(3), 4)


ROWS = tuple(c * 7 for c in "abcdefghijkl")


def test_rows_rule_joins_consecutive_rows_and_uses_each_once():
    blocks = sample_blocks(corpus(*ROWS), Letters(), 4, 12, generator())
    assert blocks.shape == (4, 12)
    seen = []
    for block in blocks:
        string = "".join(map(chr, block))
        first, second = string.split("\n\n")
        assert ord(second[0]) > ord(first[0])
        assert string == (first[0] * 7 + "\n\n" + second[0] * 7)[:12]
        seen += [first[0], second[0]]
    assert len(set(seen)) == len(seen)


def test_sampling_is_seeded():
    draws = [sample_blocks(corpus(*ROWS), Letters(), 3, 12, generator(s)) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_retokenised_rule_is_the_published_deviation():
    plain = sample_blocks(corpus(*ROWS), LettersWithStart(), 2, 12, generator())
    again = sample_blocks(corpus(*ROWS), LettersWithStart(), 2, 12, generator(), rule="rows-retokenised")
    assert torch.equal(plain, again)  # a reversible tokenizer changes nothing
    assert (again[:, 0] == ord("^")).all()
    assert (again[:, 1] != ord("^")).all()  # one start token, not two


def test_offsets_rule_cuts_the_joined_stream():
    whole = "\n\n".join(ROWS)
    for block in sample_blocks(corpus(*ROWS), Letters(), 20, 12, generator(), rule="offsets"):
        assert "".join(map(chr, block)) in whole


def test_scripts_with_many_tokens_a_character():
    """Chinese is about three byte-level tokens a character: few characters can fill a block."""
    _, tokenizer = load("wiki-a-llama")
    blocks = sample_blocks(corpus("漢字" * 60), tokenizer, 1, 128, generator())
    assert blocks.shape == (1, 128)


@pytest.mark.parametrize("rule", text.SAMPLING_RULES)
def test_corpus_too_short(rule):
    with pytest.raises(ValueError, match="fewer or shorter samples"):
        sample_blocks(corpus("ab", "cd"), Letters(), 2, 12, generator(), rule=rule)


def test_unknown_rule_and_silly_sizes():
    with pytest.raises(ValueError, match="rows, rows-retokenised, offsets"):
        sample_blocks(corpus("ab"), Letters(), 1, 2, generator(), rule="best")
    with pytest.raises(ValueError, match="at least 1 sample"):
        sample_blocks(corpus("ab"), Letters(), 0, 2, generator())


def test_embedded_tokenizer_gives_text_back():
    _, tokenizer = load("wiki-a-llama")
    sample = load_corpus("wiki-a", "test").rows[3] + " ünïcödé ∑ 漢字\t\n"
    assert tokenizer.decode(tokenizer(sample).input_ids) == sample
    assert len(tokenizer) == 2048


@needs_data
def test_wikitext_2_is_another_spelling(data_dir):
    data_dir(SHARED)
    assert load_corpus("wikitext-2", "test") == load_corpus("wikitext2", "test")
    # The papers join the hub's rows, line ends included, with a blank line.
    assert load_corpus("wikitext-2", "test").text[:26] == "\n\n = Robert Boulter = \n\n\n\n"
