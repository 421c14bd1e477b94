"""OpenVINO as a target: ops that its frontend lacks are taken apart, and its provider takes all.

What needs the provider runs in a process of its own, on a wheel that lies in a folder of its own
(`make .venv/.openvino`, or $ONNXPRESS_OPENVINO): a process has one module onnxruntime.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxpress
import onnxruntime
import pytest
from onnxpress.errors import UsageError
from onnxpress.optimizers import TARGETS
from onnxpress.optimizers.clean.infer_shapes import InferShapes
from onnxpress.optimizers.lower.decompose_attention import DecomposeAttention
from onnxpress.optimizers.lower.decompose_rms_normalization import DecomposeRmsNormalization
from onnxpress.optimizers.lower.decompose_rotary_embedding import DecomposeRotaryEmbedding
from onnxpress.optimizers.lower.rename_values import RenameValues
from onnxpress.optimizers.pipeline import lowered, run_passes
from onnxpress.press import change
from onnxpress.press.candidates import check_target
from onnxpress.runtime import openvino

from . import planted
from .int8_models import ops, session_run, signature
from .onnx_models import graph

FOLDER = Path(os.environ.get("ONNXPRESS_OPENVINO", Path(sys.prefix) / "openvino"))
FLAT = 'float["B","S",12] q, float["B","K",12] k, float["B","K",12] v'
GROUPED = 'float["B","S",16] q, float["B","K",8] k, float["B","K",12] v'
DEEP = 'float["B",3,"S",4] q, float["B",3,"K",4] k, float["B",3,"K",4] v'
HEADS = "q_num_heads=3, kv_num_heads=3"


@pytest.fixture(scope="module")
def wheel() -> Path:
    """The folder that holds onnxruntime-openvino."""
    if not (FOLDER / "onnxruntime").is_dir():
        pytest.skip(f"no onnxruntime-openvino in {FOLDER}: `make .venv/.openvino` puts it there")
    return FOLDER


def process(wheel: Path, code: str, *arguments: object) -> dict:
    """What a program prints as its last line, in JSON, on the wheel of OpenVINO."""
    path = os.pathsep.join(filter(None, [str(wheel), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


# Attention ------------------------------------------------------------------------------------

# name: inputs, call of Attention, outputs, the ops that must be (or, with "-", must not be) there
ATTENTION = {
    "no mask": (FLAT, f"Attention<{HEADS}>(q, k, v)", "y", ["-Add", "-Where", "Mul"]),
    "rank 4": (DEEP, "Attention(q, k, v)", "y", ["-Reshape"]),
    "grouped": (GROUPED, "Attention<q_num_heads=4, kv_num_heads=2>(q, k, v)", "y", ["Gather"]),
    "scale 1": (FLAT, f"Attention<{HEADS}, scale=1.0>(q, k, v)", "y", ["-Mul"]),
    "softcap": (FLAT, f"Attention<{HEADS}, softcap=2.0>(q, k, v, m)", "y", ["Tanh"]),
    "float mask": (FLAT, f"Attention<{HEADS}>(q, k, v, m)", "y", ["Where", "ReduceMax"]),
    "bool mask": (FLAT, f"Attention<{HEADS}>(q, k, v, b)", "y", ["Where", "ReduceMax"]),
    "causal": (FLAT, f"Attention<{HEADS}, is_causal=1>(q, k, v)", "y", ["Range", "-ReduceMax"]),
    "causal, mask": (FLAT, f"Attention<{HEADS}, is_causal=1>(q, k, v, m)", "y", ["ReduceMax"]),
    "causal, bools": (FLAT, f"Attention<{HEADS}, is_causal=1>(q, k, v, b)", "y", ["And"]),
    "cache": (FLAT, f"Attention<{HEADS}>(q, k, v, , pk, pv)", "y, nk, nv", ["Concat"]),
    "causal, cache": (FLAT, f"Attention<{HEADS}, is_causal=1>(q, k, v, , pk, pv)", "y, nk, nv", []),
    "present": (DEEP, "Attention(q, k, v)", "y, nk, nv", ["Identity"]),
}
SHAPES = {
    "m": 'float["B",1,"S","K"]', "b": 'bool["B",1,"S","K"]',
    "pk": 'float["B",3,"P",4]', "pv": 'float["B",3,"P",4]',
}  # fmt: skip


def attention(case: str, layers: int = 1) -> ir.Model:
    inputs, call, outputs, _ = ATTENTION[case]
    more = [f"{SHAPES[n]} {n}" for n in SHAPES if f" {n}," in call or f" {n})" in call]
    names = outputs.split(", ")
    kinds = {"y": "float[B,S,N]", "nk": "float[B,3,T,4]", "nv": "float[B,3,T,4]"}
    text = f"g ({', '.join([inputs, *more])}) => ({', '.join(f'{kinds[n]} {n}' for n in names)})"
    text = text.replace('"', "").replace("[B,S,N]", "[B,X,Y,Z]" if inputs == DEEP else "[B,S,N]")
    body = f"{outputs} = {call}"
    if layers == 2:
        body = f"q2 = {call} " + body.replace("(q,", "(q2,")
    model = graph(f"{text} {{ {body} }}")
    InferShapes()(model)
    return model


def feeds(model: ir.Model, seed: int) -> dict[str, np.ndarray]:
    """Two rows, of which the second one's mask hides all keys of one query."""
    rng = np.random.default_rng(seed)
    cached = any(v.name == "pk" for v in model.graph.inputs)
    sizes = {"B": 2, "S": 3, "K": 3 if cached else 5, "P": 4}
    found = {}
    for value in model.graph.inputs:
        shape = [d if isinstance(d, int) else sizes[str(d.value)] for d in value.shape]
        array = rng.standard_normal(shape).astype(np.float32)
        if value.name in ("m", "b"):
            hidden = rng.random(shape) < 0.4
            hidden[1, 0, 1] = True
            hidden[0, 0, 1, 0] = False
            array = ~hidden if value.name == "b" else np.where(hidden, -np.inf, array)
        found[str(value.name)] = array if array.dtype == bool else array.astype(np.float32)
    return found


@pytest.mark.parametrize("case", ATTENTION)
def test_attention_is_taken_apart_and_gives_the_same(case):
    model = attention(case)
    given, before = feeds(model, 0), signature(model)
    want = session_run(model, given)
    outcome = DecomposeAttention()(model)
    assert outcome.hits == 1
    assert outcome.notes == ()
    assert "Attention" not in ops(model)
    for op in ATTENTION[case][3]:
        assert (op.removeprefix("-") in ops(model)) == (not op.startswith("-")), op
    InferShapes()(model)
    assert [s[:2] for s in signature(model)] == [s[:2] for s in before]
    got = session_run(model, given)
    for name, array in want.items():
        assert np.isfinite(got[name]).all()  # of a row that is masked throughout, too
        np.testing.assert_allclose(got[name], array, rtol=1e-5, atol=1e-5)
    assert not DecomposeAttention()(model).modified


@pytest.mark.parametrize("case", ["float mask", "causal, bools"])
def test_layers_share_what_a_mask_becomes(case):
    model = attention(case, layers=2)
    given = feeds(model, 1)
    want = session_run(model, given)
    assert DecomposeAttention()(model).hits == 2
    assert ops(model).count("ReduceMax") == 1
    assert ops(model).count("Range") == (2 if "causal" in case else 0)
    np.testing.assert_allclose(session_run(model, given)["y"], want["y"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("lowest", "guards"), [("-3e38", 0), ("-inf", 1)])
def test_a_finite_mask_needs_no_guard(lowest, guards):
    inputs = FLAT.replace('"', "")
    model = graph(
        f"g ({inputs}, bool[B,1,1,K] seen, float high, float low) => (float[B,S,N] y)"
        f" {{ m = Where(seen, high, low) y = Attention<{HEADS}>(q, k, v, m) }}",
        {"high": np.float32(0), "low": np.float32(lowest)},
    )
    InferShapes()(model)
    assert DecomposeAttention()(model).hits == 1
    assert ops(model).count("ReduceMax") == guards


@pytest.mark.parametrize(
    ("inputs", "call", "why"),
    [
        (FLAT.replace("12] v", '"W"] v'), f"y = Attention<{HEADS}>(q, k, v)", "widths"),
        (FLAT, f"y, nk, nv, s = Attention<{HEADS}>(q, k, v)", "scores are read"),
        (FLAT, f"y = Attention<{HEADS}, softmax_precision=11>(q, k, v)", "precision of its own"),
        (FLAT.replace("float", "double"), f"y = Attention<{HEADS}>(q, k, v)", "type DOUBLE"),
    ],
)
def test_attention_stays_where_it_cannot_be_said(inputs, call, why):
    extra = ", float[B,3,S,K] s" if " s =" in call else ""
    kind = "double" if "double" in inputs else "float"
    text = f"g ({inputs}) => ({kind}[B,S,N] y{extra}) {{ {call} }}".replace('"', "")
    model = graph(text)
    InferShapes()(model)
    outcome = DecomposeAttention()(model)
    assert not outcome.modified
    assert why in outcome.notes[0]


# Norms and rotation ---------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["x, w", "x, w2"])
@pytest.mark.parametrize("epsilon", [1e-5, 0.5])
def test_rms_normalization(call, epsilon):
    axis = 1 if "w2" in call else -1
    model = graph(
        f"g (float[B,3,8] x, float[8] w, float[3,8] w2) => (float[B,3,8] y)"
        f" {{ y = RMSNormalization<axis={axis}, epsilon={epsilon}>({call}) }}"
    )
    rng = np.random.default_rng(0)
    given = {
        n: rng.standard_normal(s).astype(np.float32)
        for n, s in {"x": (2, 3, 8), "w": (8,), "w2": (3, 8)}.items()
    }
    want = session_run(model, given)["y"]
    assert DecomposeRmsNormalization()(model).hits == 1
    np.testing.assert_allclose(session_run(model, given)["y"], want, rtol=1e-5, atol=1e-6)
    assert not DecomposeRmsNormalization()(model).modified


def test_rms_normalization_of_half_floats_stays():
    model = graph(
        "g (float16[B,8] x, float16[8] w) => (float16[B,8] y) { y = RMSNormalization(x, w) }"
    )
    outcome = DecomposeRmsNormalization()(model)
    assert not outcome.modified
    assert "FLOAT16" in outcome.notes[0]


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("turned", [0, 4])
def test_rotary_embedding(flat, interleaved, positions, turned):
    half = (turned or 8) // 2
    cache = f"float[9,{half}]" if positions else f"float[B,S,{half}]"
    x = "float[B,S,16]" if flat else "float[B,2,S,8]"
    heads = ", num_heads=2" if flat or turned else ""
    model = graph(
        f"g ({x} x, {cache} c, {cache} s{', int64[B,S] p' if positions else ''}) => ({x} y)"
        f" {{ y = RotaryEmbedding<interleaved={interleaved}, rotary_embedding_dim={turned}{heads}>"
        f"(x, c, s{', p' if positions else ''}) }}"
    )
    rng = np.random.default_rng(0)
    shape = (9, half) if positions else (2, 3, half)
    given = {
        "x": rng.standard_normal((2, 3, 16) if flat else (2, 2, 3, 8)).astype(np.float32),
        "c": rng.standard_normal(shape).astype(np.float32),
        "s": rng.standard_normal(shape).astype(np.float32),
    }
    if positions:
        given["p"] = rng.integers(0, 9, (2, 3))
    want = session_run(model, given)["y"]
    assert DecomposeRotaryEmbedding()(model).hits == 1
    assert "RotaryEmbedding" not in ops(model)
    np.testing.assert_allclose(session_run(model, given)["y"], want, rtol=1e-5, atol=1e-6)


def test_a_name_that_means_something_goes():
    model = graph("g (float[B,8] x) => (float[B,1,8] y) { y = Unsqueeze(x, axes) }".replace(
        "x)", "x, int64[1] axes)", 1), {"axes": np.array([1])})  # fmt: skip
    given = {"x": np.ones((2, 8), np.float32)}
    want = session_run(model, given)["y"]
    assert RenameValues({"axes"})(model).hits == 1
    assert list(model.graph.initializers) == ["axes_value"]
    np.testing.assert_array_equal(session_run(model, given)["y"], want)
    kept = graph("g (float[B,8] x, int64[1] axes) => (float[B,1,8] y) { y = Unsqueeze(x, axes) }")
    assert not RenameValues({"axes", "y", "x"})(kept).modified


# The target -----------------------------------------------------------------------------------


def test_lowering_leaves_no_op_that_the_frontend_lacks():
    model = attention("causal, cache")
    run_passes(model, lowered(TARGETS["openvino"]))
    assert not set(ops(model)) & TARGETS["openvino"].decomposes
    assert all(node.domain == "" for node in model.graph)


def test_what_it_has_no_kernels_for_is_refused():
    check_target("openvino", "bf16")
    for precision in ("fp16", "int8-dynamic"):
        with pytest.raises(UsageError, match=f"openvino has no {precision}: "):
            check_target("openvino", precision)


def test_the_options_say_what_floats_are_computed_in():
    for precision, hint in (("fp32", "f32"), ("int8", "f32"), ("bf16", "bf16")):
        given = json.loads(openvino.options(precision)["load_config"])
        assert given == {"CPU": {"INFERENCE_PRECISION_HINT": hint}}


def test_a_wheel_without_the_provider_is_named():
    if "OpenVINOExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has the provider")
    why = openvino.missing()
    assert onnxruntime.__version__ in why
    assert "pip install 'onnxruntime-openvino" in why


MADE = """
import json, sys
from pathlib import Path
import onnxpress
from onnxpress.press import change
from onnxpress.runtime import Session

folder, fastest = Path(sys.argv[1]), sys.argv[2]

def clock(sessions, reference, shapes):
    return [{"batch": 1, "ms": {name: 1.0 if name == fastest else 2.0 for name in sessions}}]

change.time_sessions = clock  # who is faster here is no matter of a test
change.time_against = lambda *_, **__: {}
found = {}
for name in sys.argv[3:]:
    auto = name == "auto"
    files = {k: folder / f"{k}.txt" for k in ("calibration", "evaluation")}
    m = onnxpress.optimize(
        folder / "source", folder / name, target="cpu" if auto else "openvino", precision=name,
        measure=auto, **({} if name == "fp32" else files),
    )
    s = Session(folder / name, provider="openvino")
    found[name] = {
        "target": m.target, "runtime": m.runtime, "ops": m.ops, "precision": m.precision,
        "parity": m.parity is not None, "placed": s.placement().counts,
    }
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def made(wheel, tmp_path_factory) -> dict:
    """What `optimize` makes of one embedder in each precision, on the wheel of OpenVINO."""
    folder = tmp_path_factory.mktemp("openvino")
    planted.embedder(folder / "planted")
    # Its mask has one row, which Attention of that wheel's CPU provider reads wrong, and without an
    # error: what the graph is held against would be wrong itself.
    onnxpress.optimize(folder / "planted", folder / "source")
    planted.texts(folder / "calibration.txt", 24, 0)
    planted.texts(folder / "evaluation.txt", 12, 1)
    names = [*TARGETS["openvino"].precisions, "auto"]
    return process(wheel, MADE, folder, "openvino bf16", *names)


@pytest.mark.parametrize("precision", TARGETS["openvino"].precisions)
def test_every_node_runs_on_the_provider(precision, made):
    done = made[precision]
    assert list(done["placed"]) == ["OpenVINOExecutionProvider"]
    assert done["target"] == {"provider": "openvino", "precision": precision, "opset": 23}
    assert done["runtime"]["provider_options"] == openvino.options(precision)
    assert done["runtime"]["onnxruntime"].startswith(">=1.24")
    assert done["parity"]
    assert ("QuantizeLinear" in done["ops"]) == (precision == "int8")


def test_rounding_is_seen_by_the_gate(made):
    """In bf16 the graph is that of float32: a drift proves that the option was in force."""
    assert 1e-7 < made["bf16"]["precision"]["drift"]["mean"] < 0.005


def test_auto_takes_it_where_it_is_fastest(made):
    done = made["auto"]
    names = [row["name"] for row in done["precision"]["candidates"]]
    assert {"fp32", "int8", "openvino fp32", "openvino int8", "openvino bf16"} <= set(names)
    kept = [row["name"] for row in done["precision"]["candidates"] if row["kept"]]
    assert kept == ["openvino bf16"]
    assert done["target"] == {"provider": "openvino", "precision": "bf16", "opset": 23}
    assert done["runtime"]["provider_options"] == openvino.options("bf16")


REFUSED = """
import json, sys
import onnx
from onnxpress.errors import ProviderError
from onnxpress.runtime import Session

text = '<ir_version: 10, opset_import: ["" : 23]> g (float[B,S,8] x) => (float[B,S,8] y)'
node = "{ y = Attention<q_num_heads=2, kv_num_heads=2>(x, x, x) }"
onnx.save(onnx.parser.parse_model(text + node), sys.argv[1])
try:
    Session(sys.argv[1], provider="openvino")
    print(json.dumps(""))
except ProviderError as e:
    print(json.dumps(str(e)))
"""


def test_a_node_that_it_does_not_take_is_named(wheel, tmp_path):
    assert "Attention" in process(wheel, REFUSED, tmp_path / "model.onnx")


def test_auto_says_that_it_was_not_tried(tmp_path, monkeypatch):
    if not openvino.missing():
        pytest.skip("this onnxruntime has the provider")
    planted.embedder(tmp_path / "source")
    planted.texts(tmp_path / "calibration.txt", 24, 0)
    planted.texts(tmp_path / "evaluation.txt", 12, 1)
    files = {"calibration": tmp_path / "calibration.txt", "evaluation": tmp_path / "evaluation.txt"}
    row = {"batch": 1, "ms": dict.fromkeys(TARGETS["cpu"].precisions, 1.0)}
    monkeypatch.setattr(change, "time_sessions", lambda *_: [row])
    monkeypatch.setattr(change, "time_against", lambda *_, **__: {})
    found = onnxpress.optimize(tmp_path / "source", tmp_path / "out", precision="auto", **files)
    notes = found.precision["notes"]
    assert any("openvino was not tried" in note and "pip install" in note for note in notes)
    with pytest.raises(UsageError, match="option of its session") as caught:
        onnxpress.optimize(
            tmp_path / "source", tmp_path / "no", target="openvino", precision="bf16", **files
        )
    assert "pip install" in caught.value.hint
