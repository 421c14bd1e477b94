"""Drift of every task: hand-computed values, what is no number, agreement, and the budgets."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from onnxpress import artifact
from onnxpress.errors import ArtifactError
from onnxpress.press import drift
from onnxpress.press.drift import Drift, evaluator_of, worst_examples
from onnxpress.press.records import Records
from onnxpress.runtime import Session
from onnxpress.runtime.tasks import pool

from . import onnx_models
from .onnx_models import PAD, VOCAB, WORDS

Arrays = dict[str, np.ndarray]


def some(*items: object) -> Records:
    return Records("given", items, "0" * 64, tuple(f"given:{i + 1}" for i in range(len(items))))


TEXTS = some(*[" ".join(np.resize(WORDS[i:], 1 + 5 * i % 11)) for i in range(12)])
PAIRS = some(
    *[{"question": f"who {w}", "context": f"the cat ran to {w} red house ."} for w in WORDS[:5]],
    {"question": "who", "context": " ".join(np.resize(WORDS, 40))},
)
ARRAYS = some(*[{"x": [[i, 1, 2, 3]] * (i + 1), "m": [[i, 2]] * (i + 1)} for i in range(4)])


class Changed:
    """A candidate whose outputs are changed on their way out."""

    def __init__(self, session: Session, change: Callable[[Arrays, Arrays], Arrays]) -> None:
        self.session, self.change = session, change
        self.inputs, self.outputs = session.inputs, session.outputs

    def run(self, feeds: Arrays, outputs: list[str]) -> Arrays:
        out = {name: array.copy() for name, array in self.session.run(feeds, outputs).items()}
        return self.change(out, feeds)


def on(name: str, change: Callable[[np.ndarray, Arrays], np.ndarray]) -> Callable:
    """A change of one output."""
    return lambda out, feeds: {**out, name: change(out[name], feeds)} if name in out else out


SETTINGS = {
    "embed": (onnx_models.embedder, {}, TEXTS, "last_hidden_state"),
    "embed-pooled": (onnx_models.sentence_embedder, {}, TEXTS, "sentence_embedding"),
    "classify": (onnx_models.classifier, {}, TEXTS, "logits"),
    "classify-multi": (onnx_models.classifier, {"problem": "multi"}, TEXTS, "logits"),
    "classify-regression": (onnx_models.classifier, {"problem": "regression"}, TEXTS, "logits"),
    "answer": (onnx_models.answerer, {"start": "red", "end": "house"}, PAIRS, "start_logits"),
    "generate": (onnx_models.generator, {}, TEXTS, "logits"),
    "translate": (onnx_models.translator, {}, TEXTS, "logits"),
    "tensors": (None, {}, ARRAYS, "y"),
}


@pytest.fixture(scope="module")
def session_of(tmp_path_factory) -> Callable[[str], Session]:
    made: dict[str, Session] = {}

    def session_of(which: str) -> Session:
        if which not in made:
            build, settings, *_ = SETTINGS[which]
            path = tmp_path_factory.mktemp("artifact") / "a"
            if build is None:
                made[which] = Session(onnx_models.publish(path, onnx_models.add_model()))
            else:
                made[which] = Session(build(path, **settings))
        return made[which]

    return session_of


def drift_of(session: Session, records: Records, change: Callable, **options) -> Drift:
    evaluator = evaluator_of(session, records, **options)
    return evaluator.drift(evaluator.answers(session), Changed(session, change))


tasks = pytest.mark.parametrize("which", SETTINGS)


# Of every task ---------------------------------------------------------------------------------


@tasks
def test_a_graph_does_not_drift_from_itself(session_of, which):
    session, records = session_of(which), SETTINGS[which][2]
    found = drift_of(session, records, lambda out, _: out)
    assert found.mean == found.worst == 0
    assert found.examples == (0.0,) * len(records)
    assert found.passed
    assert found.why == ""
    assert found.budget == drift.DEFAULT_BUDGETS[which.split("-")[0]]
    assert found.worst_budget == pytest.approx(found.budget * (5 if which == "tensors" else 10))


@tasks
def test_noise_drifts_and_more_of_it_drifts_more(session_of, which):
    session, (_, _, records, output) = session_of(which), SETTINGS[which]
    before = 0.0
    for size in (0.01, 0.1, 1.0):
        noise = np.random.default_rng(3)
        change = on(output, lambda a, _, s=size, n=noise: a + s * n.standard_normal(a.shape))
        found = drift_of(session, records, change)
        assert found.mean > 3 * before
        assert found.worst == max(found.examples) >= found.mean
        before = found.mean
    assert not found.passed
    assert "mean" in found.why


@tasks
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_never_passes(session_of, which, bad):
    session, (_, _, records, output) = session_of(which), SETTINGS[which]

    def spoil(array: np.ndarray, feeds: Arrays) -> np.ndarray:
        if len(array) > 1 or which == "tensors":
            row = array[-1]
            # The last position of a text that is padded on the left, the first of the others.
            row[(0 if which in ("embed", "answer", "translate") else -1, ...)] = bad
        return array

    found = drift_of(session, records, on(output, spoil))
    assert found.worst == found.mean == math.inf
    assert not found.passed
    text = json.dumps(found.summary(), allow_nan=False)
    assert json.loads(text)["worst"] == "inf"
    assert "inf" in found.why
    assert not replace(found, budget=math.inf, worst_budget=math.inf).passed


@tasks
def test_padding_is_not_looked_at(session_of, which):
    session, (_, _, records, output) = session_of(which), SETTINGS[which]
    touched = []

    def spoil(array: np.ndarray, feeds: Arrays) -> np.ndarray:
        mask = feeds["attention_mask"] == 0
        if array.shape[:2] == mask.shape:
            touched.append(mask.sum())
            array[mask] = 1e4
        return array

    if which in ("embed", "answer", "generate"):  # the others have no output for every token
        assert drift_of(session, records, on(output, spoil)).mean == 0
        assert sum(touched) > 0


@tasks
def test_changed_weights_in_a_session_of_their_own(session_of, which, tmp_path):
    session, (_, _, records, _) = session_of(which), SETTINGS[which]
    model = artifact.open_model(session.path)
    for value in model.graph.initializers.values():
        array = value.const_value.numpy()
        noise = 0.005 * np.random.default_rng(5).standard_normal(array.shape)
        value.const_value = ir.tensor((array + noise).astype(np.float32))
    artifact.save_model(model, tmp_path)
    evaluator = evaluator_of(session, records)
    found = evaluator.drift(evaluator.answers(session), Session(tmp_path))
    if which == "tensors":  # it has no weights
        assert found.mean == 0
    else:
        assert 0 < found.mean < 0.1


# Embed -----------------------------------------------------------------------------------------


def test_embed_is_one_minus_the_cosine(session_of):
    session = session_of("embed-pooled")
    shift = np.array([1, 0, 0, 0, -2, 0, 0, 0], np.float32)
    found = drift_of(session, TEXTS, on("sentence_embedding", lambda a, _: a + shift))
    evaluator = evaluator_of(session, TEXTS)
    want = []
    for (a,) in evaluator.answers(session):
        b = a + shift
        want.append(1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    np.testing.assert_allclose(found.examples, want, atol=1e-6)
    assert found.mean == pytest.approx(np.mean(want), abs=1e-6)
    assert found.extra["mean_cosine"] == pytest.approx(1 - np.mean(want), abs=1e-6)
    assert found.extra["min_cosine"] == pytest.approx(1 - max(want), abs=1e-6)
    assert found.metric == "1 - cosine"
    scaled = drift_of(session, TEXTS, on("sentence_embedding", lambda a, _: 3 * a))
    assert scaled.mean == pytest.approx(0, abs=1e-9)
    turned = drift_of(session, TEXTS, on("sentence_embedding", lambda a, _: -a))
    assert turned.mean == pytest.approx(2)


def test_embed_pools_as_the_task_does(session_of):
    session = session_of("embed")
    evaluator = evaluator_of(session, TEXTS)
    answers = evaluator.answers(session)
    for batch in evaluator.batches:
        out = session.run(batch.feeds)["last_hidden_state"]
        for row, record in enumerate(batch.records):
            want = pool(out, batch.feeds["attention_mask"], "mean")[row]
            np.testing.assert_allclose(answers[record][0], want)


# Classify --------------------------------------------------------------------------------------


def logits_of(session: Session, records: Records) -> list[np.ndarray]:
    return [rows[0] for rows in evaluator_of(session, records).answers(session)]


SHIFT = np.array([0.3, -0.2, 0.1], np.float32)


def test_classify_is_the_divergence_of_the_labels(session_of):
    session = session_of("classify")
    found = drift_of(session, TEXTS, on("logits", lambda a, _: a + SHIFT))
    want = []
    for a in logits_of(session, TEXTS):
        p, q = (np.exp(x) / np.exp(x).sum() for x in (a, a + SHIFT))
        want.append(sum(x * math.log(x / y) for x, y in zip(p, q, strict=True)))
    np.testing.assert_allclose(found.examples, want, rtol=1e-5)
    assert found.metric == "KL divergence (nats)"


def test_each_of_several_labels_is_a_yes_or_no(session_of):
    session = session_of("classify-multi")
    found = drift_of(session, TEXTS, on("logits", lambda a, _: a + SHIFT))
    want = []
    for a in logits_of(session, TEXTS):
        p, q = (1 / (1 + np.exp(-x)) for x in (a, a + SHIFT))
        want.append((p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).sum())
    np.testing.assert_allclose(found.examples, want, rtol=1e-5)
    assert set(found.extra) == {"agreement", "near_ties"}


def test_a_regression_is_relative_to_the_usual_score(session_of):
    session = session_of("classify-regression")
    found = drift_of(session, TEXTS, on("logits", lambda a, _: a + SHIFT))
    sizes = [np.linalg.norm(a) for a in logits_of(session, TEXTS)]
    want = [np.linalg.norm(SHIFT) / max(size, np.mean(sizes)) for size in sizes]
    np.testing.assert_allclose(found.examples, want, rtol=1e-5)
    assert found.metric == "relative difference"
    assert found.extra == {}


class Fixed:
    """A classifier whose logits are those given, text by text."""

    def __init__(self, session: Session, evaluator: drift.Evaluator, logits: np.ndarray) -> None:
        self.inputs, self.outputs, self.logits = session.inputs, session.outputs, logits
        self.batches = {id(b.feeds["input_ids"]): b.records for b in evaluator.batches}

    def run(self, feeds: Arrays, _: list[str]) -> Arrays:
        return {"logits": self.logits[list(self.batches[id(feeds["input_ids"])])]}


@pytest.mark.parametrize(
    ("differ", "count", "ties", "passed"),
    [(0, 12, 0, True), (1, 12, 0, True), (2, 12, 0, False), (1, 49, 0, True), (2, 49, 0, False),
     (1, 50, 0, True), (2, 60, 0, False), (2, 100, 0, True), (3, 100, 0, False),
     (0, 12, 12, True), (1, 60, 11, True), (2, 60, 11, False)],
)  # fmt: skip
def test_agreement_of_labels(session_of, differ, count, ties, passed):
    session = session_of("classify")
    evaluator = evaluator_of(session, some(*[f"{WORDS[i % 30]} {i}" for i in range(count)]))
    want = np.tile(np.log([0.5, 0.4, 0.1]), (count, 1))
    got = want.copy()
    want[count - ties :] = np.log([0.401, 0.399, 0.2])
    got[count - ties :] = np.log([0.399, 0.401, 0.2])  # another choice, and neither is wrong
    got[:differ] = np.log([0.44, 0.46, 0.1])
    answers = evaluator.answers(Fixed(session, evaluator, want))
    found = evaluator.drift(answers, Fixed(session, evaluator, got), budget=1.0)
    judged = count - ties
    assert found.extra["agreement"] == pytest.approx(1 - differ / judged if judged else 1)
    assert found.extra["near_ties"] == ties
    assert found.passed == passed
    assert (f"{differ} of {judged} examples differ" in found.why) != passed


def test_agreement_looks_at_every_label_that_is_decided(session_of):
    session = session_of("classify-multi")
    evaluator = evaluator_of(session, TEXTS)
    want = np.tile(np.array([2.0, -2.0, 0.01]), (12, 1))
    near, far = want.copy(), want.copy()
    near[:, 2] *= -1
    far[:3, 1] = 0.1
    answers = evaluator.answers(Fixed(session, evaluator, want))
    assert evaluator.drift(answers, Fixed(session, evaluator, near)).extra["agreement"] == 1
    assert evaluator.drift(answers, Fixed(session, evaluator, far)).extra["agreement"] == 0.75


def test_an_unknown_problem(session_of, tmp_path):
    session = Session(onnx_models.classifier(tmp_path / "a", problem="double"))
    with pytest.raises(ArtifactError, match="'double'"):
        evaluator_of(session, TEXTS)


# Answer ----------------------------------------------------------------------------------------


def test_answer_is_the_mean_over_start_and_end(session_of):
    session = session_of("answer")
    pair = some({"question": "who", "context": "the red house ran"})

    def change(logits: np.ndarray, feeds: Arrays) -> np.ndarray:
        logits[feeds["token_type_ids"] == 0] += 1  # of the question only [CLS] counts
        return logits

    found = drift_of(session, pair, on("start_logits", change))
    # [CLS] 3, then the four words: `red` 6; [CLS] is at 4 in the candidate.
    a, b = np.array([3, 0, 6, 0, 0.0]), np.array([4, 0, 6, 0, 0.0])
    p, q = (np.exp(x) / np.exp(x).sum() for x in (a, b))
    want = float((p * np.log(p / q)).sum()) / 2
    assert found.examples[0] == pytest.approx(want, rel=1e-5)
    assert found.extra == {"agreement": 1.0, "near_ties": 0.0}


def test_agreement_of_spans(session_of):
    session = session_of("answer")

    def elsewhere(logits: np.ndarray, feeds: Arrays) -> np.ndarray:
        logits[feeds["input_ids"] == VOCAB.index("the")] += 9
        return logits

    def nowhere(logits: np.ndarray, feeds: Arrays) -> np.ndarray:
        logits[:, 0] += 50
        return logits

    # "Not here" is no span: the task answers the best one all the same.
    for output in ("start_logits", "end_logits"):
        found = drift_of(session, PAIRS, on(output, nowhere))
        assert found.extra["agreement"] == 1
        assert found.mean > 1
    found = drift_of(session, PAIRS, on("start_logits", elsewhere))
    assert found.extra["agreement"] == 0
    assert f"of {len(PAIRS) - found.extra['near_ties']:g} examples differ" in found.why


def test_spans_are_as_long_as_the_task_allows(session_of):
    evaluator = evaluator_of(session_of("answer"), PAIRS)
    logits = np.zeros((2, 51))  # the first token, and 50 of a context
    logits[0, 11] = logits[1, 41] = 9
    assert evaluator._spans([logits]).argmax() != 10 * 50 + 40  # 31 tokens
    logits[1, 40] = 8
    assert evaluator._spans([logits]).argmax() == 10 * 50 + 39
    logits[1, 5] = 12  # an end before its start is no span
    assert evaluator._spans([logits]).argmax() == 10 * 50 + 39


# Generate and translate ------------------------------------------------------------------------


def by_hand(pairs: list[tuple[np.ndarray, np.ndarray, list[int]]]) -> tuple[list, float, float]:
    """KL of every token by text, top-1 and the ratio of perplexities."""
    apart, same, nats = [], [], np.zeros(2)
    for a, b, targets in pairs:
        p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (a, b))
        apart.append((p * np.log(p / q)).sum(-1))
        same += (p.argmax(-1) == q.argmax(-1)).tolist()
        for i, target in enumerate(targets):
            nats += [-math.log(p[i, target]), -math.log(q[i, target])]
    count = sum(len(targets) for *_, targets in pairs)
    return apart, float(np.mean(same)), math.exp((nats[1] - nats[0]) / count)


def test_generate_is_the_mean_over_real_tokens(session_of):
    session = session_of("generate")
    table = 0.3 * onnx_models.normal(9, len(VOCAB), len(VOCAB))
    found = drift_of(session, TEXTS, on("logits", lambda a, feeds: a + table[feeds["input_ids"]]))
    pairs = []
    for text in TEXTS.items:
        ids = [VOCAB.index(w) for w in text.split()]
        n = len(ids)
        empty = np.zeros((1, 2, 0, 8), np.float32)
        feeds = {
            "input_ids": np.array([ids]),
            "attention_mask": np.ones((1, n), np.int64),
            "position_ids": np.arange(n)[None],
            **{f"past_key_values.{i}.{p}": empty for i in range(2) for p in ("key", "value")},
        }
        logits = session.run(feeds, ["logits"])["logits"][0].astype(np.float64)
        pairs.append((logits, logits + table[ids], ids[1:]))
    apart, top1, ratio = by_hand(pairs)
    np.testing.assert_allclose(found.examples, [a.mean() for a in apart], rtol=1e-4)
    assert found.mean == pytest.approx(np.concatenate(apart).mean(), rel=1e-4)
    assert found.mean != pytest.approx(np.mean(found.examples), rel=1e-3)  # it is over tokens
    assert found.extra["top1"] == pytest.approx(top1)
    assert 0 < top1 < 1
    assert found.extra["perplexity_ratio"] == pytest.approx(ratio, rel=1e-4)


def test_logits_that_are_not_kept_are_computed_again(session_of, monkeypatch):
    session = session_of("generate")
    table = 0.3 * onnx_models.normal(9, len(VOCAB), len(VOCAB))
    noise = on("logits", lambda a, feeds: a + table[feeds["input_ids"]])
    kept = drift_of(session, TEXTS, noise)
    runs = []

    def counted(rows):
        def count(self, session, batch):
            runs.append(type(session).__name__)
            return rows(self, session, batch)

        return count

    monkeypatch.setattr(drift.NextTokens, "rows", counted(drift.NextTokens.rows))
    batches = len(evaluator_of(session, TEXTS).batches)
    first = sum(len(p) for p in evaluator_of(session, TEXTS).batches[0].positions)
    for room, again in ((1 << 30, 0), (first * len(VOCAB) * 4, batches - 1), (0, batches)):
        monkeypatch.setattr(drift, "KEPT_BYTES", room)
        evaluator = evaluator_of(session, TEXTS)
        want = evaluator.answers(session)
        runs.clear()
        assert evaluator.drift(want, Changed(session, noise)) == kept
        assert runs.count("Session") == again
        assert runs.count("Changed") == batches


def test_texts_of_one_token_have_no_perplexity(session_of):
    found = drift_of(session_of("generate"), some("a", "the"), lambda out, _: out)
    assert found.extra == {"top1": 1.0}


def test_translate_is_forced_to_what_the_reference_says(session_of):
    session = session_of("translate")
    table = 0.3 * onnx_models.normal(9, len(VOCAB), len(VOCAB))
    change = on("logits", lambda a, feeds: a + table[feeds["decoder_input_ids"]])
    found = drift_of(session, TEXTS, change)
    evaluator = evaluator_of(session, TEXTS)
    pairs = {}
    for batch in evaluator.batches:
        for row, record in enumerate(batch.records):
            ids = [PAD, *batch.targets[row].tolist()]
            one = {n: a[row : row + 1] for n, a in batch.feeds.items()}
            one["decoder_input_ids"] = np.array([ids])
            logits = session.run(one, ["logits"])["logits"][0].astype(np.float64)
            # The model never says the padding word, however likely it is.
            a, b = (np.delete(x, PAD, -1) for x in (logits, logits + table[ids]))
            pairs[record] = (a, b, [i - 1 for i in ids[1:]])
    apart, top1, ratio = by_hand([pairs[i] for i in range(len(TEXTS))])
    np.testing.assert_allclose(found.examples, [a.mean() for a in apart], rtol=1e-4)
    assert found.extra["top1"] == pytest.approx(top1)
    assert found.extra["perplexity_ratio"] == pytest.approx(ratio, rel=1e-4)


# Tensors ---------------------------------------------------------------------------------------


def test_tensors_are_relative_errors(session_of):
    session = session_of("tensors")
    found = drift_of(session, ARRAYS, on("y", lambda a, _: a + np.float32(0.5)))
    want = []
    for item in ARRAYS.items:
        y = 2 * np.array(item["x"], float)
        want.append(0.5 * math.sqrt(y.size) / np.linalg.norm(y))
    np.testing.assert_allclose(found.examples, want, rtol=1e-6)
    assert found.extra == {"max_abs": 0.5, "agreement": 1.0}
    assert found.metric == "relative error"


def test_integers_have_to_agree(session_of):
    session = session_of("tensors")

    def one_more(z: np.ndarray, _: Arrays) -> np.ndarray:
        z[0, 0] += 1
        return z

    found = drift_of(session, ARRAYS, on("z", one_more))
    assert found.mean == 0
    assert found.extra["agreement"] == pytest.approx(1 - 4 / 20)
    assert not found.passed
    assert "4 of 20 elements differ" in found.why


def test_outputs_are_judged_one_by_one(tmp_path):
    model = onnx_models.graph(
        """g (float[batch,4] x) => (float[batch,4] large, float[batch,4] small)
        { k = Constant<value_float=1000.0>()  large = Mul(x, k)  small = Identity(x) }"""
    )
    session = Session(onnx_models.publish(tmp_path / "a", model))
    given = some({"x": [[1, 1, 1, 1]]}, {"x": [[0, 0, 0, 0]]})
    found = drift_of(session, given, on("small", lambda a, _: a * np.float32(1.5)))
    assert found.examples == pytest.approx((0.5, 0))
    assert found.extra == {"max_abs": 0.5}
    # What is nearly nothing is held against a thousandth of the usual size.
    tiny = drift_of(session, given, on("small", lambda a, _: a + np.float32(1e-5)))
    assert tiny.examples[1] == pytest.approx(1e-5 / (1e-3 * 0.5))
    other = drift_of(session, given, on("small", lambda a, _: a[:, :2]))
    assert other.worst == other.extra["max_abs"] == math.inf


def test_the_same_infinities_do_not_drift(tmp_path):
    model = onnx_models.graph("g (float[batch,4] x) => (float[batch,4] y) { y = Log(x) }")
    session = Session(onnx_models.publish(tmp_path / "a", model))
    given = some({"x": [[0, -1, 1, math.e]]})  # -inf, nan, 0, 1
    assert drift_of(session, given, lambda out, _: out).mean == 0
    scaled = drift_of(session, given, on("y", lambda a, _: a * np.float32(1.5)))
    assert scaled.mean == pytest.approx(0.5)
    assert scaled.extra["max_abs"] == pytest.approx(0.5)
    for index in (0, 1):
        change = on("y", lambda a, _, i=index: np.where(np.arange(4) == i, 0, a))
        assert drift_of(session, given, change).worst == math.inf


# Candidates, budgets, reports ------------------------------------------------------------------


def test_a_candidate_in_half_precision_with_fewer_heads(session_of, tmp_path):
    """What it is fed is what its own signature says: dtype and heads of an empty cache."""
    session = session_of("generate")
    seen = []

    class Half(Changed):
        def run(self, feeds, outputs):
            seen.append({n: (a.dtype.name, a.shape) for n, a in feeds.items()})
            full = {
                n: np.zeros((a.shape[0], 2, 0, 8), np.float32) if a.dtype.kind == "f" else a
                for n, a in feeds.items()
            }
            return {n: a.astype(np.float16) for n, a in super().run(full, outputs).items()}

    candidate = Half(session, lambda out, _: out)
    candidate.inputs = tuple(
        replace(s, dtype="float16", shape=("batch", 1, "p", 8)) if s.dtype == "float32" else s
        for s in session.inputs
    )
    evaluator = evaluator_of(session, TEXTS)
    found = evaluator.drift(evaluator.answers(session), candidate)
    assert 0 < found.mean < 1e-4
    assert all(f["past_key_values.1.value"][0] == "float16" for f in seen)
    assert all(f["past_key_values.1.value"][1][1:] == (1, 0, 8) for f in seen)
    assert all(f["input_ids"][0] == "int64" for f in seen)


def test_budgets(session_of):
    session = session_of("tensors")
    evaluator = evaluator_of(session, ARRAYS)
    want = evaluator.answers(session)
    off = Changed(session, on("y", lambda a, _: a * np.float32(1.03)))
    assert "the mean relative error is 0.03, the budget 0.02" in evaluator.drift(want, off).why
    assert evaluator.drift(want, off, budget=0.031).passed
    one = Changed(session, on("y", lambda a, _: a * np.float32(1.2) if len(a) == 1 else a))
    found = evaluator.drift(want, one, budget=0.0395)
    assert found.mean == pytest.approx(0.05)
    found = evaluator.drift(want, one, budget=0.05001)
    assert found.passed
    assert not replace(found, worst_budget=0.19).passed
    assert "the worst relative error is 0.2" in replace(found, worst_budget=0.19).why


def test_a_session_that_is_not_published(session_of, tmp_path):
    """The road sets the manifest of its staging directory by hand."""
    published = session_of("embed")
    for name in ("model.onnx", "model.onnx.data", "tokenizer.json"):
        if (published.path.parent / name).is_file():
            (tmp_path / name).write_bytes((published.path.parent / name).read_bytes())
    session = Session(tmp_path)
    assert session.manifest is None
    with pytest.raises(ArtifactError, match="manifest"):
        evaluator_of(session, TEXTS)
    session.manifest = published.manifest
    evaluator = evaluator_of(session, TEXTS)
    assert evaluator.drift(evaluator.answers(published), session).mean == 0


def test_worst_examples(session_of):
    long = some("a  b\nc", {"question": "who?", "context": "x" * 300}, {"x": np.ones((2, 3))})
    found = Drift("d", 1, 3, (1.0, math.inf, 0.123456), {}, 9, 9)
    rows = worst_examples(long, found, k=2)
    assert [row["where"] for row in rows] == ["given:2", "given:1"]
    assert [row["drift"] for row in rows] == ["inf", 1.0]
    assert rows[0]["text"].startswith("who? | xxx")
    assert len(rows[0]["text"]) == 160
    assert rows[1]["text"] == "a b c"
    rows = worst_examples(long, replace(found, examples=(1.0, 2.0, 3.123456)))
    assert rows[0] == {"where": "given:3", "text": "x: float64[2, 3]", "drift": 3.123}
    assert len(rows) == 3
