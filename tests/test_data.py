"""Records, the default sets, the three uses kept apart, and the feeds of every task."""

from __future__ import annotations

import hashlib
import json
import warnings

import numpy as np
import pytest
from onnxpress.artifact import TensorSpec
from onnxpress.errors import InputError, UsageError
from onnxpress.press import data, records
from onnxpress.press.records import Records
from onnxpress.runtime import Session, load
from onnxpress.runtime.tokenization import Tokenizer

from . import onnx_models
from .onnx_models import CLS, PAD, SEP, VOCAB, WORDS

INPUTS = (TensorSpec("x", "float32", ("batch", 4)), TensorSpec("m", "int64", ("batch", "seq")))


def some(*items: object, where: str = "given") -> Records:
    places = tuple(f"{where}:{i + 1}" for i in range(len(items)))
    return Records(where, items, "0" * 64, places)


def pieces(count: int) -> list[str]:
    """Texts of every length, shortest first."""
    return [" ".join(np.resize(WORDS[i % 7 :], 1 + i % 13)) + f" {i}" for i in range(count)]


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    def make(build, **settings) -> Session:
        return Session(build(tmp_path_factory.mktemp("artifact") / "a", **settings))

    return make


# Reading ---------------------------------------------------------------------------------------


def test_a_jsonl_holds_objects_and_strings(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n\n"two \\u2028 lines"\n', encoding="utf-8-sig")
    found = records.load(file)
    assert found.items == ({"text": "one"}, "two \u2028 lines")
    assert found.places == (f"{file}:1", f"{file}:3")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert found.summary() == {"from": str(file), "examples": 2, "sha256": digest}
    assert records.for_task(found, "embed").items == ("one", "two \u2028 lines")


def test_a_txt_holds_texts_whatever_they_begin_with(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b'"Hello," she said.\r\n{no json}\n   \nlast')
    assert records.load(file).items == ('"Hello," she said.', "{no json}", "last")


def test_npz_and_directories_of_them(tmp_path):
    arrays = {
        name: {"x": np.full((2, 4), i, np.float32), "m": np.ones((2, i), np.int64)}
        for i, name in enumerate("dbeacf")
    }
    for name, one in arrays.items():
        np.savez(tmp_path / f"{name}.npz", **one)
    (tmp_path / "notes.md").write_text("not read")
    one = records.for_task(records.load(tmp_path / "b.npz"), "tensors", INPUTS)
    np.testing.assert_equal(one.items, (arrays["b"],))
    found = records.for_task(records.load(tmp_path), "tensors", INPUTS)
    np.testing.assert_equal(found.items, tuple(arrays[name] for name in "abcdef"))
    files = [tmp_path / f"{name}.npz" for name in "abcdef"]
    assert found.places == tuple(map(str, files))
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files))
    assert found.sha256 == digest.hexdigest()


@pytest.mark.parametrize(
    ("name", "content", "said", "where"),
    [
        ("no.jsonl", None, "No such file", "no.jsonl"),
        ("no.npz", None, "No such file", "no.npz"),
        ("latin.txt", b"fine\nGr\xf6\xdfe\n", "not UTF-8: byte 0xf6", "latin.txt:2"),
        ("a.jsonl", b'"one"\n\n{"text": \n', "is no JSON", "a.jsonl:3"),
        ("a.jsonl", b"plain text", "is no JSON", "a.jsonl:1"),
        ("a.jsonl", b"[" * 100_000, "is no JSON", "a.jsonl:1"),
        ("a.jsonl", b"\n \n", "is empty", "a.jsonl"),
        ("a.txt", b"", "is empty", "a.txt"),
        ("a.npz", b"PK\x03\x04half", "cannot be read", "a.npz"),
        ("a.csv", b"text\none", "of this kind", "a.csv"),
        ("folder", "a folder", "no .npz file", "folder"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, said, where):
    path = tmp_path / name
    if content == "a folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=said) as caught:
        records.load(path)
    assert str(caught.value.where).endswith(where)


@pytest.mark.parametrize(
    ("task", "item", "said"),
    [
        ("embed", {"txt": "x"}, "record 2 has no text"),
        ("generate", 7, "record 2 has no text: 7"),
        ("embed", {"x": np.zeros((2, 3), np.int64)}, r"no text: .*int64\[2, 3\]"),
        ("classify", "\ud800", "record 2 is no valid text"),
        ("answer", "a text", "no question with a context"),
        ("answer", {"question": "who?"}, "no question with a context"),
        ("answer", {"question": " ", "context": "x"}, "no question with a context"),
        ("tensors", "a text", "record 2 is no object of arrays"),
        ("tensors", {"x": [[1, 2, 3, 4]]}, "record 2: the input 'm' is missing"),
        ("tensors", {"x": [[1, 2]], "m": [[1]]}, "record 2: .*must be 4"),
        ("tensors", {"x": [[1, 2, 3, 4]], "m": [[1.5]]}, "input 'm': .*whole numbers"),
        ("tensors", {"x": np.ones((1, 4)), "m": np.ones((1, 1), np.int64)}, "takes float32"),
        ("tensors", {"x": [[1, 2, 3, 4]], "m": [[1]], "z": [1]}, "no input 'z'"),
    ],
)
def test_records_that_do_not_suit_the_task(task, item, said):
    first: object = {"x": [[0, 0, 0, 0]], "m": [[0]]} if task == "tensors" else "fine"
    first = {"question": "who?", "context": "she"} if task == "answer" else first
    with pytest.raises(InputError, match=said) as caught:
        records.for_task(some(first, item, where="eval.jsonl"), task, INPUTS)
    assert caught.value.where == "eval.jsonl:2"


# The default sets ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "counts"), [("embed", (128, 96)), ("generate", (128, 96)), ("answer", (16, 16))]
)
def test_the_default_sets_are_apart_and_ragged(task, counts):
    one, two = data.default_set(task, "calibration"), data.default_set(task, "eval")
    assert (len(one), len(two)) == counts
    assert (one.where, two.where) == ("the default calibration set", "the default eval set")
    assert two.places[2] == "the default eval set, line 3"
    keys = [data._key(item) for found in (one, two) for item in found.items]
    assert len(set(keys)) == sum(counts)
    for found in (one, two):
        lengths = [len(str(item).split()) for item in found.items]
        assert max(lengths) > 2.5 * sorted(lengths)[len(lengths) // 2]
        steps = np.diff(lengths)
        assert (steps > 0).sum() > len(steps) / 4 < (steps < 0).sum()  # they are not sorted
        assert sum(not json.dumps(item, ensure_ascii=False).isascii() for item in found.items) >= 1
    if task == "answer":
        assert all(len(item["context"]) > len(item["question"]) for item in one.items)


def test_no_sentence_is_in_both_default_sets():
    one, two = (data.default_set("embed", which).items for which in ("calibration", "eval"))
    sentences = {s.strip().casefold() for text in one for s in text.split(".") if len(s) > 12}
    assert not [s for text in two for s in text.split(".") if s.strip().casefold() in sentences]


def test_the_default_texts_suit_a_real_tokenizer(minilm_source):
    tokenizer = Tokenizer(minilm_source, max_length=512)
    for which in ("calibration", "eval"):
        tokens = tokenizer.encode(list(data.default_set("embed", which).items))
        lengths = np.array([len(t) for t in tokens])
        assert lengths.min() == 3
        assert 1 <= (lengths > 256).sum() <= 3  # MiniLM cuts there, and some texts should be cut
        assert sum((t.ids == 100).mean() > 0.5 for t in tokens) <= 3  # [UNK]


def test_tensors_have_no_default_set():
    with pytest.raises(UsageError, match="no default calibration data") as caught:
        data.prepare("tensors", INPUTS)
    assert "--calibration" in str(caught.value.hint)
    assert ".npz" in str(caught.value.hint)


# Three uses ------------------------------------------------------------------------------------


def keys(found: Records) -> set:
    return set(map(data._key, found.items))


def test_split_is_three_to_one_and_steady():
    calibration, evaluation = some(*pieces(40)), some("other", "more", where="eval")
    sets = data.split(calibration, evaluation)
    assert sets == data.split(calibration, evaluation)
    assert (len(sets.calibration), len(sets.search), len(sets.evaluation)) == (30, 10, 2)
    assert not keys(sets.calibration) & keys(sets.search)
    assert sets.notes == ()
    places = zip(sets.search.places, sets.search.items, strict=True)
    assert all(calibration.items[int(p.split(":")[1]) - 1] == item for p, item in places)
    order = [int(p.split(":")[1]) for p in sets.calibration.places]
    assert order == sorted(order)


@pytest.mark.parametrize("count", range(2, 20))
def test_without_eval_a_quarter_is_held_out(count):
    sets = data.split(some(*pieces(count)))
    assert len(sets.evaluation) == max(1, count // 4)
    assert not keys(sets.evaluation) & (keys(sets.calibration) | keys(sets.search))
    assert len(keys(sets.calibration) | keys(sets.search)) == count - len(sets.evaluation)
    assert sets.evaluation.where == "a quarter of given, held out"
    assert f"{len(sets.evaluation)} of the {count} examples" in sets.notes[0]
    together = keys(sets.calibration) & keys(sets.search)
    assert bool(together) == (count == 2) == ("one example" in sets.notes[-1])


def test_duplicates_are_left_out():
    sets = data.split(some("a b", "c", "A  b", "c ", "d"), some("new", "C", "d\n"))
    assert keys(sets.calibration) | keys(sets.search) == {"a b", "c", "d"}
    kept = {*sets.calibration.places, *sets.search.places}
    assert kept == {"given:1", "given:2", "given:5"}  # the first of each
    assert sets.evaluation.items == ("new",)
    assert sets.evaluation.places == ("given:1",)
    assert any("2 examples were there twice" in note for note in sets.notes)
    assert any("2 examples are of calibration" in note for note in sets.notes)
    with pytest.raises(InputError, match="every example to judge on"):
        data.split(some("a", "b"), some("b", "A"))


def test_arrays_are_told_apart_by_what_they_hold():
    zero, one = ({"x": np.full((1, 4), v, np.float32)} for v in (0, 1))
    again = {"x": np.zeros((1, 4), np.float32)}
    assert len(keys(some(zero, one, again, {"x": zero["x"].astype(np.int32)}))) == 3


def test_one_example_works_and_says_so(tmp_path):
    sets = data.split(some("alone"))
    assert sets.calibration.items == sets.search.items == sets.evaluation.items == ("alone",)
    assert any("calibrated on, too" in note for note in sets.notes)
    assert any("one example" in note for note in sets.notes)
    (tmp_path / "one.txt").write_text("alone")
    sets = data.prepare("embed", calibration=tmp_path / "one.txt")
    assert sets.calibration.items == sets.search.items == ("alone",)
    assert sets.evaluation.items == data.default_set("embed", "eval").items
    assert "the default eval set" in sets.notes[0]


def test_what_is_not_given_is_said(tmp_path):
    sets = data.prepare("classify")
    assert [len(s) for s in (sets.calibration, sets.search, sets.evaluation)] == [96, 32, 96]
    assert any("the default calibration set" in note for note in sets.notes)
    file = tmp_path / "eval.txt"
    known = data.default_set("embed", "calibration").items[0]
    file.write_text(f"mine\n{known}\n")
    sets = data.prepare("embed", evaluation=file)
    assert sets.evaluation.items == ("mine",)
    given = tmp_path / "cal.txt"
    given.write_text("\n".join(pieces(16)))
    sets = data.prepare("embed", calibration=given)
    assert [len(s) for s in (sets.calibration, sets.search, sets.evaluation)] == [9, 3, 4]
    sets = data.prepare("embed", calibration=given, evaluation=file)
    assert [len(s) for s in (sets.calibration, sets.search, sets.evaluation)] == [12, 4, 2]
    assert sets.notes == ()


# Feeds -----------------------------------------------------------------------------------------


def check(session: Session, found: list[data.Batch]) -> None:
    """The graph takes them."""
    for batch in found:
        session.run(batch.feeds)


def test_batches_of_texts_are_mixed_and_complete(make):
    session = make(onnx_models.embedder)
    texts = pieces(40)
    found = data.batches(session, some(*texts), batch_size=8)
    check(session, found)
    rows = [row for batch in found for row in batch.records]
    assert sorted(rows) == list(range(40))
    assert [len(batch.records) for batch in found] == [1] * 5 + [8] * 4 + [3]
    real = [data.real_tokens(feeds) for feeds in data.feeds_of(session, some(*texts), 8)]
    assert all(mask.dtype == bool and mask.any(1).all() for mask in real)
    assert sum(not mask.all() for mask in real) >= 4  # there is padding
    for batch, mask in zip(found, real, strict=True):
        for row, ids in enumerate(batch.feeds["input_ids"]):
            # `pieces` end in a number, which the vocabulary lacks.
            words = [w if w in VOCAB else "[UNK]" for w in texts[batch.records[row]].split()]
            want = [CLS, *map(VOCAB.index, words[:10]), SEP]
            assert ids[mask[row]].tolist() == want
            assert set(ids[~mask[row]].tolist()) <= {PAD}
    again = data.batches(session, some(*texts), batch_size=8)
    assert [b.records for b in again] == [b.records for b in found]


def test_texts_that_were_sorted_are_mixed(make):
    texts = sorted((" ".join(np.resize(WORDS, 1 + i % 10)) + f" {i}" for i in range(80)), key=len)
    found = data.batches(make(onnx_models.embedder), some(*texts), batch_size=8)
    lengths = [data.real_tokens(batch.feeds).sum(1) for batch in found[10:-1]]
    assert len(lengths) == 8
    assert all(np.ptp(found) >= 3 for found in lengths)


def test_one_text_is_one_run(make):
    (batch,) = data.batches(make(onnx_models.embedder), some("the cat"))
    assert batch.feeds["input_ids"].shape == (1, 4)


def test_default_texts_are_cut_in_silence(make):
    session = make(onnx_models.classifier, max_length=256)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = data.batches(session, data.default_set("classify", "calibration"))
    check(session, found)
    widths = [batch.feeds["input_ids"].shape[1] for batch in found]
    assert max(widths) == 256
    assert min(widths) < 20
    padding = [1 - data.real_tokens(batch.feeds).mean() for batch in found]
    assert max(padding) > 0.5


def test_the_prompt_of_a_model_is_put_before_its_texts(make):
    session = make(onnx_models.embedder, prompt="where is ")
    (batch,) = data.batches(session, some("the cat"))
    want = [CLS, *map(VOCAB.index, ["where", "is", "the", "cat"]), SEP]
    assert batch.feeds["input_ids"].tolist() == [want]


def test_answers_are_read_in_windows(make):
    session = make(onnx_models.answerer, start="red", end="house")
    context = " ".join(WORDS[:25])
    given = some({"question": "who ran", "context": context}, {"question": "a", "context": "red"})
    found = data.batches(session, given)
    check(session, found)
    rows = {0: [], 1: []}
    for batch in found:
        for row, record in enumerate(batch.records):
            ids = batch.feeds["input_ids"][row]
            at = batch.positions[row]
            assert ids[at[0]] == CLS
            rows[record].append([VOCAB[i] for i in ids[at[1:]]])
    assert rows[1] == [["red"]]
    assert len(rows[0]) == 3
    assert {w for window in rows[0] for w in window} == set(context.split())
    (only,) = data.batches(session, some({"question": "a", "context": "red"}))
    assert only.feeds["token_type_ids"].tolist() == [[0, 0, 0, 1, 1]]
    with pytest.raises(InputError, match="record 1: the question leaves no room"):
        data.batches(session, some({"question": context, "context": "red"}))


def test_generate_reads_whole_texts_from_an_empty_cache(make):
    session = make(onnx_models.generator, context=20)
    long = " ".join(np.resize(WORDS, 300))
    texts = ["the cat sat", "a", long, "red house", "who ran to the old bridge"]
    found = data.batches(session, some(*texts), batch_size=4)
    check(session, found)
    for batch in found:
        feeds = batch.feeds
        assert feeds["past_key_values.0.key"].shape == (len(batch.records), 2, 0, 8)
        assert (feeds["attention_mask"][:, -1] == 1).all()
        for row, record in enumerate(batch.records):
            want = [VOCAB.index(w) for w in texts[record].split()][:19]
            at = batch.positions[row]
            assert feeds["input_ids"][row, at].tolist() == want
            assert feeds["position_ids"][row, at].tolist() == list(range(len(want)))
            assert batch.targets[row].tolist() == want[1:]
            np.testing.assert_array_equal(data.real_tokens(feeds)[row].nonzero()[0], at)
    with pytest.raises(InputError, match=r"record 2: .*no begin-of-text"):
        data.batches(session, some("a", ""))
    wide = data.batches(make(onnx_models.generator, context=400), some(long))
    assert wide[0].feeds["input_ids"].shape == (1, 256)


def test_translate_is_fed_what_it_says_itself(make, tmp_path):
    path = onnx_models.translator(tmp_path / "a")
    texts = ["the cat sat", "red", "a dog ran to the house", ""]
    found = data.batches(Session(path), some(*texts), batch_size=4)
    check(Session(path), found)
    task = load(path)
    for batch in found:
        for row, record in enumerate(batch.records):
            ids = batch.feeds["decoder_input_ids"][row][batch.positions[row]]
            assert ids[0] == PAD  # the start of this model
            assert ids[1:].tolist() == batch.targets[row].tolist()
            (said,) = task.translate(texts[record], max_new_tokens=data.MOST_TARGET)
            assert task.tokenizer.decode(ids[1:]) == said
    assert any(len(targets) > 2 for batch in found for targets in batch.targets)


def test_long_sources_are_cut_but_for_their_end(make):
    session = make(onnx_models.translator, max_length=400)
    (batch,) = data.batches(session, some(" ".join(np.resize(WORDS, 300))))
    assert batch.feeds["input_ids"].shape == (1, data.MOST_SOURCE)
    assert batch.feeds["input_ids"][0, [0, -1]].tolist() == [CLS, SEP]


def test_tensors_are_fed_as_given(tmp_path):
    session = Session(onnx_models.publish(tmp_path / "a", onnx_models.add_model()))
    given = some({"x": [[1, 2, 3, 4]], "m": [[1, 0]]}, {"x": [[0] * 4] * 3, "m": [[1]] * 3})
    found = data.batches(session, given)
    check(session, found)
    assert [batch.records for batch in found] == [(0,), (1,)]
    assert found[1].feeds["x"].dtype == np.float32
    assert data.real_tokens(found[0].feeds) is None
