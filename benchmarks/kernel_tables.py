"""The kernels that an execution provider of ONNX Runtime has, from the provider library itself.

    python benchmarks/kernel_tables.py cuda     # writes optimizers/kernels/cuda.json
    python benchmarks/kernel_tables.py cpu

The kernel registry of the installed wheel says op, versions and types; the schemas of its own ops
say which input has which type. What a registry does not tell through Python is which inputs and
outputs a kernel keeps in host memory (the shape that Reshape reads). So each op becomes a graph of
one node, and the session is asked where it wants its inputs and leaves its outputs.

The CUDA library answers on a machine without a GPU, too: the child process then runs on the
stand-ins of tests/null_gpu. onnxruntime-gpu is looked for in $ONNXPRESS_GPU_SITE, then in the
folder `gpu` of this environment; where neither is there, this environment's own wheel is asked.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import onnx
from onnxpress.optimizers import TARGETS

ROOT = Path(__file__).parent.parent
OPSET = max(target.opset for target in TARGETS.values())
# ONNX Runtime writes these for itself, after it has placed a graph.
INTERNAL = ("com.ms.internal.nhwc", "com.microsoft.nchwc", "MemcpyFromHost", "MemcpyToHost")
TYPES = ("float", "float16", "bfloat16", "double", "int32", "int64", "int8", "uint8", "bool")
PROVIDERS = {
    "cpu": ("CPUExecutionProvider", "onnxruntime"),
    "cuda": ("CUDAExecutionProvider", "onnxruntime-gpu"),
}
NAMES = {"float": "float32", "double": "float64"}
# An attribute that an op must have, by its type; every kernel takes one of these values.
FILL = {
    "INT": "{name} = 1",
    "INTS": "{name} = [1]",
    "FLOAT": "{name} = 1.0",
    "FLOATS": "{name} = [1.0]",
    "STRING": '{name} = "ab,bc->ac"',  # Einsum's
    "GRAPH": "{name} = b () => ({name}_y) {{ {name}_y = Constant<value = float {{1.0}}> () }}",
}

CHILD = """
import json, sys
import onnxruntime as ort
from onnxruntime.capi import _pybind_state as C

provider = sys.argv[1]
if len(sys.argv) == 2:
    schemas = [
        {"op": s.name, "domain": s.domain, "since": s.since_version,
         **{side: [[p.name, p.typeStr, p.option.name] for p in getattr(s, side)]
            for side in ("inputs", "outputs")},
         "types": {t.type_param_str: t.allowed_type_strs for t in s.type_constraints},
         "required": {n: a.type.name for n, a in s.attributes.items() if a.required}}
        for s in C.get_all_operator_schema()
    ]
    kernels = {}
    for k in C.get_all_opkernel_def():
        row = [k.domain, k.op_name, *k.version_range, k.type_constraints]
        kernels.setdefault(k.provider, []).append(row)
    print(json.dumps({"version": ort.__version__, "schemas": schemas, "kernels": kernels}))
else:
    def probe(path):
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        try:
            session = ort.InferenceSession(path, options, providers=[provider])
        except Exception as error:
            return str(error)
        # A node that was moved is no node to ask about memory.
        placed = {n.op_type: a.ep_name for a in session.get_provider_graph_assignment_info()
                  for n in a.get_nodes()}
        if set(placed.values()) != {provider}:
            return f"placed on {placed}"
        infos = session.get_input_memory_infos(), session.get_output_memory_infos()
        memory = [[i for i, m in enumerate(row) if "cpu" in m.name.lower()] for row in infos]
        return [memory, sorted(placed)]
    print(json.dumps([probe(path) for path in sys.argv[2:]]))
"""


def environment(provider: str) -> dict[str, str]:
    """The variables of the child process: of the null GPU, where it is needed and can be built."""
    site = Path(os.environ.get("ONNXPRESS_GPU_SITE") or Path(sys.prefix, "gpu"))
    if provider == "cpu" or not site.is_dir():
        return dict(os.environ)
    file = ROOT / "tests" / "null_gpu" / "build.py"
    spec = importlib.util.spec_from_file_location("null_gpu_build", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # The registry loads every provider of the wheel, TensorRT's with it.
    return {**os.environ, **module.build(site, common.CACHE / "null_gpu", tensorrt=True)}


def ask(env: dict[str, str], *args: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *args], env=env, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(
            f"the registry does not answer (exit code {done.returncode}): onnxruntime-gpu needs "
            f"CUDA and TensorRT, or gcc and readelf for their stand-ins\n{done.stderr[-2000:]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def plain(name: str) -> str:
    """`tensor(float)` -> float32, `seq(tensor(float))` -> seq(float32)."""
    if name.startswith("seq("):
        return f"seq({plain(name[4:-1])})"
    inner = name.removeprefix("tensor(").removesuffix(")")
    return NAMES.get(inner, inner)


def merged(rows: list[dict[str, list[str]]]) -> list[dict[str, list[str]]]:
    """Kernels that differ in the types of one variable become one with both."""
    rows = [{name: sorted(map(plain, types)) for name, types in row.items()} for row in rows]
    rows = sorted({json.dumps(row, sort_keys=True) for row in rows})
    done: list[dict[str, list[str]]] = []
    for row in map(json.loads, rows):
        for other in done:
            apart = [n for n in row if row[n] != other.get(n)]
            if row.keys() == other.keys() and len(apart) == 1:
                other[apart[0]] = sorted({*other[apart[0]], *row[apart[0]]})
                break
        else:
            done.append(row)
    return done


def table(rows: list[list[Any]]) -> dict[str, list[dict[str, Any]]]:
    """`domain::Op` (domain left out for ai.onnx) -> its kernels, oldest first."""
    grouped: dict[str, dict[tuple[int, int], list[Any]]] = defaultdict(lambda: defaultdict(list))
    for domain, op, first, last, types in rows:
        if domain not in INTERNAL and op not in INTERNAL:
            grouped[f"{domain}::{op}" if domain else op][first, last].append(types)
    return {
        op: [
            {"since": [first, None if last == 2**31 - 1 else last], "types": types}
            for (first, last), kernels in sorted(versions.items())
            for types in merged(kernels)
        ]
        for op, versions in sorted(grouped.items())
    }


def schema_of(op: str, schemas: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The schema of an op at OPSET, as ONNX Runtime knows it."""
    domain, name = op.split("::") if "::" in op else ("", op)
    known = [s for s in schemas if (s["op"], s["domain"]) == (name, domain)]
    known = [s for s in known if domain or s["since"] <= OPSET]
    return max(known, key=lambda s: s["since"], default=None)


def in_onnx(op: str) -> bool:
    """Whether the package onnx knows it: ONNX Runtime has ops of its own, some in ai.onnx too."""
    return "::" not in op and onnx.defs.has(op, "")


def signature(schema: dict[str, Any], kernels: list[dict[str, Any]]) -> dict[str, Any]:
    """Type variables of an op that the package onnx does not know; `*` repeats without end."""
    # A kernel may constrain a formal parameter by its own name instead of its type variable.
    named = {name for kernel in kernels for name in kernel["types"]}
    return {
        "since": schema["since"],
        **{
            side: [
                (name if name in named else var) + ("*" if option == "Variadic" else "")
                for name, var, option in schema[side]
            ]
            for side in ("inputs", "outputs")
        },
    }


def graphs(schema: dict[str, Any], kernel: dict[str, Any]) -> list[onnx.ModelProto]:
    """One node with all inputs and outputs, and one with those alone that it must have."""
    chosen: dict[str, str] = {}  # type variable -> one type of it, as ONNX text spells it
    for name, var, _ in schema["inputs"]:
        taken = kernel["types"].get(var) or kernel["types"].get(name)
        types = [t for t in schema["types"].get(var, [var]) if not taken or plain(t) in taken]
        first = next((t for t in ("tensor(float)", "tensor(float16)") if t in types), types[0])
        chosen[name] = chosen.get(var, first.replace("tensor(", "").replace(")", "[]", 1))
        chosen[var] = chosen[name]
    fill = [FILL[kind].format(name=name) for name, kind in schema["required"].items()]
    domain = f', "{schema["domain"]}" : {schema["since"]}' if schema["domain"] else ""
    found = []
    for every in (True, False):
        inputs = [
            (f"{name}_{copy}", chosen[name])
            for name, _, option in schema["inputs"]
            if every or option != "Optional"
            for copy in range(2 if option == "Variadic" else 1)
        ]
        outputs = [f"y{i}" for i, p in enumerate(schema["outputs"]) if every or p[2] != "Optional"]
        made, op = ", ".join(outputs), (schema["domain"] + "." if domain else "") + schema["op"]
        text = f"""<ir_version: 10, opset_import: ["" : {OPSET}{domain}]>
            g ({", ".join(f"{dtype} {name}" for name, dtype in inputs)}) => ({made}) {{
                {made} = {op}
                    {"<" + ", ".join(fill) + ">" if fill else ""}
                    ({", ".join(name for name, _ in inputs)})
            }}"""
        found.append(onnx.parser.parse_model(text))
    return found


def takes(kernel: dict[str, Any], since: int) -> bool:
    """ONNX Runtime's rule: a kernel without an end is for the version that it begins with."""
    first, last = kernel["since"]
    return first == since or (last is not None and first < since <= last)


def probed(
    provider: str, env: dict[str, str], asked: list[tuple[str, str, onnx.ModelProto]]
) -> Iterator[tuple[str, str, Any]]:
    """(op, label, answer) of each graph: memory and ops placed on the provider, or an error."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{i}.onnx") for i in range(len(asked))]
        for path, (_, _, graph) in zip(paths, asked, strict=True):
            onnx.save(graph, path)
        answers = ask(env, provider, *map(str, paths))
    for (op, label, _), answer in zip(asked, answers, strict=True):
        yield op, label, answer


def host_memory(
    provider: str,
    env: dict[str, str],
    ops: dict[str, list[dict[str, Any]]],
    schemas: dict[str, dict[str, Any]],
) -> tuple[dict[str, list[list[int]]], dict[str, str]]:
    """`op: [inputs, outputs]` in host memory; and why the other ops could not be asked."""
    asked = []
    for op in schemas:
        kernels = ops[op]
        kernel = next((k for k in reversed(kernels) if takes(k, schemas[op]["since"])), None)
        asked += [(op, "", graph) for graph in graphs(schemas[op], kernel)] if kernel else []
    host: dict[str, list[list[int]]] = {}
    mute: dict[str, str] = {}
    for op, _, answer in probed(provider, env, asked):
        if isinstance(answer, str):
            mute.setdefault(op, answer)
        elif sum(map(len, answer[0])) >= sum(map(len, host.get(op, ()))):
            host[op] = answer[0]
    mute = {op: why for op, why in mute.items() if op not in host}
    return {op: seen for op, seen in host.items() if any(seen)}, mute


def decomposed(
    provider: str, env: dict[str, str], schemas: list[dict[str, Any]]
) -> dict[str, list[str]]:
    """Ops that ONNX Runtime replaces by their bodies, and the types in which it places all of them.

    It does so where neither the provider nor the CPU has a kernel for the type.
    """
    asked = []
    for name in sorted({s.name for s in onnx.defs.get_all_schemas() if not s.domain}):
        known = onnx.defs.has(name, OPSET, "") and onnx.defs.get_schema(name, OPSET, "")
        schema = schema_of(name, schemas)
        if not known or schema is None:
            continue
        if known.has_function or known.has_context_dependent_function:
            for dtype in TYPES:
                types = {
                    var: [plain(dtype)]
                    for var, allowed in schema["types"].items()
                    if f"tensor({dtype})" in allowed
                }
                if types:
                    forms = graphs(schema, {"types": types})
                    asked += [(name, plain(dtype), form) for form in forms]
    # A body depends on which inputs there are: it has to be placed with all of them, and without.
    good: dict[tuple[str, str], bool] = {}
    for op, dtype, answer in probed(provider, env, asked):
        placed = not isinstance(answer, str) and op not in answer[1]
        good[op, dtype] = good.get((op, dtype), True) and placed
    return {
        op: [dtype for (name, dtype), placed in good.items() if placed and name == op]
        for op in sorted({op for (op, _), placed in good.items() if placed})
    }


def compact(content: dict[str, Any]) -> str:
    """JSON with one op a line."""
    parts = []
    for key, value in content.items():
        if isinstance(value, dict):
            rows = [f"  {json.dumps(op)}: {json.dumps(row)}" for op, row in value.items()]
            parts.append(f"{json.dumps(key)}: {{\n" + ",\n".join(rows) + "\n}")
        else:
            parts.append(f"{json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("provider", choices=PROVIDERS)
    name = parser.parse_args().provider
    provider, package = PROVIDERS[name]
    env = environment(name)
    said = ask(env, provider)
    if provider not in said["kernels"]:
        sys.exit(f"onnxruntime {said['version']} has no {provider}: see --help")
    ops = table(said["kernels"][provider])
    # Those without one are newer than OPSET; no graph of ours has them, so none is asked about.
    schemas = {op: schema for op in ops if (schema := schema_of(op, said["schemas"]))}
    host, mute = ({}, {}) if name == "cpu" else host_memory(provider, env, ops, schemas)
    for op, why in mute.items():
        print(f"{op}: {why.splitlines()[0][:160]}")
    content = {
        "source": f"{package} {said['version']}",
        "provider": provider,
        "opset": OPSET,
        "decomposed": decomposed(provider, env, said["schemas"]),
        "unasked": sorted(mute),
        "host": host,
        "signatures": {
            op: signature(schemas[op], kernels) for op, kernels in ops.items() if not in_onnx(op)
        },
        "ops": ops,
    }
    path = ROOT / "optimizers" / "kernels" / f"{name}.json"
    path.write_text(compact(content))
    common.finish(
        f"kernel_tables_{name}",
        {
            "source": content["source"],
            "ops": len(ops),
            "kernels": sum(map(len, ops.values())),
            "asked_about_memory": len(ops) - len(mute) if host else 0,
            "bytes": path.stat().st_size,
        },
    )


if __name__ == "__main__":
    main()
