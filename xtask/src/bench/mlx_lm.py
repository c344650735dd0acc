"""Speeds of mlx-lm: FOLDER PROMPT ANSWER, in tokens; a prompt of 0 is "Hello" through the chat template."""

import json
import sys
import time

import mlx.core as mx
from mlx_lm import load
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache


def main():
    folder, prompt, answer = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    model, tokenizer = load(folder)
    model.set_dtype(mx.float32)
    if prompt == 0:
        message = [{"role": "user", "content": "Hello"}]
        tokens = mx.array(tokenizer.apply_chat_template(message, add_generation_prompt=True))
    else:
        tokens = mx.array([32 + (i * 7) % 200 for i in range(prompt)])
    started = time.perf_counter()
    times = []
    for _token, _ in generate_step(tokens, model, max_tokens=answer, prompt_cache=make_prompt_cache(model)):
        times.append(time.perf_counter() - started)
    decode = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0
    print(json.dumps({"prefill": tokens.size / times[0], "decode": decode}))


main()
