"""What a graph is lowered for. The target is data: no pass compares a provider's name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Target:
    """One execution provider, as the passes see it.

    Attributes:
        name: What the user writes after `--target`.
        provider: The execution provider's name in ONNX Runtime.
        precision: What a graph for it is going to be: one of `precisions`.
        opset: The ai.onnx opset of the graph.
        ops: The ops outside ai.onnx that a pass may write, as `domain::Op`.
        broadcasts_attention_mask: Whether the Attention kernel stretches a mask whose query
            dimension is 1. Where False, `expand_attention_mask` writes the Expand.
        disabled_optimizers: ONNX Runtime's own optimizers that would undo the form written here.
        broadcasts_rotary_cache: Whether the RotaryEmbedding kernel stretches a cache of batch 1.
            Where False, `expand_rotary_cache` writes the Expand.
        precisions: What a model can be made into for it, in the order in which `auto` tries them.
        quantized: What static int8 makes of its activations: "uint8" with a zero point, or "int8"
            without; None where it has no integer kernels for them.
        reads_lowest_float: Whether the Attention kernel tells the lowest float in a mask from
            -inf. Where False, `soften_attention_mask` writes a higher one.
        skips_empty_masks: Whether Attention is faster without a mask, and an If costs next to
            nothing. Where True, `skip_empty_masks` writes both forms, and which of them to take.
        decomposes: Ops of ai.onnx that it lacks, and that are written in smaller ones.
        takes_bfloat16: Whether a graph may hold bfloat16, as scales of int8 tables do.
        reserved_names: Names of values that mean something to it.
        heads_apart: Whether its Attention takes Q, K and V of rank 4 alone.
        padding: Where masks of padding are known to pad: "right", with a token in every row, lets
            kernels count keys in the place of masks.
        shares_cache: The precisions in which it has GroupQueryAttention, which appends to a cache
            in place. In these, `fuse_group_query_attention` changes the signature of decoders.
        sizes_on_host: Whether sizes lie in another memory than tensors, and what computes with
            them runs on the host. Where True, `read_sizes_whole` leaves nothing to compute.
    """

    name: str
    provider: str
    precision: str
    opset: int
    ops: frozenset[str] = frozenset()
    broadcasts_attention_mask: bool = False
    broadcasts_rotary_cache: bool = False
    reads_lowest_float: bool = False
    skips_empty_masks: bool = False
    sizes_on_host: bool = False
    shares_cache: tuple[str, ...] = ()
    heads_apart: bool = False
    padding: Literal["any", "right"] = "any"
    disabled_optimizers: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ("fp32",)
    quantized: Literal["uint8", "int8"] | None = None
    decomposes: frozenset[str] = frozenset()
    takes_bfloat16: bool = True
    reserved_names: frozenset[str] = frozenset()


# TensorRT picks importers by op type and ignores the domain, so its `ops` stays empty for good.
# False is the safe answer about masks: an Expand is right everywhere, a lack of it is not.
TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            "cpu",
            "CPUExecutionProvider",
            "fp32",
            23,
            # Kept short on purpose: SkipLayerNormalization and BiasGelu lose on this provider.
            ops=frozenset(
                {
                    "com.microsoft::GroupQueryAttention",
                    "com.microsoft::MatMulIntegerToFloat",
                    "com.microsoft::MatMulNBits",
                }
            ),
            disabled_optimizers=("BiasGeluFusion", "SkipLayerNormFusion"),
            precisions=("fp32", "int8", "int8-dynamic", "fp16"),
            quantized="uint8",
            skips_empty_masks=True,
        ),
        Target(
            "cuda",
            "CUDAExecutionProvider",
            "fp32",
            23,
            ops=frozenset(
                {
                    "com.microsoft::Attention",
                    "com.microsoft::BiasGelu",
                    "com.microsoft::EmbedLayerNormalization",
                    "com.microsoft::FastGelu",
                    "com.microsoft::GroupQueryAttention",
                    "com.microsoft::SkipLayerNormalization",
                }
            ),
            precisions=("fp32", "fp16", "bf16"),
            sizes_on_host=True,
            shares_cache=("fp16", "bf16"),
        ),
        Target(
            "tensorrt",
            "TensorrtExecutionProvider",
            "fp32",
            23,
            precisions=("fp32", "fp16", "bf16", "int8"),
            quantized="int8",
            heads_apart=True,
        ),
        # bf16 is an option of its session, not a type in the graph; the lowest float is -inf there.
        Target(
            "openvino",
            "OpenVINOExecutionProvider",
            "fp32",
            23,
            broadcasts_attention_mask=True,
            precisions=("fp32", "int8", "bf16"),
            quantized="uint8",
            decomposes=frozenset({"Attention", "RMSNormalization", "RotaryEmbedding"}),
            takes_bfloat16=False,
            reserved_names=frozenset({"axes"}),
        ),
    )
}
