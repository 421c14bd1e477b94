"""inspect: what an artifact is, and what was done to it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from .. import artifact
from ..errors import MissingPackage, ProviderError, UsageError
from . import show


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path())
@click.option("--fusions", is_flag=True, help="Which layers are fused, and why others are not.")
@click.option("--passes", is_flag=True, help="Each pass: ops added and removed, hits, time.")
@click.option("--precision", is_flag=True,
              help="Each layer: its precision, its sensitivity, why it is in float.")  # fmt: skip
@click.option("--placement", is_flag=True,
              help="Nodes per provider, copies, and the attention kernels chosen.")  # fmt: skip
@click.option("--provider", metavar="NAME,...",
              help="With --placement: other providers than the artifact is for.")  # fmt: skip
@show.json_option
def inspect(
    directory: str,
    fusions: bool,
    passes: bool,
    precision: bool,
    placement: bool,
    provider: str | None,
    as_json: bool,
) -> None:
    """Show DIR: its signature, op counts and placement, and what was done to it."""
    manifest = artifact.read_manifest(directory)
    artifact.check_files(directory, manifest, hashes=False)
    if provider and not placement:
        raise UsageError("--provider goes with --placement")
    if placement:
        placed = _placed(directory, provider)
        show.json_line(placed) if as_json else _tell_placed(placed)
        return
    if fusions or passes or precision:
        asked: dict[str, Any] = {"fusions": manifest.fusions} if fusions else {}
        asked |= {"passes": _timed(manifest, directory)} if passes else {}
        asked |= {"precision": with_times(manifest, directory)} if precision else {}
        show.json_line(asked) if as_json else _tell(asked)
        return
    counts_by_provider = _placement(directory)
    if as_json:
        show.json_line({**asdict(manifest), "placement": counts_by_provider})
        return
    source, parity = manifest.source, manifest.parity or {}
    click.echo(f"task       {manifest.task}")
    click.echo(f"source     {source['spec']} (weights {source['weights_sha256'][:12]})")
    click.echo("target     " + ", ".join(f"{k} {v}" for k, v in manifest.target.items()))
    for side in ("inputs", "outputs"):
        specs = getattr(manifest, side)
        shown = [*specs[:6], *([f"... {len(specs) - 6} more"] if len(specs) > 6 else [])]
        for i, spec in enumerate(shown):
            click.echo(f"{side if not i else '':10} {spec}")
    if manifest.precision:
        tell_gate(manifest.precision)
    if parity:
        worst = max((float(v) for v in parity["max_abs"].values()), default=0.0)
        verdict = "passed" if parity["passed"] else "DRIFT ALLOWED: " + parity["worst"]
        click.echo(
            f"parity     {len(parity['points'])} points against {parity['reference']}, "
            f"max |difference| {worst:.1e}, {verdict}"
        )
    click.echo(
        "placement  " + ("; ".join(f"{k}: {v} nodes" for k, v in counts_by_provider.items()))
    )
    for note in source.get("notes", []):
        click.echo(f"note       {note}")
    click.echo()
    counts = sorted(manifest.ops.items(), key=lambda item: (-item[1], item[0]))
    show.table(counts, ("op", "count"))
    click.echo()
    _tell({"fusions": manifest.fusions, "passes": _timed(manifest, directory)})


def _tell(asked: dict[str, Any]) -> None:
    """The tables of `--fusions`, `--passes` and `--precision`."""
    if "fusions" in asked:
        _tell_fusions(asked["fusions"])
    if "passes" in asked:
        if "fusions" in asked:
            click.echo()
        rows = [
            (
                p["name"],
                "yes" if p["changed"] else "no",
                p.get("hits", 0) or "",
                "" if p["ms"] is None else f"{p['ms']:.1f}",
                _delta(p["ops"]),
                "; ".join(p["notes"]),
            )
            for p in asked["passes"]
        ]
        show.table(rows, ("pass", "changed", "hits", "ms", "ops", "notes"))
    if "precision" in asked:
        if len(asked) > 1:
            click.echo()
        _tell_precision(asked["precision"])


def _tell_precision(precision: dict[str, Any] | None) -> None:
    if precision is None:
        click.echo("precision  as it was exported: nothing was quantized, converted or pruned")
        return
    tell_gate(precision)
    if precision["candidates"]:
        click.echo()
        tell_candidates(precision["candidates"])
    rows = [
        (
            layer["name"],
            layer["precision"],
            "" if layer["sensitivity"] is None else f"{float(layer['sensitivity']):.1e}",
            layer["alpha"] or "",
            layer["reason"],
        )
        for layer in precision["layers"]
    ]
    if rows:
        click.echo()
        show.table(rows, ("layer", "precision", "sensitivity", "alpha", "why it is in float"))


def _tell_fusions(fusions: list[dict[str, Any]] | None) -> None:
    if fusions is None:
        click.echo("fusions    not recorded; optimize the artifact to see them")
        return
    if not fusions:
        click.echo("fusions    it has no layer of a kind that is fused")
        return
    rows = [(f["kind"], f["fused"], f["lifted"], len(f["missed"])) for f in fusions]
    show.table(rows, ("layer", "fused", "lifted", "missed"))
    missed = [(f["kind"], m["node"], m["reason"]) for f in fusions for m in f["missed"]]
    if missed:
        click.echo()
        show.table(missed, ("missed", "node", "reason"))


def _timed(manifest: artifact.Manifest, directory: str) -> list[dict[str, Any]]:
    """The passes with the milliseconds that measured.json has for them, or null.

    Times differ from run to run, so the manifest has none; and nobody vouches for that file.
    """
    try:
        times = [(str(p["name"]), float(p["ms"])) for p in _measured(directory)["passes"]]
    except (ValueError, TypeError, LookupError):
        times = []
    if [name for name, _ in times] != [p["name"] for p in manifest.passes]:
        return [{**p, "ms": None} for p in manifest.passes]
    return [{**p, "ms": ms} for p, (_, ms) in zip(manifest.passes, times, strict=True)]


def _measured(directory: str) -> dict[str, Any]:
    """What measured.json says; nothing where it cannot be read."""
    try:
        text = (Path(directory) / artifact.MEASURED).read_text(encoding="utf-8")
        found = json.loads(text)
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def with_times(manifest: artifact.Manifest, directory: str) -> dict[str, Any] | None:
    """The manifest's `precision`, its candidates with the `ms` by shape that were measured."""
    if manifest.precision is None:
        return None
    try:
        times = {str(c["name"]): dict(c["ms"]) for c in _measured(directory)["candidates"]}
    except (ValueError, TypeError, LookupError):
        times = {}
    tried = [{**c, "ms": times.get(c["name"], {})} for c in manifest.precision["candidates"]]
    return {**manifest.precision, "candidates": tried}


def tell_gate(precision: dict[str, Any]) -> None:
    """What the gate saw, in a few lines."""
    drift, layers = precision["drift"], precision["layers"]
    verdict = "passed" if drift["passed"] else f"DRIFT ALLOWED: {drift['why']}"
    extra = ", ".join(f"{k} {v}" for k, v in drift["extra"].items())
    click.echo(
        f"precision  {precision['precision']}: {drift['metric']} {drift['mean']} on average, "
        f"{drift['worst']} at worst, budget {drift['budget']}; {verdict}"
    )
    judged = precision["eval"]
    click.echo(f"judged on  {judged['examples']} examples, {judged['from']}; {extra}")
    kept = [layer["name"] for layer in layers if layer["precision"] == "fp32"]
    if layers and precision["precision"] != "fp32":
        names = f": {', '.join(kept[:6])}{' ...' if kept[6:] else ''}" if kept else ""
        click.echo(f"in float   {len(kept)} of {len(layers)} layers{names}")


def tell_candidates(candidates: list[dict[str, Any]]) -> None:
    """The table that the choice was made from."""
    shapes = list(dict.fromkeys(shape for c in candidates for shape in c["ms"]))
    rows = [
        (
            ("* " if c["kept"] else "  ") + c["name"],
            "" if c["drift"] is None else c["drift"],
            "yes" if c["passed"] else "no",
            "" if c["bytes"] is None else f"{c['bytes'] / 1e6:.1f}",
            *(c["ms"].get(shape, "") for shape in shapes),
            c["why"],
        )
        for c in candidates
    ]
    times = (f"{shape} ms" for shape in shapes)
    show.table(rows, ("  candidate", "drift", "passed", "MB", *times, "why not"))


def _placed(directory: str, provider: str | None) -> dict[str, Any]:
    """Where the nodes lie when they may lie anywhere, as one value for JSON."""
    from ..runtime import Session
    from ..runtime.attention_kernels import attention_kernels

    session = Session(directory, provider=provider, allow_fallback=True)
    found = session.placement()
    elsewhere = [asdict(n) for n in session.elsewhere()]
    kernels = None if elsewhere else attention_kernels(directory, session.provider)
    return {
        "provider": session.provider,
        "nodes": found.counts,
        "memcpy": found.memcpy,
        "elsewhere": elsewhere,
        "kernels": None if kernels is None else [asdict(k) for k in kernels],
    }


def _tell_placed(placed: dict[str, Any]) -> None:
    nodes = "; ".join(f"{k}: {v} nodes" for k, v in placed["nodes"].items())
    memcpy = "unknown" if placed["memcpy"] is None else placed["memcpy"]
    click.echo(f"placement  {nodes}\nmemcpy     {memcpy}")
    if placed["elsewhere"]:
        click.echo(f"elsewhere  {len(placed['elsewhere'])} nodes not on {placed['provider']}")
        rows = [
            (n["op"], n["name"], ", ".join(n["dtypes"]), n["provider"], n["why"])
            for n in placed["elsewhere"]
        ]
        show.table(rows, ("op", "node", "dtypes", "provider", "why"))
        click.echo("kernels    not asked for: nodes lie elsewhere")
    elif placed["kernels"] is None:
        click.echo("kernels    not reported by this provider")
    elif not placed["kernels"]:
        click.echo("kernels    no attention node ran")
    else:
        chosen = [(k["op"], k["node"], k["dtype"], k["kernel"]) for k in placed["kernels"]]
        show.table(chosen, ("attention", "node", "dtype", "kernel"))


def _placement(directory: str) -> dict[str, int]:
    from .. import runtime

    try:
        return dict(runtime.Session(directory).placement().counts)
    except MissingPackage as e:
        return {f"unknown ({e.hint})": 0}
    except ProviderError as e:  # lowered for another provider
        return {f"unknown ({e.what})": 0}


def _delta(ops: dict[str, int]) -> str:
    return " ".join(f"{name}{count:+d}" for name, count in sorted(ops.items()))


COMMANDS = (inspect,)
