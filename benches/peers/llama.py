"""llama.cpp (llama-cpp-python): TTFT, TPOT and the prompt's last logits.

    python llama.py MODEL.gguf PROMPT STEPS LOGITS.f32 [f16|f32|q8_0]

The last word is what its cache keeps: f16, its default, unless given. One JSON line.
"""

import ctypes
import json
import os
import sys
import time

import llama_cpp
import numpy as np
from llama_cpp import llama_cpp as lib


def main():
    model, prompt, steps, out = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    cache = sys.argv[5] if len(sys.argv) > 5 else "f16"
    kinds = {"f32": 0, "f16": 1, "q8_0": 8}
    llm = llama_cpp.Llama(
        model_path=model,
        n_ctx=prompt + steps + 8,
        n_batch=max(prompt, 512),
        n_ubatch=512,
        n_threads=os.cpu_count(),
        n_threads_batch=os.cpu_count(),
        flash_attn=True,
        type_k=kinds[cache],
        type_v=kinds[cache],
        verbose=False,
    )
    vocab = llm.n_vocab()
    tokens = [i * 7919 % vocab for i in range(prompt)]

    def read(tokens):
        """Without copies of logits in Python."""
        batch = (ctypes.c_int32 * len(tokens))(*tokens)
        start = time.perf_counter()
        assert lib.llama_decode(llm.ctx, lib.llama_batch_get_one(batch, len(tokens))) == 0
        lib.llama_synchronize(llm.ctx)
        return time.perf_counter() - start

    def turn():
        lib.llama_memory_clear(lib.llama_get_memory(llm.ctx), True)
        ttft = read(tokens)
        logits = np.ctypeslib.as_array(lib.llama_get_logits_ith(llm.ctx, -1), (vocab,)).copy()
        # The tokens that the crate's bench decodes.
        steps_s = [read([(step + 1) % vocab]) for step in range(steps)]
        return ttft, sorted(steps_s)[steps // 2], logits

    turn()
    ttft, tpot, logits = turn()
    logits.astype("<f4").tofile(out)
    name = f"llama.cpp (llama-cpp-python {llama_cpp.__version__}), cache {cache}"
    print(json.dumps({"name": name, "ttft_s": ttft, "tpot_s": tpot}))


if __name__ == "__main__":
    main()
