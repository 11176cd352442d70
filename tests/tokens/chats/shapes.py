"""Chat templates of the shapes of well-known models, each with a builder of its text by hand.

A builder gives the text in parts: (text, number of the message), or (text, None) for what the template writes.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
Parts = list[tuple[str, int | None]]

CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


def chatml(messages: Sequence[Message], *, prompt: bool = False) -> Parts:
    parts: Parts = []
    for turn, message in enumerate(messages):
        parts += [
            (f"<|im_start|>{message['role']}\n", None),
            (message["content"], turn),
            ("<|im_end|>\n", None),
        ]
    return [*parts, ("<|im_start|>assistant\n", None)] if prompt else parts


LLAMA = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""


def llama(messages: Sequence[Message], *, prompt: bool = False) -> Parts:
    parts: Parts = [("<bos>", None)]
    for turn, message in enumerate(messages):
        head = f"<|start_header_id|>{message['role']}<|end_header_id|>\n\n"
        parts += [(head, None), (message["content"].strip(), turn), ("<|eot_id|>", None)]
    head = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    return [*parts, (head, None)] if prompt else parts


GEMMA = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}
{%- set prefix = messages[0].content + '\\n\\n' %}
{%- set rest = messages[1:] %}
{%- set first = 1 %}
{%- else %}
{%- set prefix = '' %}
{%- set rest = messages %}
{%- set first = 0 %}
{%- endif %}
{%- for message in rest %}
{%- set role = 'model' if message.role == 'assistant' else message.role %}
{{- '<start_of_turn>' + role + '\\n' + (prefix if loop.first else '') + message.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""


def gemma(messages: Sequence[Message], *, prompt: bool = False) -> Parts:
    """No system role: its text stands in front of the user's, untrimmed where all others are trimmed."""
    parts: Parts = [("<bos>", None)]
    n_system = int(messages[0]["role"] == "system")
    for turn, message in enumerate(messages[n_system:], n_system):
        role = "model" if message["role"] == "assistant" else message["role"]
        parts.append((f"<start_of_turn>{role}\n", None))
        if n_system and turn == 1:
            parts += [(messages[0]["content"], 0), ("\n\n", None)]
        parts += [(message["content"].strip(), turn), ("<end_of_turn>\n", None)]
    return [*parts, ("<start_of_turn>model\n", None)] if prompt else parts


MISTRAL = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}
{%- set system = messages[0].content %}
{%- set rest = messages[1:] %}
{%- else %}
{%- set rest = messages %}
{%- endif %}
{%- for message in rest %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{%- if message.role == 'user' %}
{%- if loop.last and system is defined %}
{{- '[INST] ' + system + '\\n\\n' + message.content + ' [/INST]' }}
{%- else %}
{{- '[INST] ' + message.content + ' [/INST]' }}
{%- endif %}
{%- else %}
{{- ' ' + message.content + eos_token }}
{%- endif %}
{%- endfor %}"""


def mistral(messages: Sequence[Message], *, prompt: bool = False) -> Parts:
    """The system's text comes with the last message, if that is the user's: behind those that it stands before."""
    parts: Parts = [("<bos>", None)]
    n_system = int(messages[0]["role"] == "system")
    for turn, message in enumerate(messages[n_system:], n_system):
        if message["role"] == "user":
            parts.append(("[INST] ", None))
            if n_system and turn == len(messages) - 1:
                parts += [(messages[0]["content"], 0), ("\n\n", None)]
            parts += [(message["content"], turn), (" [/INST]", None)]
        else:
            parts += [(" ", None), (message["content"], turn), ("<eos>", None)]
    return parts


QWEN = """\
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
{{- '# Tools\\n\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
{{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=0) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- elif message.role == 'assistant' %}
{%- set content = message.content if message.content is string else '' %}
{%- set reasoning = message.reasoning_content if message.reasoning_content is string else '' %}
{%- if not reasoning and '</think>' in content %}
{%- set reasoning = content.split('</think>')[0].split('<think>')[-1] %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.last and (loop.last or reasoning) %}
{{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
{%- else %}
{{- content }}
{%- endif %}
{%- for call in message.tool_calls or [] %}
{%- if (loop.first and content) or not loop.first %}{{- '\\n' }}{%- endif %}
{%- if call.function %}{%- set call = call.function %}{%- endif %}
{{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
{%- if call.arguments is string %}{{- call.arguments }}{%- else %}{{- call.arguments | tojson }}{%- endif %}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


def qwen(
    messages: Sequence[Message], *, prompt: bool = False, tools: Sequence[Message] | None = None
) -> Parts:
    """ChatML with tools and reasoning, which is written for the messages behind the user's last one."""
    parts: Parts = []
    is_system_first = messages[0]["role"] == "system"
    if tools:
        parts.append(("<|im_start|>system\n", None))
        parts += [(messages[0]["content"], 0), ("\n\n", None)] if is_system_first else []
        listed = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools)
        parts.append((f"# Tools\n\n<tools>{listed}\n</tools><|im_end|>\n", None))
    elif is_system_first:
        parts += [("<|im_start|>system\n", None), (messages[0]["content"], 0), ("<|im_end|>\n", None)]
    last = max((turn for turn, message in enumerate(messages) if message["role"] == "user"), default=0)
    for turn, message in enumerate(messages):
        role, content = message["role"], message.get("content") or ""
        if role == "user" or (role == "system" and turn):
            parts += [(f"<|im_start|>{role}\n", None), (content, turn), ("<|im_end|>\n", None)]
        elif role == "assistant":
            parts.append(("<|im_start|>assistant\n", None))
            reasoning = message.get("reasoning_content", "")
            if turn > last and (turn == len(messages) - 1 or reasoning):
                parts += [("<think>\n", None), (reasoning.strip("\n"), turn), ("\n</think>\n\n", None)]
                parts.append((content.lstrip("\n"), turn))
            else:
                parts.append((content, turn))
            for number, call in enumerate(message.get("tool_calls", [])):
                parts.append(("\n" if content or number else "", None))
                call = call.get("function", call)
                arguments = call["arguments"]
                parts += [('<tool_call>\n{"name": "', None), (call["name"], turn), ('", "arguments": ', None)]
                is_text = isinstance(arguments, str)
                parts.append((arguments if is_text else json.dumps(arguments, ensure_ascii=False), turn))
                parts.append(("}\n</tool_call>", None))
            parts.append(("<|im_end|>\n", None))
        elif role == "tool":
            if turn == 0 or messages[turn - 1]["role"] != "tool":
                parts.append(("<|im_start|>user", None))
            parts += [("\n<tool_response>\n", None), (content, turn), ("\n</tool_response>", None)]
            if turn == len(messages) - 1 or messages[turn + 1]["role"] != "tool":
                parts.append(("<|im_end|>\n", None))
    return [*parts, ("<|im_start|>assistant\n", None)] if prompt else parts


@dataclass(frozen=True)
class Shape:
    template: str
    build: Callable[..., Parts]


SHAPES = {
    "chatml": Shape(CHATML, chatml),
    "llama": Shape(LLAMA, llama),
    "gemma": Shape(GEMMA, gemma),
    "mistral": Shape(MISTRAL, mistral),
    "qwen": Shape(QWEN, qwen),
}


def text_of(parts: Parts) -> str:
    return "".join(text for text, _ in parts)


def turns_of(parts: Parts) -> list[int]:
    """The message of each character; -1 for the template."""
    return [-1 if turn is None else turn for text, turn in parts for _ in text]
