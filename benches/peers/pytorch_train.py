"""PyTorch's training on a CPU beside `cargo bench --bench training`: a random Qwen3 of transformers, whose
architecture the decoder's is, f32, scaled_dot_product_attention; forward, backward, clipping, AdamW.

    python pytorch_train.py LAYERS,HIDDEN,HEADS,KV_HEADS,HEAD_DIM,FFN,VOCAB CONTEXT BATCH STEPS

One JSON line; tokens/s of the median step, of which the first two do not count.
"""

import json
import statistics
import sys
import time

import torch
import transformers

from qwen3 import config_of


def main():
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    shape, context, batch, steps = sys.argv[1], *map(int, sys.argv[2:5])
    config = config_of(shape, max_position_embeddings=context, tie_word_embeddings=True)
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    times = []
    for _ in range(steps + 2):
        tokens = torch.randint(config.vocab_size, (batch, context))
        start = time.perf_counter()
        model(tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    name = f"PyTorch {torch.__version__}, transformers {transformers.__version__}"
    rate = batch * context / statistics.median(times[2:])
    print(json.dumps({"name": name, "tokens_per_s": round(rate)}))


if __name__ == "__main__":
    main()
