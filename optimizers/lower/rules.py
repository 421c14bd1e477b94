"""Running rewrite rules, and hearing why they declined."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript.rewriter import MatchingTracer, MatchResult, MatchStatus, RewriteRuleClassBase
from onnxscript.rewriter.pattern import RewriteRuleSet

from ..outcome import Outcome, describe


class _Declined(MatchingTracer):
    """Collects the matches that a rule's own check declined; with a tracer nothing is rewritten."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: dict[ir.Node, str] = {}

    def log(
        self,
        rule: object,
        container: ir.Graph | ir.Function,
        node: ir.Node,
        match_result: MatchResult,
        status: MatchStatus,
    ) -> None:
        if status == MatchStatus.CONDITION_FAILED:
            self.notes[node] = f"{describe(node)}: {match_result.reason}"


def fuse(model: ir.Model, rules: Sequence[type[RewriteRuleClassBase]]) -> Outcome:
    """Apply the rules until none of them matches; the notes say what they declined."""
    rule_set = RewriteRuleSet([rule.rule() for rule in rules])  # type: ignore[no-untyped-call]
    hits = rule_set.apply_to_model(model)
    if hits:
        common.RemoveUnusedNodesPass()(model)
        common.TopologicalSortPass()(model)  # a rule with two outputs may leave them out of order
        common.NameFixPass()(model)
    declined = _Declined()
    rule_set.apply_to_model(model, tracer=declined)
    return Outcome(model, bool(hits), hits=hits, notes=tuple(declined.notes.values()))
