"""PyTorch on a GPU beside the crate's benches there: a random Qwen3 of transformers, whose architecture
the decoder's is, by scaled_dot_product_attention.

    python pytorch_gpu.py infer bf16|f32 LAYERS,HIDDEN,HEADS,KV_HEADS,HEAD_DIM,FFN,VOCAB PROMPT,… STEPS
    python pytorch_gpu.py train bf16|f32 SHAPE CONTEXT,… STEPS

One JSON line per prompt or context. Each is run once before it counts; figures are medians.
"""

import json
import statistics
import sys
import time

import torch
import transformers

from qwen3 import config_of


def model_of(shape, dtype):
    config = config_of(shape, max_position_embeddings=1 << 17, tie_word_embeddings=False)
    torch.set_default_dtype(dtype)
    # TF32, as Burn's products are.
    torch.set_float32_matmul_precision("high")
    with torch.device("cuda"):
        return transformers.Qwen3ForCausalLM(config), config.vocab_size


@torch.inference_mode()
def infer(model, vocab, prompt, steps):
    tokens = torch.arange(prompt, device="cuda")[None] * 7919 % vocab

    def turn():
        torch.cuda.synchronize()
        start = time.perf_counter()
        output = model(tokens, use_cache=True, logits_to_keep=1)
        output.logits.max().item()
        ttft, cache, times = time.perf_counter() - start, output.past_key_values, []
        for step in range(steps):
            token = torch.tensor([[(step + 1) % vocab]], device="cuda")
            start = time.perf_counter()
            model(token, past_key_values=cache, use_cache=True).logits.max().item()
            times.append(time.perf_counter() - start)
        return ttft, statistics.median(times)

    turn()
    ttfts, tpots = zip(*(turn() for _ in range(3)))
    return {"prompt": prompt, "ttft_ms": 1e3 * statistics.median(ttfts), "tpot_ms": 1e3 * statistics.median(tpots)}


def train(model, vocab, context, steps):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    tokens = torch.arange(context, device="cuda")[None] * 7919 % vocab
    times = []
    for _ in range(steps + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        model(tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return {"context": context, "tokens_per_s": context / statistics.median(times[1:])}


def main():
    what, dtype, shape, sizes, steps = sys.argv[1:]
    model, vocab = model_of(shape, {"bf16": torch.bfloat16, "f32": torch.float32}[dtype])
    for size in map(int, sizes.split(",")):
        figures = {"infer": infer, "train": train}[what](model, vocab, size, int(steps))
        name = f"PyTorch {torch.__version__}, transformers {transformers.__version__}, {dtype}"
        print(json.dumps({"name": name, "device": torch.cuda.get_device_name()} | figures), flush=True)


if __name__ == "__main__":
    main()
