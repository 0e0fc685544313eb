"""Small models of Hugging Face's kind, made on the spot: random weights, a tokenizer trained on a few sentences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "What is the weather like in Paris? It rains, as it does in Zürich and in 東京.",
    'A call is {"name": "get_weather", "arguments": {"city": "Paris"}} and nothing else.',
    "system user assistant tool: numbers 0 1 2 3 4 5 6 7 8 9, signs +-*/=()[]{}<>|_",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONTEXT = 512


def make_tokenizer() -> Any:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


def save_llama(folder: Path, head: type = transformers.LlamaForCausalLM, seed: int = 0, **changes: Any) -> None:
    """`head` is one of transformers' classes over a Llama."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML
    config = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.4,  # far apart logits: the likeliest token is no matter of rounding
        **changes,
    }
    torch.manual_seed(seed)
    head(transformers.LlamaConfig(**config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_bert(folder: Path, head: type = transformers.BertModel, **changes: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    config = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": tokenizer.pad_token_id,
        **changes,
    }
    torch.manual_seed(1)
    head(transformers.BertConfig(**config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
