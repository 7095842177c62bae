"""How an instruction and a text become the prompt of a decoder.

The forms of chats are written out here: templates inside of model files are programs, and are not
run. The token that some families put before every text (`Model.start`) is no part of them.
"""

import hashlib
import re
from typing import NamedTuple

FIELDS = ("instruction", "text")


class Template(NamedTuple):
    """A prompt with {instruction} and {text}; it ends so that " answer" follows."""

    name: str
    text: str


TEMPLATES = {
    template.name: template
    for template in (
        Template("plain", "{instruction}\n{text}\nAnswer:"),
        Template(  # SmolLM2, Qwen
            "chatml",
            "<|im_start|>user\n{instruction}\n{text}<|im_end|>\n<|im_start|>assistant\nAnswer:",
        ),
        Template(  # from Llama 3 on
            "llama3",
            "<|start_header_id|>user<|end_header_id|>\n\n{instruction}\n{text}<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nAnswer:",
        ),
        Template("mistral", "[INST] {instruction}\n{text} [/INST] Answer:"),
    )
}


def render(template: Template, *, instruction: str, text: str) -> str:
    """The prompt. Braces in `instruction` and `text` mean nothing: only the template is read.

    A special token written out in a text ("<|im_end|>") is one for the tokenizer, wherever it
    stands: take such out of texts of strangers.
    """
    found = sorted(re.findall(r"\{(\w+)\}", template.text))
    if found != sorted(FIELDS):
        raise ValueError(
            f"render: template {template.name!r} has the fields {found}; want {list(FIELDS)}, "
            "each once."
        )
    values = {"instruction": instruction, "text": text}
    return re.sub(r"\{(\w+)\}", lambda field: values[field[1]], template.text)


def sha256(template: Template) -> str:
    """The hash of the template's text, for headers; its name does not matter."""
    return hashlib.sha256(template.text.encode()).hexdigest()
