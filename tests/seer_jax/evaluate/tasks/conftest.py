"""Two encoders of prompts: the bundled tokenizer, and a byte-level BPE of another vocabulary with a chat template and BOS."""

import functools

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from seer_jax import load_tokenizer
from seer_jax.evaluate.tasks import PromptEncoder
from seer_jax.evaluate.tasks.ruler.words import sentences
from seer_jax.inference.text import Tokenizer

CHAT = (
    "{% if enable_thinking is defined and not enable_thinking %}<bos>{% endif %}"
    "{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}<end>\n{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}"
)


@functools.cache
def prose_tokenizer() -> Tokenizer:
    """Trained on a few sentences, so that most words have several tokens; plain text begins with <bos>, which chats write themselves."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<bos>", "<turn>", "<end>"]
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((" ".join(words) for words in sentences(None)[:300]), trainer)
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return Tokenizer(backend, special={"bos_token": "<bos>"}, chat_templates={"default": CHAT}, place="prose")


@pytest.fixture(scope="session", params=["plain", "chat"])
def encoder(request: pytest.FixtureRequest) -> PromptEncoder:
    return PromptEncoder(load_tokenizer("tiny-lm") if request.param == "plain" else prose_tokenizer())
