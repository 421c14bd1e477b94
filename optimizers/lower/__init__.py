"""Passes that write the form which one target runs fastest, and which its kernels take.

rules.py                            running rewrite rules, and hearing why they declined
fuse_embedding.py                   -> com.microsoft.EmbedLayerNormalization
pack_attention.py                   -> com.microsoft.Attention
fuse_skip_layer_normalization.py    -> com.microsoft.SkipLayerNormalization
fuse_bias_gelu.py                   -> com.microsoft.BiasGelu, FastGelu
fuse_group_query_attention.py       -> com.microsoft.GroupQueryAttention, one shared cache
    decoder_layers.py               the layers that keep a cache
    decoder_masks.py                what a mask hides, by trying it
    formulas.py                     a part of a graph, computed on numbers
fuse_integer_matmul.py              -> com.microsoft.MatMulIntegerToFloat, of constant scales
fuse_dynamic_matmul.py              -> the same, of scales at run time
soften_attention_mask.py            keep the lowest float out of masks
expand_attention_mask.py            give masks a row for each query
split_attention_heads.py            heads as a dimension
expand_rotary_cache.py              give caches a row for each text
read_sizes_whole.py                 no arithmetic with sizes, which lie on the host
skip_empty_masks.py                 Attention without a mask that hides nothing
"""
