"""The ChatML template in Jinja. Every model folder contains it, for transformers, vLLM and llama.cpp.

`chat_template.py` has the same template in Python, which our own code uses.
"""

from __future__ import annotations

TOOLS_INTRODUCTION = (
    "You can use these tools. To use one, answer with a JSON object that has its `name` and the `arguments`."
)

CHAT_TEMPLATE = (
    """\
{%- if tools -%}
    {{- '<|im_start|>system\\n' -}}
    {%- if messages[0].role == 'system' and messages[0].content | trim -%}
        {{- (messages[0].content | trim) + '\\n\\n' -}}
    {%- endif -%}
    {{- '"""
    + TOOLS_INTRODUCTION
    + """' -}}
    {%- for tool in tools -%}
        {{- '\\n' + (tool | tojson) -}}
    {%- endfor -%}
    {{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role not in ['system', 'user', 'assistant', 'tool'] -%}
        {{- raise_exception('unknown role; expected system, user, assistant or tool') -}}
    {%- endif -%}
    {%- if message.content is not string -%}
        {{- raise_exception('the content of a message must be a string') -}}
    {%- endif -%}
    {%- if not (tools and loop.first and message.role == 'system') -%}
        {{- '<|im_start|>' + message.role + '\\n' + (message.content | trim) + '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
)
