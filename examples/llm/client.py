"""Chats with the package `openai` (pip install openai): python client.py [http://127.0.0.1:8000/v1] [MODEL]."""

import sys

import openai

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"

with openai.OpenAI(base_url=url, api_key="none") as client:
    model = sys.argv[2] if len(sys.argv) > 2 else client.models.list().data[0].id
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What is 2+2?"}],
        max_tokens=16,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in answer:
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)
        if chunk.usage:
            print(f"\n({chunk.usage.completion_tokens} tokens after {chunk.usage.prompt_tokens} of prompt)")
