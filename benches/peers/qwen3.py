"""A random Qwen3 of transformers, whose architecture the decoder's is."""

import transformers


def config_of(shape, **more):
    """Of LAYERS,HIDDEN,HEADS,KV_HEADS,HEAD_DIM,FFN,VOCAB; `more` is what else Qwen3Config takes."""
    layers, hidden, heads, kv_heads, head_dim, ffn, vocab = map(int, shape.split(","))
    return transformers.Qwen3Config(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=ffn,
        vocab_size=vocab,
        attn_implementation="sdpa",
        **more,
    )
