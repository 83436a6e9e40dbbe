"""transformers on PyTorch: TTFT, TPOT and the prompt's last logits, f32, scaled_dot_product_attention.

    python pytorch.py DIR PROMPT STEPS LOGITS.f32

One JSON line.
"""

import json
import sys
import time

import torch
import transformers


def main():
    directory, prompt, steps, out = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    vocab = model.config.vocab_size
    tokens = torch.arange(prompt)[None] * 7919 % vocab

    @torch.inference_mode()
    def turn():
        start = time.perf_counter()
        output = model(tokens, use_cache=True, logits_to_keep=1)
        ttft = time.perf_counter() - start
        logits, cache, times = output.logits[0, -1], output.past_key_values, []
        for step in range(steps):
            token = torch.tensor([[(step + 1) % vocab]])
            start = time.perf_counter()
            model(token, past_key_values=cache, use_cache=True)
            times.append(time.perf_counter() - start)
        return ttft, sorted(times)[steps // 2], logits

    turn()
    ttft, tpot, logits = turn()
    logits.numpy().astype("<f4").tofile(out)
    name = f"PyTorch {torch.__version__}, transformers {transformers.__version__}"
    print(json.dumps({"name": name, "ttft_s": ttft, "tpot_s": tpot}))


if __name__ == "__main__":
    main()
