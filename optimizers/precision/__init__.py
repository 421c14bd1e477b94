"""Less precision, and less of the model: what changes the numbers, and is held to a gate.

These passes take what they have to know as arguments: data is looked at before, by functions that
are handed a way to run a graph. press/ watches what they cost.

    layers.py                 the linear layers of a base graph, and their names
    split_gemm.py             Gemm to MatMul and Add, so that a layer has one form
    observe.py                activations on calibration data; calibrators.py finds their ranges
    learn_int8.py             all that static int8 has to learn, in one call
    smooth_activations.py     outliers of activations into weights (SmoothQuant)
    compensate_weights.py     rounding whose errors cancel (GPTQ)
    quantize_static.py        QuantizeLinear, DequantizeLinear; simulate.py does it in numpy
    quantize_dynamic.py       scales of activations at run time
    quantize_embeddings.py    int8 tables
    quantized.py              whether someone did it before
    convert_floats.py         fp16, bf16: types from node to node, by float_plan, float_rules and
                              float_ranges
    overflow.py               what a 16-bit type is too narrow for
    emulate_floats.py         a 16-bit graph in float32, to check it where it has no kernels
    importance.py             how much heads, columns and weights matter
    prune_heads.py, prune_feed_forward.py    removed, with what reads them: channels, removal
    mask_weights.py           zeros, in 2:4 for sparse tensor cores
"""
