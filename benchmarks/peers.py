"""The peers in int8.py: how each makes its model of PyTorch weights, and how it runs it.

Every one of them starts from the same directory in Hugging Face's form and calibrates on the same
texts, takes input_ids, attention_mask and token_type_ids, and gives the last hidden state. What is
made lies in a folder of its own as `model.*`. What a contestant needs is imported when it is asked
for, so that those that are not installed are only missing:

    pip install openvino nncf ctranslate2      # in a virtual environment of their own

SmoothQuant of ONNX Runtime is neural-compressor's before version 3, which asks for numpy 1 and runs
with numpy 2; the same environment holds it, so installed:

    pip install --no-deps 'neural-compressor<3' opencv-python-headless pycocotools
    pip install 'setuptools<80' deprecated pandas prettytable py-cpuinfo requests schema pillow
"""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np

THREADS = 2
LONGEST = 256  # tokens of a text: what all-MiniLM-L6-v2 takes
NAMES = ("input_ids", "attention_mask", "token_type_ids")
CALIBRATION = Path(__file__).parent.parent / "press" / "texts" / "calibration.jsonl"

Feeds = dict[str, np.ndarray]
Prepare = Callable[[Feeds], Callable[[], np.ndarray]]
"""Takes feeds, and gives what is timed: a run that returns the last hidden state."""


@dataclass(frozen=True)
class Case:
    """One model.

    Attributes:
        name: minilm, or bert-base with random weights.
        weights: Its directory in Hugging Face's form.
        folder: Where contestants put what they make, each in a folder of its own.
        examples: How many of the calibration texts are used.
    """

    name: str
    weights: Path
    folder: Path
    examples: int

    @property
    def trained(self) -> bool:
        """Whether its answers mean something: only then can drift decide about anything."""
        return self.name == "minilm"

    def texts(self) -> list[str]:
        """The texts that everyone calibrates on: those of press, for they are its default."""
        lines = CALIBRATION.read_text().splitlines()[: self.examples]
        return [json.loads(line)["text"] for line in lines]

    def calibration(self, *, padded: bool = False) -> list[Feeds]:
        """One text a run, without padding; or all `padded` to the longest."""
        if padded:
            together = tokenize(self.weights, self.texts())
            rows = range(len(together["input_ids"]))
            return [{n: a[i : i + 1] for n, a in together.items()} for i in rows]
        return [tokenize(self.weights, [text]) for text in self.texts()]


def tokenize(weights: Path, texts: Sequence[str]) -> Feeds:
    """One batch, padded on the right."""
    from onnxpress.runtime.tokenization import Tokenizer

    tokenizer = Tokenizer(weights, max_length=LONGEST)
    return tokenizer.pad(tokenizer.encode(texts))


def bert_base(folder: Path) -> None:
    """A BERT-base with random weights, and the tokenizer and the pooling of MiniLM."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    # CTranslate2 reads where positions come from, and transformers 5 no longer writes it.
    model = BertModel(BertConfig(position_embedding_type="absolute"))
    other = common.minilm()
    shutil.copytree(
        other, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json", ".*")
    )
    pooling = json.loads((other / "1_Pooling" / "config.json").read_text())
    pooling["word_embedding_dimension"] = model.config.hidden_size
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    model.save_pretrained(folder)


# ONNX Runtime ---------------------------------------------------------------------------------


def export(case: Case, folder: Path) -> dict[str, Any]:
    """What torch.onnx.export writes by default."""
    import torch

    model = torch_model(case)
    ids = torch.ones(2, 7, dtype=torch.int64)
    program = torch.onnx.export(
        model,
        kwargs={n: ids.clone() for n in NAMES},
        dynamic_shapes={n: {0: "batch", 1: "sequence"} for n in NAMES},
        dynamo=True,
        verbose=False,
    )
    program.save(str(folder / "model.onnx"))
    return {}


def ort_dynamic(case: Case, folder: Path) -> dict[str, Any]:
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(exported(case), folder / "model.onnx")
    return {}


def ort_static(case: Case, folder: Path) -> dict[str, Any]:
    """As it is by default: int8 activations, one scale a weight, every op that it knows."""
    from onnxruntime.quantization import quantize_static

    quantize_static(exported(case), folder / "model.onnx", reader(case))
    return {}


def ort_static_best(case: Case, folder: Path, **extra: Any) -> dict[str, Any]:
    """The settings that drift least and run fastest: linear layers only, uint8 by int8.

    Its SmoothQuant, which is neural-compressor's, stacks activations: texts of one length.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = str(folder / "prepared.onnx")  # neural-compressor takes no Path
    # Symbolic shape inference does not read what torch exports; the exporter wrote the shapes.
    quant_pre_process(exported(case), prepared, skip_symbolic_shape=True)
    graph = onnx.load(prepared).graph
    weights = {w.name for w in graph.initializer}
    quantize_static(
        prepared,
        folder / "model.onnx",
        reader(case, padded="SmoothQuant" in extra),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
        nodes_to_exclude=[
            n.name
            for n in graph.node
            if n.op_type == "MatMul" and n.input[1] not in weights  # between activations
        ],
        # Else it rounds what a MatMul gives once more, before the bias is added.
        extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul"], **extra},
    )
    Path(prepared).unlink()
    return {}


def ort_static_smooth(case: Case, folder: Path) -> dict[str, Any]:
    return ort_static_best(case, folder, SmoothQuant=True, SmoothQuantAlpha=0.7)


def exported(case: Case) -> Path:
    return case.folder / "ort-fp32" / "model.onnx"


def reader(case: Case, *, padded: bool = False) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rows = iter(case.calibration(padded=padded))

        def get_next(self) -> Feeds | None:
            return next(self.rows, None)

        # SmoothQuant copies its reader, and iterators of lists can be copied.
        def __iter__(self) -> Iterator[Feeds]:
            return self.rows

    return Reader()


def open_ort(case: Case, folder: Path) -> Prepare:
    import onnxruntime as rt

    options = rt.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.log_severity_level = 4
    session = rt.InferenceSession(
        folder / "model.onnx", options, providers=["CPUExecutionProvider"]
    )
    names = [i.name for i in session.get_inputs()]

    def prepare(feeds: Feeds) -> Callable[[], np.ndarray]:
        given = {n: feeds[n] for n in names}
        return lambda: session.run(None, given)[0]

    return prepare


# OpenVINO -------------------------------------------------------------------------------------


def openvino(case: Case, folder: Path) -> dict[str, Any]:
    import openvino as ov
    import torch

    model = torch_model(case)

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            return self.model(input_ids, attention_mask, token_type_ids).last_hidden_state

    ids = torch.ones(2, 7, dtype=torch.int64)
    converted = ov.convert_model(Encoder(), example_input={n: ids.clone() for n in NAMES})
    ov.save_model(converted, folder / "model.xml", compress_to_fp16=False)
    return {}


def nncf(case: Case, folder: Path) -> dict[str, Any]:
    """Post-training quantization with the preset for Transformers, which smooths too."""
    import nncf as tool
    import openvino as ov

    tool.set_log_level(logging.ERROR)
    rows = case.calibration()
    model = ov.Core().read_model(case.folder / "openvino-fp32" / "model.xml")
    quantized = tool.quantize(
        model, tool.Dataset(rows), model_type=tool.ModelType.TRANSFORMER, subset_size=len(rows)
    )
    ov.save_model(quantized, folder / "model.xml", compress_to_fp16=False)
    return {}


def open_openvino(case: Case, folder: Path, precision: str = "f32") -> Prepare:
    import openvino as ov

    settings = {
        "INFERENCE_NUM_THREADS": THREADS,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
    }
    request = ov.Core().compile_model(folder / "model.xml", "CPU", settings).create_infer_request()

    def prepare(feeds: Feeds) -> Callable[[], np.ndarray]:
        return lambda: request.infer(feeds, share_inputs=True, share_outputs=True)[0]

    return prepare


def open_openvino_bf16(case: Case, folder: Path) -> Prepare:
    return open_openvino(case, folder, "bf16")


# CTranslate2 and PyTorch ----------------------------------------------------------------------


def ctranslate2(case: Case, folder: Path) -> dict[str, Any]:
    from ctranslate2.converters import TransformersConverter

    converter = TransformersConverter(str(case.weights))
    converter.convert(str(folder), quantization="int8", force=True)
    return {}


def open_ctranslate2(case: Case, folder: Path) -> Prepare:
    import ctranslate2 as ct2

    encoder = ct2.Encoder(str(folder), device="cpu", intra_threads=THREADS, compute_type="int8")

    def prepare(feeds: Feeds) -> Callable[[], np.ndarray]:
        ids, mask, _ = (feeds[n].astype(np.int32) for n in NAMES)
        given = ct2.StorageView.from_array(ids), ct2.StorageView.from_array(mask.sum(1, np.int32))
        return lambda: np.asarray(encoder.forward_batch(*given).last_hidden_state)

    return prepare


def torch_model(case: Case, dtype: str = "float32") -> Any:
    import torch
    from transformers import AutoModel

    return AutoModel.from_pretrained(
        case.weights, add_pooling_layer=False, dtype=getattr(torch, dtype)
    ).eval()


def open_torch(case: Case, folder: Path, dtype: str = "float32") -> Prepare:
    import torch

    torch.set_num_threads(THREADS)
    model = torch_model(case, dtype)

    def prepare(feeds: Feeds) -> Callable[[], np.ndarray]:
        given = {n: torch.from_numpy(feeds[n]) for n in NAMES}

        def run() -> np.ndarray:
            with torch.inference_mode():
                return model(**given).last_hidden_state.float().numpy()

        return run

    return prepare


def open_torch_bf16(case: Case, folder: Path) -> Prepare:
    return open_torch(case, folder, "bfloat16")


# All of them ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contestant:
    """How a contestant makes its model and runs it.

    Attributes:
        make: Writes `model.*` into a folder, and says what is worth knowing; None where the
            contestant runs what another one made, or the weights themselves.
        open: Gets ready to run it.
        after: A contestant whose files it needs; where it makes none itself, the folder it opens.
        needs: Modules that are no part of onnxpress's own environment, with what installs them.
    """

    make: Callable[[Case, Path], dict[str, Any]] | None
    open: Callable[[Case, Path], Prepare]
    after: str = ""
    needs: tuple[tuple[str, str], ...] = ()

    def missing(self) -> str:
        """What to install first; empty where nothing is missing."""
        gone = [pip for module, pip in self.needs if importlib.util.find_spec(module) is None]
        return f"not installed: pip install {' '.join(gone)}" if gone else ""

    def folder(self, name: str, case: Case) -> Path:
        """Where its `model.*` lies."""
        if self.make is None:
            return case.folder / self.after if self.after else case.weights
        return case.folder / name


OPENVINO, NNCF = ("openvino", "openvino"), ("nncf", "nncf")
COMPRESSOR = ("neural_compressor", "--no-deps 'neural-compressor<3' (see benchmarks/peers.py)")
CTRANSLATE2 = ("ctranslate2", "ctranslate2")
EXACT = "torch-fp32"
PEERS = {
    "ort-fp32": Contestant(export, open_ort),
    "ort-dynamic": Contestant(ort_dynamic, open_ort, "ort-fp32"),
    "ort-static": Contestant(ort_static, open_ort, "ort-fp32"),
    "ort-static-best": Contestant(ort_static_best, open_ort, "ort-fp32"),
    "ort-static-smooth": Contestant(ort_static_smooth, open_ort, "ort-fp32", (COMPRESSOR,)),
    "openvino-fp32": Contestant(openvino, open_openvino, "", (OPENVINO,)),
    "openvino-bf16": Contestant(None, open_openvino_bf16, "openvino-fp32", (OPENVINO,)),
    "openvino-int8": Contestant(nncf, open_openvino, "openvino-fp32", (OPENVINO, NNCF)),
    "openvino-int8-bf16": Contestant(None, open_openvino_bf16, "openvino-int8", (OPENVINO, NNCF)),
    "ctranslate2-int8": Contestant(ctranslate2, open_ctranslate2, "", (CTRANSLATE2,)),
    EXACT: Contestant(None, open_torch),
    "torch-bf16": Contestant(None, open_torch_bf16),
}
