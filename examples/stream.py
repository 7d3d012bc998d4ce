"""Stream an answer: python examples/stream.py MODEL "a question". MODEL is a base, or a model that was tuned here."""

import sys

from openai import OpenAI

model, question = sys.argv[1:]
stream = OpenAI().chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": question}],
    max_tokens=200,
    stream=True,
    stream_options={"include_usage": True},
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    if chunk.usage:
        print(f"\n[{chunk.usage.prompt_tokens} tokens in, {chunk.usage.completion_tokens} out]")
