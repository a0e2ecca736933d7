"""A GGUF file is the model that was exported: run from the file alone, by our reading of the format and by llama.cpp."""

import copy
import functools
import inspect
import itertools
import json
import math
import re
import shutil
import urllib.request
import warnings

import gguf
import pytest
import tokenizers
import torch
import transformers
from invoke import Exit
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

import tasks
from lib.evaluation.text import load_corpus, sample_blocks
from lib.methods import METHODS, make
from lib.models.checkpoint import export, save
from lib.models.gguf_export import SPLITS, kinds, to_gguf
from lib.models.load import load
from lib.papers.slicegpt import global_axes, slice_globally, stock_model
from lib.primitives.structured import remove_groups, remove_neurons
from tests.conftest import relative, tiny, token_ids

ROWS = 2050  # embeddings: two more than the tokenizer of the embedded models has tokens
LLAMA3 = dict(
    rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)  # fmt: skip

LONG = dict(
    rope_type="longrope", rope_theta=10000.0, factor=1.0, attention_factor=1.0, original_max_position_embeddings=32,
    short_factor=[1.0, 1.5, 2.0, 4.0, 8.0, 8.0], long_factor=[1.0, 1.5, 2.0, 4.0, 8.0, 8.0],
)  # fmt: skip


def sliced(family, **settings):
    model = tiny(family, vocab_size=ROWS, **settings)
    return stock_model(slice_globally(model, global_axes(model, token_ids()), 24))


# What is exported, and the architecture that the file must name.
CASES = {
    "llama, sliced": (lambda: sliced("llama"), "llama"),
    "mistral, sliced": (lambda: sliced("mistral"), "llama"),
    "qwen2, sliced": (lambda: sliced("qwen2"), "llama"),
    "qwen2, heads as wide as the stream": (lambda: tiny("qwen2", vocab_size=ROWS, head_dim=8), "qwen2"),
    "qwen2, stretched": (lambda: tiny("qwen2", vocab_size=ROWS, head_dim=8, rope_parameters=LLAMA3), "llama"),
    "qwen2, stretched evenly": (
        lambda: tiny("qwen2", vocab_size=ROWS, head_dim=8, rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=3.0)),
        "qwen2",
    ),
    "llama, tied": (lambda: tiny("llama", vocab_size=ROWS, tie_word_embeddings=True), "llama"),
    "llama, biases everywhere": (lambda: tiny("llama", vocab_size=ROWS, attention_bias=True, mlp_bias=True), "llama"),
    "llama, other rotation": (
        lambda: sliced("llama", num_key_value_heads=1, rope_parameters={"rope_type": "default", "rope_theta": 300.0}),
        "llama",
    ),
    "llama 3, stretched": (lambda: sliced("llama", rope_parameters=LLAMA3), "llama"),
    "llama, stretched by factors": (lambda: sliced("llama", rope_parameters=LONG), "llama"),
    "llama, stretched evenly": (
        lambda: sliced("llama", rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}),
        "llama",
    ),
    "llama, other epsilon": (lambda: sliced("llama", rms_norm_eps=1e-2), "llama"),
}
TEXTS = [
    "", "The history of", " a  b   c    d", "one\n\ntwo\n\n\n three\n", "\t tabs\t\tand \r\n returns\r", "naïve café – “quotes”…",
    "日本語の文章と русский текст", "👩‍👩‍👧 🙂🙂", "don't I'LL we've 3rd 12345678 1,000.50",
    "f(x)==y;//z__", "if 1 :\n        return  2   ** 31\n" + " " * 40 + "end", "nbsp\u00a0and\u3000wide ", "\x00\x7f",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return load("wiki-a-llama")[1]


@pytest.fixture(scope="module")
def embedded(tmp_path_factory, tokenizer):
    """The embedded Llama, sliced to width 96 and exported: a folder."""
    model, _ = load("wiki-a-llama")
    ids = sample_blocks(load_corpus("wiki-a"), tokenizer, 8, 64, torch.Generator().manual_seed(0))
    return export(
        stock_model(slice_globally(model, global_axes(model, ids), 96)), tokenizer, tmp_path_factory.mktemp("embedded") / "m"
    )


def header(path):
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def matrices(path):
    return {t.name: torch.tensor(gguf.quants.dequantize(t.data, t.tensor_type)) for t in gguf.GGUFReader(path).tensors}


# --- the network ---------------------------------------------------------------------------------------------------------


def run(path, ids):
    """Logits [batch, tokens, vocabulary] in float64 of the network that a GGUF file describes, from its keys and tensors."""
    keys, w = header(path), {name: value.double() for name, value in matrices(path).items()}
    arch = keys["general.architecture"]
    keys = {name.removeprefix(f"{arch}."): value for name, value in keys.items()}
    size = keys["attention.key_length"]

    def each(name):  # one number stands for all blocks
        return keys[name] if isinstance(keys[name], list) else [keys[name]] * keys["block_count"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def norm(x, name):
        return w[f"{name}.weight"] * x / (x.square().mean(-1, keepdim=True) + keys["attention.layer_norm_rms_epsilon"]).sqrt()

    def split(x, count):
        return x.unflatten(-1, (count, -1)).transpose(1, 2)

    def rotated(x):
        pairs = torch.arange(size).view(2, -1).T if arch == "qwen2" else torch.arange(size).view(-1, 2)
        frequency = keys["rope.freq_base"] ** (-torch.arange(0, size, 2) / keys["rope.dimension_count"]).double()
        stretch = keys.get("rope.scaling.factor", 1) * w.get("rope_freqs.weight", 1)
        angle = torch.arange(x.shape[-2])[:, None] * frequency / stretch
        turned = torch.view_as_complex(x[..., pairs].contiguous()) * torch.polar(torch.ones_like(angle), angle)
        out = torch.empty_like(x)
        out[..., pairs] = torch.view_as_real(turned)
        return out

    x = w["token_embd.weight"][ids]
    for i, (heads, groups) in enumerate(zip(each("attention.head_count"), each("attention.head_count_kv"), strict=True)):
        assert w[f"blk.{i}.ffn_down.weight"].shape[1] == each("feed_forward_length")[i] > 0
        u = norm(x, f"blk.{i}.attn_norm")
        q, k, v = (split(linear(u, f"blk.{i}.attn_{n}"), c) for n, c in (("q", heads), ("k", groups), ("v", groups)))
        k, v = (t.repeat_interleave(heads // groups, dim=1) for t in (rotated(k), v))
        energy = (rotated(q) @ k.mT / size**0.5).masked_fill(torch.ones(u.shape[1], u.shape[1]).triu(1).bool(), -torch.inf)
        x = x + linear((energy.softmax(-1) @ v).transpose(1, 2).flatten(2), f"blk.{i}.attn_output")
        u = norm(x, f"blk.{i}.ffn_norm")
        gate = torch.nn.functional.silu(linear(u, f"blk.{i}.ffn_gate"))
        x = x + linear(gate * linear(u, f"blk.{i}.ffn_up"), f"blk.{i}.ffn_down")
    return norm(x, "output_norm") @ w.get("output.weight", w["token_embd.weight"]).T


@pytest.mark.parametrize("case", CASES)
def test_the_file_is_the_network(tmp_path, tokenizer, exact_norms, case):
    make, arch = CASES[case]
    model = make()
    path = to_gguf(export(model, tokenizer, tmp_path / "m"), tmp_path / "m.gguf", "float32")
    assert header(path)["general.architecture"] == arch
    with torch.no_grad():
        assert relative(run(path, token_ids()), model(token_ids()).logits) < 1e-5


def test_the_cases_can_fail():
    """Leaving out the rotary factors, or the epsilon, moves the logits far more than 1e-5."""
    for settings in ({"rope_parameters": LLAMA3}, {"rms_norm_eps": 1e-2}):
        one, two = tiny("llama"), tiny("llama", **settings)
        with torch.no_grad():
            assert relative(one(token_ids()).logits, two(token_ids()).logits) > 1e-3


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float16", 5e-3), ("bfloat16", 3e-2)])
def test_embedded_model_in_every_precision(tmp_path, embedded, dtype, tolerance):
    plain = transformers.AutoModelForCausalLM.from_pretrained(embedded, dtype=torch.float32)
    path = to_gguf(embedded, tmp_path / "m.gguf", dtype)
    ids = torch.arange(1, 201).view(2, 100)
    with torch.no_grad():
        assert relative(run(path, ids), plain(ids).logits.double()) < tolerance
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    matrix = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    assert all(kind == ("F32" if "norm" in name else matrix) for name, kind in kinds.items())


def test_values_are_rounded_once(tmp_path, tokenizer):
    model = sliced("llama").float()
    for dtype in ("float16", "bfloat16", "float32"):
        found = matrices(to_gguf(export(model, tokenizer, tmp_path / dtype), tmp_path / f"{dtype}.gguf", dtype))
        kind = getattr(torch, dtype)
        assert torch.equal(found["blk.1.ffn_down.weight"], model.model.layers[1].mlp.down_proj.weight.to(kind).float())
        assert torch.equal(found["blk.1.attn_v.weight"], model.model.layers[1].self_attn.v_proj.weight.to(kind).float())
        assert torch.equal(found["blk.1.attn_norm.weight"], model.model.layers[1].input_layernorm.weight)


def test_sharded_folder_gives_the_same_file(tmp_path, tokenizer):
    model = sliced("llama").float()
    for name, size in (("one", "1GB"), ("many", "50KB")):
        model.save_pretrained(tmp_path / name / "m", max_shard_size=size)
        tokenizer.save_pretrained(tmp_path / name / "m")
        to_gguf(tmp_path / name / "m", tmp_path / f"{name}.gguf")
    assert len(list((tmp_path / "many" / "m").glob("model-*.safetensors"))) > 2
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "many.gguf").read_bytes()


def test_sliding_window_bounds_the_context(tmp_path, tokenizer):
    for window, context in ((16, 16), (None, 64), (100, 64)):
        folder = export(sliced("mistral", sliding_window=window), tokenizer, tmp_path / f"{window}")
        assert header(to_gguf(folder, tmp_path / f"{window}.gguf"))["llama.context_length"] == context


@pytest.mark.parametrize("case", ["llama, sliced", "mistral, sliced", "qwen2, heads as wide as the stream"])
def test_transformers_reads_it_back(tmp_path, tokenizer, case):
    """A second reader. It ignores key_length and takes the head size of a `llama` from rope.dimension_count.

    Of a `llama` it also drops biases and rotary factors, so it cannot check a sliced Qwen 2 or a stretched context.
    """
    model = CASES[case][0]().float()
    path = to_gguf(export(model, tokenizer, tmp_path / "m"), tmp_path / "m.gguf", "float32")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    with torch.no_grad():
        assert relative(again(token_ids()).logits, model(token_ids()).logits) < 1e-5


# --- the tokenizer -------------------------------------------------------------------------------------------------------


def test_vocabulary_from_the_file_alone(tmp_path, embedded, tokenizer):
    keys = {name.removeprefix("tokenizer.ggml."): value for name, value in header(to_gguf(embedded, tmp_path / "m.gguf")).items()}
    assert (keys["model"], keys["pre"]) == ("gpt2", "gpt-2")
    vocabulary = {token: i for i, token in enumerate(keys["tokens"])}
    again = tokenizers.Tokenizer(models.BPE(vocabulary, [tuple(pair.split(" ")) for pair in keys["merges"]]))
    again.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for text in [*TEXTS, load_corpus("wiki-a", "test").text[:5000]]:
        assert again.encode(text).ids == tokenizer(text).input_ids
    assert keys["tokens"][0] == "<|endoftext|>"
    assert keys["token_type"] == [gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * 2047
    assert {keys[f"{name}_token_id"] for name in ("bos", "eos", "padding")} == {0}
    assert not keys["add_bos_token"]
    assert not keys["add_eos_token"]


def test_transformers_reads_the_vocabulary_back(tmp_path, embedded, tokenizer):
    """Of a `llama`, that is: a `qwen2` it splits as Qwen 2 does, whatever the file says."""
    again = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=to_gguf(embedded, tmp_path / "m.gguf").name)
    for text in TEXTS:
        assert again(text).input_ids == tokenizer(text).input_ids


def test_rows_without_a_token_are_marked(tmp_path, tokenizer):
    keys = header(to_gguf(export(sliced("llama"), tokenizer, tmp_path / "m"), tmp_path / "m.gguf"))
    assert len(keys["tokenizer.ggml.tokens"]) == keys["llama.vocab_size"] == ROWS
    assert keys["tokenizer.ggml.token_type"][-3:] == [gguf.TokenType.NORMAL] + [gguf.TokenType.UNUSED] * 2


def byte_level(steps, ignore_merges=False, spaces=0):
    """A byte-level tokenizer trained on the corpus, which splits text by `steps`. spaces: the longest run that is one token."""
    made = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator([load_corpus("wiki-a").text[:200_000]], trainer)
    made.add_tokens([tokenizers.AddedToken(" " * n, normalized=False) for n in range(2, spaces + 1)])
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<|end|>", eos_token="<|end|>")


def test_expressions_are_those_of_the_published_tokenizers():
    from transformers.convert_slow_tokenizer import TikTokenConverter
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    llama3 = inspect.signature(TikTokenConverter).parameters["pattern"].default
    assert {PRETOKENIZE_REGEX: "qwen2", llama3: "llama-bpe"} == SPLITS


@functools.cache
def sentencepiece_vocabulary():
    trained = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=1200, special_tokens=specials, limit_alphabet=80, show_progress=False)
    trained.train_from_iterator([load_corpus("wiki-a").text[:200_000]], trainer)
    return trained.get_vocab()


def sentencepiece(normalizer=None, pre_tokenizer=None):
    """A tokenizer in SentencePiece's manner: unknown characters are bytes, and every way to build a token is a merge."""
    rank = sentencepiece_vocabulary()
    pairs = [(t[:cut], t[cut:]) for t in rank if not t.startswith("<") for cut in range(1, len(t))]
    merges = [pair for pair in pairs if rank.keys() >= set(pair)]
    merges.sort(key=lambda pair: (rank[pair[0] + pair[1]], rank[pair[0]], rank[pair[1]]))
    made = tokenizers.Tokenizer(models.BPE(rank, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer, made.pre_tokenizer = normalizer, pre_tokenizer
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def split_by(words):
    split = pre_tokenizers.Split(tokenizers.Regex(words), "isolated")
    return [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


GPT2 = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
BYTE_LEVEL = {
    "embedded": lambda: load("wiki-a-llama")[1],
    **{name: functools.partial(byte_level, split_by(words), name == "llama-bpe") for words, name in SPLITS.items()},
    "smollm": lambda: byte_level([pre_tokenizers.Digits(individual_digits=True), *GPT2]),
    "runs of spaces, as Phi-2 and GPT-NeoX": lambda: byte_level(GPT2, spaces=24),
}
SPACES = normalizers.Replace(" ", "▁")
SENTENCEPIECE = {
    "spaces by the normaliser": lambda: sentencepiece(normalizers.Sequence([normalizers.Prepend("▁"), SPACES])),
    "no leading space": lambda: sentencepiece(SPACES),
    "spaces by the pre-tokenizer": lambda: sentencepiece(None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
    "Gemma": lambda: sentencepiece(SPACES, pre_tokenizers.Split(" ", "merged_with_previous")),
    "never a leading space": lambda: sentencepiece(None, pre_tokenizers.Metaspace(prepend_scheme="never", split=False)),
}


def texts_for(made):
    """Where a pre-tokenizer adds the leading space, it spares a text that has one; SentencePiece and GGUF readers do not."""
    adds = "Metaspace" in str(made.backend_tokenizer.pre_tokenizer) and "first" in str(made.backend_tokenizer.pre_tokenizer)
    return [text for text in TEXTS if not (adds and text.startswith(" "))]


def score_tokenize(text, keys):
    """SentencePiece BPE from a file's scores: join the neighbours whose union scores highest, leftmost first."""
    ids = {token: i for i, token in enumerate(keys["tokens"])}
    parts = list((" " * (keys["add_space_prefix"] and bool(text)) + text).replace(" ", "▁"))
    while found := [(-keys["scores"][ids[a + b]], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ids]:
        i = min(found)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [i for p in parts for i in ([ids[p]] if p in ids else [ids[f"<0x{byte:02X}>"] for byte in p.encode()])]


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_scores_replace_merges(tmp_path, kind):
    made = SENTENCEPIECE[kind]()
    path = to_gguf(export(sliced("llama"), made, tmp_path / "m"), tmp_path / "m.gguf")
    keys = {name.removeprefix("tokenizer.ggml."): value for name, value in header(path).items()}
    for text in [*texts_for(made), load_corpus("wiki-a", "test").text[:600]]:
        assert score_tokenize(text, keys) == made(text, add_special_tokens=False).input_ids
    assert keys["model"] == "llama"
    assert keys["add_bos_token"]
    assert not keys["add_eos_token"]
    types = gguf.TokenType
    assert [keys["token_type"][i] for i in (0, 1, 2, 3, 300)] == [
        types.UNKNOWN, types.CONTROL, types.CONTROL, types.BYTE, types.NORMAL,
    ]  # fmt: skip


# --- llama.cpp -----------------------------------------------------------------------------------------------------------


class Runtime:
    """llama.cpp with a file: on one thread, with keys and values in float32 and without flash attention."""

    def __init__(self, path, context=64):
        xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel, params.warmup, params.verbosity = str(path), context, 1, False, 0
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        self.server = xllamacpp.Server(params)

    def complete(self, prompt, **settings):
        """The answer to a prompt, which is text or ids, continued by the likeliest tokens."""
        return self.server.handle_completions({"prompt": prompt, "temperature": 0.0} | settings)["choices"][0]

    def log_probabilities(self, ids, vocabulary, cached=True):
        """Of every token after each beginning of ids: [tokens, vocabulary]. cached: beginnings are read once."""
        rows = torch.full((len(ids), vocabulary), float("nan"))
        # Nothing is listed after an end of the text or half a character, so the choice is forced; the list is of all tokens as
        # they are before that.
        settings = dict(n_predict=1, n_probs=vocabulary, cache_prompt=cached, logit_bias=[[self.tokens("a")[-1], 1e4]])
        for end in range(1, len(ids) + 1):
            listed = self.complete(ids[:end], **settings)["logprobs"]["content"][0]["top_logprobs"]
            rows[end - 1, [token["id"] for token in listed]] = torch.tensor([token["logprob"] for token in listed])
        return rows

    def tokens(self, text):
        body = json.dumps({"content": text, "add_special": True}).encode()
        request = urllib.request.Request(f"{self.server.listening_address}/tokenize", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["tokens"]


def assert_same(model, path, cached=True):
    """llama.cpp finds the model's log-probabilities after every beginning of a text."""
    ids = token_ids(1)
    found = Runtime(path).log_probabilities(ids[0].tolist(), ROWS, cached)
    with torch.no_grad():
        expected = model(ids).logits[0].float().log_softmax(-1)
    assert (found - expected).abs().max() < 1e-3  # NaN, a token that was not listed, fails as well


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_the_same(tmp_path, tokenizer, case):
    model = CASES[case][0]()
    assert_same(model, to_gguf(export(model, tokenizer, tmp_path / "m"), tmp_path / "m.gguf", "float32"))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float16", 5e-3)])
def test_llama_cpp_continues_real_text(tmp_path, embedded, tokenizer, dtype, tolerance):
    plain = transformers.AutoModelForCausalLM.from_pretrained(embedded, dtype=torch.float32)
    runtime = Runtime(to_gguf(embedded, tmp_path / "m.gguf", dtype), 256)
    ids = tokenizer(load_corpus("wiki-a", "test").text[:200]).input_ids
    with torch.no_grad():
        expected = plain(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert relative(runtime.log_probabilities(ids, len(tokenizer)), expected) < tolerance
    prompt = tokenizer("The history of", return_tensors="pt").input_ids
    greedy = plain.generate(prompt, max_new_tokens=40, do_sample=False, pad_token_id=0)[0, prompt.shape[1] :]
    assert runtime.complete("The history of", n_predict=40)["text"] == tokenizer.decode(greedy)


@pytest.mark.parametrize("kind", [*BYTE_LEVEL, *SENTENCEPIECE])
def test_llama_cpp_tokenizes_the_same(tmp_path, kind):
    made = (BYTE_LEVEL | SENTENCEPIECE)[kind]()
    runtime = Runtime(to_gguf(export(sliced("llama"), made, tmp_path / "m"), tmp_path / "m.gguf"))
    for text in [*texts_for(made), load_corpus("wiki-a", "test").text[:20_000]]:
        assert runtime.tokens(text) == made(text).input_ids


# --- pruned models -------------------------------------------------------------------------------------------------------

# Every method that removes neurons, heads or blocks, with settings under which the blocks become unequal where it has them.
STRUCTURED = [name for name, method in METHODS.items() if "neurons" in method.removes or method.removes == "blocks"]


def pruned(method, family):
    model = tiny(family, vocab_size=ROWS, num_hidden_layers=4)
    return make(method, model, token_ids(), 0.3 if method != "lorap" else 0.5)


def written(model, tokenizer, folder, dtype="float32"):
    return to_gguf((save if getattr(model, "edits", None) else export)(model, tokenizer, folder / "m"), folder / "m.gguf", dtype)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("method", [name for name in STRUCTURED if name != "lorap"])
def test_a_pruned_model_is_its_file(tmp_path, tokenizer, method, family):
    """By our reading of the format, and by llama.cpp where it is installed, reading every beginning afresh."""
    model = pruned(method, family)
    path = written(model, tokenizer, tmp_path)
    with torch.no_grad():
        assert relative(run(path, token_ids()), model(token_ids()).logits) < 1e-5
    assert_same(model, path, cached=False)


@pytest.mark.parametrize("cached", [True, False])
def test_unequal_blocks_with_and_without_a_cache(tmp_path, tokenizer, cached):
    """Other neurons, heads and groups in every block, and biases that only compensation writes."""
    model = tiny("llama", vocab_size=ROWS)
    model = remove_neurons(model, [torch.arange(n) for n in (37, 48, 7)], bias=[torch.full((32,), 0.1), None, None])
    model = remove_groups(model, [torch.arange(2), torch.tensor([1]), torch.arange(2)], bias=[None, torch.full((32,), 0.2), None])
    path = written(model, tokenizer, tmp_path)
    assert header(path)["general.architecture"] == "deci"
    assert header(path)["deci.feed_forward_length"] == [37, 48, 7]
    assert header(path)["deci.attention.head_count"] == [4, 2, 4]
    assert header(path)["deci.attention.head_count_kv"] == [2, 1, 2]
    with torch.no_grad():
        assert relative(run(path, token_ids()), model(token_ids()).logits) < 1e-5
    assert_same(model, path, cached)


def test_equal_blocks_stay_an_ordinary_architecture(tmp_path, tokenizer):
    for method, name in (("wanda-sp", "llama"), ("shortgpt", "llama"), ("cfsp", "deci")):
        path = written(pruned(method, "llama"), tokenizer, tmp_path / method)
        assert header(path)["general.architecture"] == name, method


def rounded(model, dtype):
    """A copy in torch whose matrices are those that blocks of 32 numbers of a type hold, the rows filled up with zeros."""
    model = copy.deepcopy(model)
    for name, value in model.state_dict().items():
        if value.ndim == 2:
            kind = gguf.GGMLQuantizationType["Q8_0" if "embed" in name or "lm_head" in name else dtype]
            full = torch.nn.functional.pad(value, (0, -value.shape[1] % 32)).numpy()
            value.copy_(torch.tensor(gguf.quants.dequantize(gguf.quants.quantize(full, kind), kind))[:, : value.shape[1]])
    return model


@pytest.mark.parametrize("dtype", ["Q8_0", "Q4_1", "Q4_0"])
def test_quantised_files(tmp_path, tokenizer, dtype):
    """Rows of 32 and 64 numbers are quantised as the gguf library does it."""
    model = tiny("llama", torch.float32, vocab_size=ROWS, intermediate_size=64, head_dim=16)
    model = remove_neurons(model, [torch.arange(37), None, None])
    path = written(model, tokenizer, tmp_path, dtype)
    found = {t.name: t for t in gguf.GGUFReader(path).tensors}
    assert found["blk.0.ffn_down.weight"].tensor_type.name == dtype
    assert found["blk.1.ffn_down.weight"].tensor_type.name == dtype
    assert found["token_embd.weight"].tensor_type.name == "Q8_0"
    assert found["blk.1.ffn_norm.weight"].tensor_type.name == "F32"
    weight = model.model.layers[1].mlp.up_proj.weight.detach().numpy()
    kind = gguf.GGMLQuantizationType[dtype]
    expected = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
    assert torch.equal(matrices(path)["blk.1.ffn_up.weight"], torch.tensor(expected))
    step = abs(weight).max() / {"Q8_0": 127, "Q4_1": 7.5, "Q4_0": 8}[dtype]
    assert abs(expected - weight).max() <= step * 1.01
    counted = kinds(path).set_index("type")
    assert counted.tensors.sum() == len(found)
    assert counted.loc[dtype, "bytes"] == sum(int(t.n_bytes) for t in found.values() if t.tensor_type.name == dtype)
    with torch.no_grad():
        assert relative(run(path, token_ids()), rounded(model, dtype)(token_ids()).logits) < 1e-5
    assert Runtime(path).log_probabilities([1, 2, 3], ROWS).isfinite().all()


def test_neurons_of_zeros_fill_up_the_blocks_of_a_type(tmp_path, tokenizer):
    """37 neurons become 64 where numbers are stored by 32: the same model, but for the rounding of its weights."""
    model = tiny("llama", torch.float32, vocab_size=ROWS, intermediate_size=64, head_dim=16)
    model = remove_neurons(model, [torch.arange(37), None, torch.arange(32)], bias=[torch.full((32,), 0.1), None, None])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = written(model, tokenizer, tmp_path / "eight", "Q8_0")
    assert set(kinds(path).type) == {"F32", "Q8_0"}
    assert header(path)["deci.feed_forward_length"] == [64, 64, 32]
    for name, weight in matrices(path).items():
        if name.startswith("blk.0.ffn_") and name.endswith("weight"):
            assert (weight if "down" not in name else weight.T)[37:].eq(0).all(), name
    with torch.no_grad():
        assert relative(run(path, token_ids()), rounded(model, "Q8_0")(token_ids()).logits) < 1e-5
    assert header(written(model, tokenizer, tmp_path / "full"))["deci.feed_forward_length"] == [37, 64, 32]


def test_other_rows_that_do_not_divide_keep_16_bits(tmp_path, tokenizer):
    model = tiny("llama", torch.float32, vocab_size=ROWS, head_dim=6)  # 4 heads of 6 are 24 numbers in a row
    with pytest.warns(UserWarning, match=r"^3 matrices with rows of 24 to 24 numbers, no multiple of 32, stay in 16 bits") as w:
        path = written(model, tokenizer, tmp_path, "Q8_0")
    assert str(w[0].message).endswith("a method that keeps all heads keeps their length")
    found = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert {found[f"blk.{i}.attn_output.weight"] for i in range(3)} == {"F16"}
    assert found["blk.0.attn_q.weight"] == "Q8_0"


def test_the_warning_of_rows_names_the_setting_that_avoids_it(tmp_path, tokenizer):
    """A stream of 40 directions, behind heads that are 32 wide, and what the setting makes of the same model."""
    model = tiny("llama", torch.float32, vocab_size=ROWS, hidden_size=40, head_dim=8)
    with pytest.warns(UserWarning, match="no multiple of 32, stay in 16 bits") as warned:
        written(model, tokenizer, tmp_path / "dense", "Q4_0")
    (said,) = {str(warning.message) for warning in warned}
    assert "all heads together" not in said
    method, name, value = re.search(r"--method ([\w-]+) --set (\w+)=(\d+)`", said).groups()
    small = make(method, model, token_ids(), 0.1, **{name: int(value)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = written(small, tokenizer, tmp_path / "small", "Q4_0")
    assert set(kinds(path).type) == {"F32", "Q8_0", "Q4_0"}


# --- what is refused -----------------------------------------------------------------------------------------------------


def edit_json(name, **changes):
    def change(folder):
        content = json.loads((folder / name).read_text())
        for key, value in changes.items():
            *path, last = key.split("__")
            inner = content
            for step in path:
                inner = inner[int(step) if isinstance(inner, list) else step]
            inner[last] = value
        (folder / name).write_text(json.dumps(content))

    return change


def lose(name):
    return lambda folder: (folder / name).unlink()


def config(**changes):
    return edit_json("config.json", **changes)


def tokens(**changes):
    return edit_json("tokenizer.json", **changes)


def truncated(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


def more_weights(folder):
    from safetensors.torch import load_file, save_file

    found = load_file(folder / "model.safetensors")
    save_file(found | {"model.layers.0.self_attn.q_norm.weight": torch.ones(12)}, folder / "model.safetensors")


def whole_numbers(folder):
    from safetensors.torch import load_file, save_file

    found = load_file(folder / "model.safetensors")
    save_file(found | {"lm_head.weight": found["lm_head.weight"].to(torch.int8)}, folder / "model.safetensors")


@pytest.fixture(scope="module")
def stock(tmp_path_factory, tokenizer):
    return export(sliced("llama").float(), tokenizer, tmp_path_factory.mktemp("stock") / "m")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lose("config.json"), FileNotFoundError, "no config.json"),
        (lose("tokenizer.json"), FileNotFoundError, "no tokenizer.json"),
        (lose("model.safetensors"), ValueError, "neither model.safetensors nor"),
        (
            config(model_type="starcoder2"),
            ValueError,
            "'starcoder2' has no GGUF export here: supported are llama, mistral, qwen2, q",
        ),
        (config(hidden_act="gelu"), ValueError, "activation 'gelu'"),
        (config(rope_parameters=LLAMA3 | {"rope_type": "dynamic"}), ValueError, "'dynamic' is not translated"),
        (config(rope_parameters=LONG | {"long_factor": [2.0] * 6}), ValueError, "'longrope' is translated only with the same"),
        (config(rope_parameters=LONG | {"attention_factor": 1.1}), ValueError, "longrope' is translated .*, and attention 1"),
        (config(rope_parameters=LLAMA3 | {"partial_rotary_factor": 0.5}), ValueError, "only 6 of the 12 coordinates"),
        (config(hidden_size=32), ValueError, r"embed_tokens.weight in .* is .2050, 24., but .* needs .2050, 32."),
        (config(num_hidden_layers=2), ValueError, r"layers.2.* belongs to no part of the model"),
        (truncated, ValueError, "model.safetensors is missing, cut short or damaged"),
        (more_weights, ValueError, r"q_norm.weight in .* belongs to no part of the model"),
        (whole_numbers, ValueError, "quantised to I8"),
        (config(vocab_size=2040), ValueError, r"is .2050, 24., but .* needs .2040, 24."),
        (tokens(pre_tokenizer={"type": "Whitespace"}), ValueError, "splits or normalises.*Whitespace"),
        (tokens(pre_tokenizer__add_prefix_space=True), ValueError, "splits or normalises"),
        (tokens(normalizer={"type": "Lowercase"}), ValueError, "splits or normalises.*Lowercase"),
        (tokens(model__ignore_merges=True), ValueError, "whole words"),
        (tokens(model__dropout=0.1), ValueError, "dropout 0.1"),
        (tokens(model__byte_fallback=True), ValueError, "no token <0x00>"),
        (tokens(post_processor={"type": "BertProcessing", "sep": ["a", 65], "cls": ["b", 66]}), ValueError, "bos before and eos"),
        (tokens(added_tokens__0__lstrip=True), ValueError, "surroundings"),
    ],
)
def test_refused_before_anything_is_written(tmp_path, stock, change, error, message):
    folder = shutil.copytree(stock, tmp_path / "m")
    change(folder)
    with pytest.raises(error, match=message):
        to_gguf(folder, tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == [folder]


def test_tokenizers_of_other_kinds_are_refused(tmp_path):
    """Unigram has no merges, and scores cannot replace merges that join fewer neighbours than SentencePiece would."""
    unigram = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("▁a", -1.0)], unk_id=0))
    fewer = json.loads(sentencepiece(SPACES).backend_tokenizer.to_str())
    del fewer["model"]["merges"][100]
    for name, made, message in (
        ("unigram", unigram, "type Unigram"),
        ("fewer", tokenizers.Tokenizer.from_str(json.dumps(fewer)), "never joins"),
    ):
        folder = export(sliced("llama"), transformers.PreTrainedTokenizerFast(tokenizer_object=made), tmp_path / name)
        with pytest.raises(ValueError, match=message):
            to_gguf(folder, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path, tokenizer):
    folder = export(tiny("llama", tie_word_embeddings=False), tokenizer, tmp_path / "m")
    with pytest.raises(ValueError, match="id 2047 exceeds the model's 80 embeddings"):
        to_gguf(folder, tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("method", "way"),
    [("slicegpt", "slicegpt-stock"), ("svd", "merge-to-dense"), ("lorap", "merge-to-dense")],
)
def test_compressed_models_of_this_suite_are_refused_with_a_way(tmp_path, tokenizer, method, way):
    folder = save(make(method, tiny("llama", vocab_size=ROWS), token_ids(), 0.25), tokenizer, tmp_path / "m")
    with pytest.raises(ValueError, match=way):
        to_gguf(folder, tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == [folder]


def test_arguments(tmp_path, stock):
    (tmp_path / "there.gguf").write_text("kept")
    with pytest.raises(FileExistsError, match="choose another output"):
        to_gguf(stock, tmp_path / "there.gguf")
    assert (tmp_path / "there.gguf").read_text() == "kept"
    with pytest.raises(ValueError, match="float16, bfloat16, float32, Q8_0, Q4_1, Q4_0"):
        to_gguf(stock, tmp_path / "m.gguf", "int8")


@pytest.mark.parametrize(("dtype", "number"), [("float16", 1e5), ("Q8_0", 1e7), ("Q4_1", -2e5), ("Q4_0", 6e5)])
def test_a_failure_on_the_way_leaves_nothing(tmp_path, tokenizer, dtype, number):
    model = tiny("llama", torch.float32, vocab_size=ROWS, hidden_size=32, num_hidden_layers=2)
    with torch.no_grad():
        model.model.layers[-1].mlp.gate_proj.weight[3, 3] = number  # more than the type, or the scale of a block, holds
    folder = export(model, tokenizer, tmp_path / "m")
    with pytest.raises(ValueError, match=rf"gate_proj.weight holds numbers too large for {dtype}: use bfloat16"):
        to_gguf(folder, tmp_path / "m.gguf", dtype)
    assert list(tmp_path.iterdir()) == [folder]
    assert run(to_gguf(folder, tmp_path / "m.gguf", "bfloat16"), token_ids()).isfinite().all()


def test_a_damaged_number_is_named(tmp_path, tokenizer):
    model = tiny("llama", torch.float32, vocab_size=ROWS)
    with torch.no_grad():
        model.lm_head.weight[3, 3] = math.nan
    folder = export(model, tokenizer, tmp_path / "m")
    with pytest.raises(ValueError, match=r"lm_head.weight holds NaN or infinity: the model is damaged"):
        to_gguf(folder, tmp_path / "m.gguf", "Q8_0")
    assert list(tmp_path.iterdir()) == [folder]


def test_task(tmp_path, stock, capsys):
    out = tmp_path / "new" / "m.gguf"
    tasks.export_gguf.body(None, str(stock), str(out))
    assert f"{out}: " in capsys.readouterr().out
    assert header(out)["llama.embedding_length"] == 24
    with pytest.raises(Exit, match="choose another output") as stop:
        tasks.export_gguf.body(None, str(stock), str(out))
    assert stop.value.code == 2
