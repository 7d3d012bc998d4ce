"""Chat templates of the families as far as tools go: where they are shown, how calls and results are written.

Each has the marks that its family's vocabulary has as tokens; True: a special one.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Family:
    template: str
    marks: dict[str, bool] = field(default_factory=dict)


_CHATML_END = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

PLAIN = Family(
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}" + _CHATML_END
)

_QWEN_TOOLS = (
    "{% if tools %}<|im_start|>system\n"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}\n\n{% endif %}"
    "Functions:{% for t in tools %}{{ '\n' }}{{ t | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
)
_QWEN_RESULT = (
    "{% elif m['role'] == 'tool' %}"
    "{% if messages[loop.index0 - 1]['role'] != 'tool' %}<|im_start|>user{% endif %}"
    "{{ '\n' }}<tool_response>\n{{ m['content'] }}\n</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1]['role'] != 'tool' %}<|im_end|>\n{% endif %}"
)
_QWEN_PLAIN = (
    "{% elif not (tools and loop.first and m['role'] == 'system') %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
)
QWEN = Family(
    _QWEN_TOOLS + "{% for m in messages %}{% if m.tool_calls %}<|im_start|>assistant\n"
    "{% if loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{% if m['content'] %}{{ m['content'] }}\n{% endif %}"
    "{% for c in m.tool_calls %}{% if not loop.first %}{{ '\n' }}{% endif %}"
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n" + _QWEN_RESULT + _QWEN_PLAIN + _CHATML_END,
    {"<tool_call>": False, "</tool_call>": False, "<think>": False, "</think>": False},
)
CODER = Family(
    _QWEN_TOOLS + "{% for m in messages %}{% if m.tool_calls %}<|im_start|>assistant"
    "{% if m['content'] %}\n{{ m['content'] }}\n{% endif %}"
    "{% for c in m.tool_calls %}{{ '\n' }}<tool_call>\n<function={{ c.function.name }}>\n"
    "{% for k, v in c.function.arguments.items() %}<parameter={{ k }}>\n"
    "{{ v if v is string else v | tojson }}\n</parameter>\n{% endfor %}</function>\n</tool_call>{% endfor %}"
    "<|im_end|>\n" + _QWEN_RESULT + _QWEN_PLAIN + _CHATML_END,
    {"<tool_call>": False, "</tool_call>": False},
)

LLAMA = Family(
    "{% if messages[0]['role'] == 'system' %}<|start_header_id|>system<|end_header_id|>\n\n"
    "{{ messages[0]['content'] }}<|eot_id|>{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% if m.tool_calls %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
    "{% set f = m.tool_calls[0].function %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    '{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}<|eot_id|>'
    "{% elif m['role'] == 'tool' %}<|start_header_id|>ipython<|end_header_id|>\n\n"
    "{{ m['content'] | tojson }}<|eot_id|>"
    "{% else %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{% if tools and loop.first %}Functions:{% for t in tools %}{{ '\n' }}{{ t | tojson }}{% endfor %}\n\n{% endif %}"
    "{{ m['content'] }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    {"<|start_header_id|>": True, "<|end_header_id|>": True, "<|eot_id|>": True, "<|python_tag|>": True},
)

_MISTRAL_START = (
    "{% if messages[0]['role'] == 'system' %}[SYSTEM_PROMPT]{{ messages[0]['content'] }}[/SYSTEM_PROMPT]"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST]{{ m['content'] }}[/INST]"
)
_MISTRAL_ID = (
    "{% if c.id is not defined or c.id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}"
)
_MISTRAL_MARKS = {"[TOOL_CALLS]": True, "[INST]": True, "[/INST]": True, "[AVAILABLE_TOOLS]": True}
MISTRAL = Family(
    _MISTRAL_START
    + "{% elif m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}"
    + _MISTRAL_ID
    + "{{ (c.function | tojson)[:-1] }}"
    ', "id": "{{ c.id }}"}{% if not loop.last %}, {% endif %}{% endfor %}]<|im_end|>'
    "{% elif m['role'] == 'tool' %}[TOOL_RESULTS]{{ m['content'] }}[/TOOL_RESULTS]"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}{% endfor %}",
    _MISTRAL_MARKS,
)
MISTRAL_NEW = Family(
    _MISTRAL_START
    + "{% elif m['role'] == 'tool' %}[TOOL_RESULTS]{{ m['content'] }}[/TOOL_RESULTS]"
    + "{% else %}{{ m['content'] }}{% for c in m.tool_calls %}"
    "[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}{% endfor %}<|im_end|>"
    "{% endif %}{% endfor %}",
    {**_MISTRAL_MARKS, "[ARGS]": True},
)

GRANITE = Family(
    "{% if tools %}<|im_start|>available_tools\n{{ tools | tojson }}<|im_end|>\n<|im_start|>system\n"
    "Respond with <|tool_call|> and a list.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}" + _CHATML_END,
    {"<|tool_call|>": True},
)
PHI = Family(
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'system' and m['tools'] %}<|tool|>{{ m['tools'] }}<|/tool|>{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}{# <|tool_call|> #}",
    {"<|tool_call|>": True, "<|/tool_call|>": True, "<|assistant|>": True, "<|user|>": True},
)
GEMMA = Family(
    "{% set system = '' %}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ system if loop.first else '' }}{{ m['content'] }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    {"<start_of_turn>": True, "<end_of_turn>": True},
)

FAMILIES = {
    "plain": PLAIN,
    "qwen": QWEN,
    "coder": CODER,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "mistral_new": MISTRAL_NEW,
    "granite": GRANITE,
    "phi": PHI,
    "gemma": GEMMA,
}


def write_family(folder: Path, base: Path, name: str) -> Path:
    """A copy of the tiny base in `base` with the template and the marks of a family; return `folder`."""
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    family = FAMILIES[name]
    shutil.copytree(base, folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    for mark, is_special in family.marks.items():
        tokenizer.add_tokens([AddedToken(mark, special=is_special, normalized=False)], special_tokens=is_special)
    tokenizer.chat_template = family.template
    tokenizer.save_pretrained(folder)
    assert len(tokenizer) <= json.loads((folder / "config.json").read_text())["vocab_size"]
    return folder
