"""What transformers makes of SmolLM2-135M-Instruct: greedy continuations and perplexity, in f32.

    python tests/reference/smollm2.py MODEL --out DIR [--text FILE] [--tokens 32768]

MODEL is a directory in the hub's layout (config.json, model.safetensors, tokenizer.json). Eager
attention, f32 throughout. Writes to DIR:

greedy.json: per prompt its text, `prompt` and `continuation` as token ids (64, of the largest
  logit, also past an end of text; `eos_at` is where the first one stands, or null), `gaps`
  between the two largest logits at each step, `smallest_gap`, and `scale`, the largest magnitude
  of any logit on the way. Steps are taken with transformers' cache; a pass over the whole
  sequence must agree on every token whose gap is above 1e-4 of the scale.
greedy.safetensors: `first`, [prompts, vocab], the logits after each prompt.
perplexity.json: the sums and perplexities; `windows` is how the text was cut.
perplexity.safetensors: `tokens` (I64) of the text, as far as scored, and `nll` (F64), one for each
  token: -ln p(token | the tokens before it in its window), 0 for a window's first token.

The text is tokenised as a whole, without special tokens. Windows of 512 tokens follow each other
without overlap, each computed by itself from position 0. In every window all tokens but the first
are scored: 511 of 512. Perplexity is exp(sum of nll / tokens scored). A last window shorter than
512 is scored alike.
"""
import argparse
import json
import time
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

CONTEXT = 512
STEPS = 64
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n    ",
    "Water boils at 100 degrees Celsius because",
    "1, 1, 2, 3, 5, 8,",
    "Dear Sir or Madam,\n\nI am writing to",
    "Le chat est assis sur",
    "The three laws of thermodynamics are:\n1.",
]
CHATS = [
    [{"role": "user", "content": "What is gravity?"}],
    [
        {"role": "system", "content": "You answer in one short sentence."},
        {"role": "user", "content": "Name a river in Germany."},
        {"role": "assistant", "content": "The Rhine."},
        {"role": "user", "content": "And one in Egypt?"},
    ],
]


@torch.no_grad()
def greedy(model, ids, ends):
    """The continuation and what is to be known to compare with it."""
    out = model(input_ids=torch.tensor([ids]), use_cache=True)
    state, logits = out, out.logits[0, -1]
    first, tokens, gaps, scale = logits.clone(), [], [], 0.0
    for _ in range(STEPS):
        top = logits.topk(2)
        tokens.append(int(top.indices[0]))
        gaps.append(float(top.values[0] - top.values[1]))
        scale = max(scale, float(logits.abs().max()))
        cache = state.cache if hasattr(state, "cache") else state.past_key_values
        name = "cache" if hasattr(state, "cache") else "past_key_values"
        state = model(input_ids=torch.tensor([[tokens[-1]]]), use_cache=True, **{name: cache})
        logits = state.logits[0, -1]
    whole = model(input_ids=torch.tensor([ids + tokens]), use_cache=False).logits[0, len(ids) - 1 : -1]
    for step, best in enumerate(whole.argmax(-1).tolist()):
        assert best == tokens[step] or gaps[step] < 1e-4 * scale, f"step {step}: the cache writes another token"
    end = [i for i, t in enumerate(tokens) if t in ends]
    return first, {
        "prompt": ids, "continuation": tokens, "eos_at": end[0] if end else None,
        "gaps": gaps, "smallest_gap": min(gaps), "scale": scale,
    }


@torch.no_grad()
def negative_log_likelihoods(model, ids, told):
    """One for each token, 0 for the first of a window."""
    out, start = torch.zeros(len(ids), dtype=torch.float64), time.time()
    for at in range(0, len(ids), CONTEXT):
        window = torch.tensor(ids[at : at + CONTEXT])
        if len(window) > 1:
            logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
            log_p = logits.double().log_softmax(-1).gather(1, window[1:, None])[:, 0]
            out[at + 1 : at + len(window)] = -log_p
        done = at // CONTEXT + 1
        if done % 64 == 0:
            told(ids[: at + CONTEXT], out)
            print(f"{done} windows, {time.time() - start:.0f} s", flush=True)
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=Path)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--text", type=Path, help="whose perplexity to compute; none without it")
    p.add_argument("--tokens", type=int, help="how many of the text's tokens, the first ones (default all)")
    p.add_argument("--threads", type=int, default=1, help="of torch; more than idle cores is slower than one")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    a.out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(a.model)
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32, attn_implementation="eager").eval()
    ends = {tokenizer.convert_tokens_to_ids(t) for t in ("<|endoftext|>", "<|im_end|>")}

    texts = PROMPTS + [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in CHATS]
    cases, firsts = [], []
    for text in texts:
        first, case = greedy(model, tokenizer(text, add_special_tokens=False).input_ids, ends)
        firsts.append(first)
        cases.append({"text": text, **case, "written": tokenizer.decode(case["continuation"])})
        print(f"{text!r}: smallest gap {case['smallest_gap']:.1e} of {case['scale']:.0f}", flush=True)
    (a.out / "greedy.json").write_text(json.dumps(cases, indent=1) + "\n")
    save_file({"first": torch.stack(firsts)}, a.out / "greedy.safetensors")

    if not a.text:
        return

    def told(ids, nll):
        scored = [i for i in range(len(ids)) if i % CONTEXT]
        total = float(nll[scored].sum())
        said = {
            "text": a.text.name, "tokens": len(ids), "scored": len(scored), "nll": total,
            "perplexity": float(torch.exp(nll[scored].mean())),
            "windows": f"{CONTEXT} tokens, no overlap, all but each window's first scored, no special tokens",
            "by_4096_tokens": [float(nll[i : i + 4096].sum()) for i in range(0, len(ids), 4096)],
        }
        (a.out / "perplexity.json").write_text(json.dumps(said, indent=1) + "\n")
        save_file({"tokens": torch.tensor(ids), "nll": nll[: len(ids)].clone()}, a.out / "perplexity.safetensors")
        return said

    ids = tokenizer(a.text.read_text(), add_special_tokens=False).input_ids[: a.tokens]
    said = told(ids, negative_log_likelihoods(model, ids, told))
    print(f"perplexity {said['perplexity']:.6f} of {said['scored']} tokens")


if __name__ == "__main__":
    main()
