"""Text tasks: tokens, pooling, labels, answers and translations, against plain numpy."""

from __future__ import annotations

import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from onnxpress import errors
from onnxpress.runtime import TruncationWarning, load
from onnxpress.runtime.tasks import pool
from onnxpress.runtime.tokenization import Tokenizer

from . import onnx_models
from .onnx_models import CLS, EOS, PAD, SEP, VOCAB, WORDS

TABLE = onnx_models.normal(1, len(VOCAB), 8)
LONG = " ".join(WORDS[:20])


def ids_of(text: str, limit: int = 12) -> list[int]:
    return [CLS, *[VOCAB.index(w) for w in text.split()][: limit - 2], SEP]


def hidden(text: str) -> np.ndarray:
    """What the hand-made encoder computes for one text."""
    rows = TABLE[ids_of(text)]
    return rows + rows.mean(0)


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    def make(build, **settings):
        return build(tmp_path_factory.mktemp("artifact") / "a", **settings)

    return make


@pytest.fixture(scope="module")
def embedder(make):
    return load(make(onnx_models.embedder))


# Tokens


@pytest.fixture(scope="module")
def tokens_dir(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokens")
    (path / "tokenizer.json").write_text(onnx_models.tokenizer())
    return path


def test_rows_are_padded_to_the_longest(tokens_dir):
    tokenizer = Tokenizer(tokens_dir, max_length=12, pad_id=PAD)
    arrays = tokenizer.pad(tokenizer.encode(["the cat", "", "sat"]))
    assert {n: (a.dtype.name, a.shape) for n, a in arrays.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "token_type_ids"), ("int64", (3, 4))
    )
    the, cat, sat = (VOCAB.index(w) for w in ("the", "cat", "sat"))
    want = [[CLS, the, cat, SEP], [CLS, SEP, PAD, PAD], [CLS, sat, SEP, PAD]]
    assert arrays["input_ids"].tolist() == want
    assert arrays["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]
    left = Tokenizer(tokens_dir, pad_id=PAD, left=True)
    arrays = left.pad(left.encode(["the cat", ""]))
    assert arrays["input_ids"][1].tolist() == [PAD, PAD, CLS, SEP]
    assert arrays["attention_mask"][1].tolist() == [0, 0, 1, 1]


def test_long_texts_are_cut_with_one_warning_that_counts(tokens_dir):
    tokenizer = Tokenizer(tokens_dir, max_length=6)
    with pytest.warns(TruncationWarning) as caught:
        tokens = tokenizer.encode([LONG, "the cat", "a b c d e f g"])
    assert len(caught) == 1
    assert str(caught[0].message) == "2 of 3 texts were cut to 6 tokens; the longest has 22"
    assert tokens[0].ids.tolist() == [CLS, *ids_of(LONG)[1:5], SEP]  # the end token stays
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer.encode(["one of these"])


def test_long_texts_are_refused(tokens_dir):
    tokenizer = Tokenizer(tokens_dir, max_length=6, truncate=False)
    tokenizer.encode(["the cat sat on"])
    with pytest.raises(errors.InputError, match="text 1 has 22 tokens; the model takes 6"):
        tokenizer.encode(["the", LONG])


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["a", 3], "text 1 is no str, but int"),
        ([None], "text 0 is no str"),
        (7, "list of str, not int"),
        (["the", "\ud800"], "text 1 is no valid text"),
        ([["a", "b"]], "text 0 is no str, but list"),
    ],
)
def test_what_is_no_text_is_named(tokens_dir, texts, said):
    with pytest.raises(errors.InputError, match=said):
        Tokenizer(tokens_dir).encode(texts)


def test_no_tokenizer_and_a_damaged_one(tmp_path):
    with pytest.raises(errors.ArtifactError, match=r"no tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(errors.ArtifactError, match="cannot be read"):
        Tokenizer(tmp_path)


def test_settings_inside_tokenizer_json_do_not_leak(tmp_path):
    import tokenizers

    t = tokenizers.Tokenizer.from_str(onnx_models.tokenizer())
    t.enable_padding(length=32)
    t.enable_truncation(3)
    (tmp_path / "tokenizer.json").write_text(t.to_str())
    assert len(Tokenizer(tmp_path).encode(["the cat sat on"])[0]) == 6


# Embed


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
def test_embeddings_are_the_formula(make, pooling, normalize):
    embedder = load(make(onnx_models.embedder, pooling=pooling, normalize=normalize))
    texts = ["the cat sat on the mat", "", "a red house", "birds"]
    got = embedder.embed(texts)
    assert got.dtype == np.float32
    assert got.shape == (4, 8)
    for text, vector in zip(texts, got, strict=True):
        h = hidden(text if text != "birds" else "[UNK]")
        want = {"mean": h.mean(0), "cls": h[0], "max": h.max(0)}[pooling]
        want = want / np.linalg.norm(want) if normalize else want
        np.testing.assert_allclose(vector, want, atol=1e-5)


def test_order_batches_and_single_texts_agree(embedder):
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, n)) for n in rng.integers(0, 10, 40)]
    want = np.concatenate([embedder.embed(t) for t in texts])
    for batch_size in (1, 7, 64):
        np.testing.assert_allclose(embedder.embed(texts, batch_size=batch_size), want, atol=1e-5)
    with ThreadPoolExecutor(16) as pool:
        for got in pool.map(embedder.embed, [texts] * 16):
            np.testing.assert_allclose(got, want, atol=1e-5)


def test_no_texts_give_no_rows(embedder):
    assert embedder.embed([]).shape == (0, 8)
    with pytest.raises(errors.InputError, match="batch_size"):
        embedder.embed(["a"], batch_size=0)


def test_a_graph_that_pools_by_itself(make):
    embedder = load(make(onnx_models.sentence_embedder))
    want = TABLE[ids_of("the cat")].mean(0)
    np.testing.assert_allclose(embedder.embed(["a red house", "the cat"])[1], want, atol=1e-5)


def test_truncation_is_chosen_at_load(make, embedder):
    with pytest.warns(TruncationWarning, match="1 of 1"):
        np.testing.assert_array_equal(embedder.embed(LONG).shape, (1, 8))
    strict = load(make(onnx_models.embedder), truncate=False)
    with pytest.raises(errors.InputError, match="22 tokens"):
        strict.embed(LONG)


def test_pooling_by_hand():
    h = np.array([[[1, -2], [3, -4], [100, 100]], [[0, 0], [5, 5], [5, 5]]], np.float32)
    mask = np.array([[1, 1, 0], [0, 0, 0]])
    assert pool(h, mask, "mean").tolist() == [[2, -3], [0, 0]]
    assert pool(h, mask, "max")[0].tolist() == [3, -2]
    assert pool(h, mask, "cls").tolist() == [[1, -2], [0, 0]]
    with pytest.raises(errors.ArtifactError, match="'median'"):
        pool(h, mask, "median")


# Classify


def logits_of(text: str) -> np.ndarray:
    return TABLE[ids_of(text)].mean(0) @ onnx_models.normal(2, 8, 3)


def test_classify_single_and_multi(make):
    texts, labels = ["the cat sat on", "a", "red house"], ["good", "bad", "ugly"]
    single = load(make(onnx_models.classifier))
    multi = load(make(onnx_models.classifier, problem="multi"))
    for text, s, m in zip(texts, single.classify(texts), multi.classify(texts), strict=True):
        e = np.exp(logits_of(text))
        assert s["label"] == m["label"] == labels[e.argmax()]
        assert s["score"] == pytest.approx((e / e.sum()).max(), abs=1e-5)
        assert m["score"] == pytest.approx((e / (1 + e)).max(), abs=1e-5)
    everything = single.classify("a", top_k=None)[0]
    assert sum(x["score"] for x in everything) == pytest.approx(1)
    assert [x["score"] for x in everything] == sorted(x["score"] for x in everything)[::-1]
    assert single.classify(["a"], top_k=2) == [everything[:2]]
    assert single.classify([]) == []
    with pytest.raises(errors.InputError, match="top_k"):
        single.classify("a", top_k=0)


def test_labels_must_fit_the_graph(make):
    with pytest.raises(errors.ArtifactError, match="3 logits, the manifest 1 labels"):
        load(make(onnx_models.classifier, labels=["one"])).classify("a")
    with pytest.raises(errors.ArtifactError, match="'double'"):
        load(make(onnx_models.classifier, problem="double")).classify("a")


# Answer


def test_answer_is_a_stretch_of_the_context(make):
    answerer = load(make(onnx_models.answerer, start="red", end="house"))
    context = "the  cat ran to a red blue house ."
    got = answerer.answer("where is the cat", context)
    assert got["answer"] == "red blue house" == context[got["start"] : got["end"]]
    # Eight other words of the context at 0, [CLS] at 3, the right one at 6.
    p = np.exp(6) / (np.exp(6) + np.exp(3) + 8)
    assert got["score"] == pytest.approx(p * p)


def test_answer_in_a_long_context_and_only_there(make):
    answerer = load(make(onnx_models.answerer, start="red", end="house"))
    # The question has the words too; `house` before `red` is no span; the answer is windows away.
    context = " ".join(["the house ran"] * 20 + ["é red house"] + ["dog sat on"] * 20)
    got = answerer.answer("is the red house red", context, batch_size=3)
    assert got["answer"] == "red house"
    assert got["start"] == context.index("red")
    assert got["score"] > 0.5


def test_an_answer_never_ends_before_it_starts(make):
    answerer = load(make(onnx_models.answerer, start="house", end="red"))
    context = "the red cat sat on a house now"
    got = answerer.answer("who", context)
    assert got["start"] < got["end"]
    assert got["answer"] == context[got["start"] : got["end"]]


def test_answers_have_a_longest(make):
    answerer = load(make(onnx_models.answerer, start="red", end="house", max_length=32))
    context = "red the cat sat on a mat house"
    assert answerer.answer("who", context)["answer"] == context
    assert len(answerer.answer("who", context, longest=4)["answer"].split()) <= 4


@pytest.mark.parametrize(
    ("question", "context", "said"),
    [
        (LONG, "the cat", "question is too long: at most 8"),
        ("the cat sat on mat dog ran to house", "red " * 40, "question is too long"),
        ("who", "", "context is empty"),
        ("who", 3, "context 0 is no str"),
        (None, "the", "question 0 is no str"),
    ],
)
def test_answer_refuses(make, question, context, said):
    answerer = load(make(onnx_models.answerer, start="red", end="house"))
    with pytest.raises(errors.InputError, match=said):
        answerer.answer(question, context)


# Translate


def translate_by_hand(text: str, steps: int, forced: int | None = None) -> str:
    n = len(VOCAB)
    words = onnx_models.normal(7, n, n) + 20 * np.eye(n, dtype=np.float32)[PAD]
    source = TABLE[ids_of(text)].mean(0) @ onnx_models.normal(6, 8, n)
    last, out = PAD, []
    for step in range(steps):
        logits = words[last] + source
        logits[PAD] = -np.inf
        last = forced if step == 0 and forced is not None else int(logits.argmax())
        if last == EOS:
            break
        out.append(last)
    return " ".join(VOCAB[i] for i in out if VOCAB[i] not in onnx_models.SPECIAL)


def test_translate_is_greedy_and_batched(make):
    texts = ["the cat sat", "red", "a dog ran to the house", "blue house is fast", ""]
    translator = load(make(onnx_models.translator))
    got = translator.translate(texts, max_new_tokens=9)
    assert got == [translate_by_hand(t, 9) for t in texts]
    assert len(set(got)) > 1
    assert got == [translator.translate(t, max_new_tokens=9)[0] for t in texts]
    assert translator.translate([]) == []


def test_translate_settings(make):
    forced = VOCAB.index("river")
    translator = load(make(onnx_models.translator, forced_bos_token_id=forced))
    got = translator.translate("the cat", max_new_tokens=5)[0]
    assert got == translate_by_hand("the cat", 5, forced)
    assert got.startswith("river")
    first = VOCAB.index(translator.translate("the cat", max_new_tokens=5)[0].split()[1])
    ended = load(make(onnx_models.translator, forced_bos_token_id=forced, eos_token_ids=[first]))
    assert ended.translate("the cat") == ["river"]
    padding = load(make(onnx_models.translator, suppress_token_ids=[]))
    assert padding.translate("the cat", max_new_tokens=5) == [""]
    with pytest.raises(errors.InputError, match="max_new_tokens"):
        translator.translate("a", max_new_tokens=0)


def test_a_task_needs_its_tokenizer(make, tmp_path):
    path = Path(shutil.copytree(make(onnx_models.embedder), tmp_path / "a"))
    (path / "tokenizer.json").unlink()
    with pytest.raises(errors.ArtifactError, match=r"tokenizer\.json"):
        load(path)
