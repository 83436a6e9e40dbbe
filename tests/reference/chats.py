"""Chats as transformers' `apply_chat_template` renders them, for the templates of well-known models.

    pip install transformers jinja2 tokenizers
    python tests/reference/chats.py          rewrite tests/golden/chats/
    python tests/reference/chats.py --check  compare what is there

The templates are those of the models' hub pages, written out by hand: what counts is that both
programs render the same template alike, to the last space. Dates are taken to be NOW.
"""
import datetime
import json
import pathlib
import sys
from unittest import mock

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "chats"
NOW = datetime.datetime(2026, 7, 4, 12, 30, 5)

LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

LLAMA_3_2 = r'''{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not tools_in_user_message is defined %}
    {%- set tools_in_user_message = true %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}

{#- This block extracts the system message, so we can slot it into the right place. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}

{#- System message #}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{%- if tools is not none and not tools_in_user_message %}
    {{- "You have access to the following functions. To call a function, please respond with JSON for a function call." }}
    {{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.' }}
    {{- "Do not use variables.\n\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\n\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}

{#- Custom tools are passed in a user message with some extra guidance #}
{%- if tools_in_user_message and not tools is none %}
    {#- Extract the first user message so we can plug it in here #}
    {%- if messages | length != 0 %}
        {%- set first_user_message = messages[0]['content']|trim %}
        {%- set messages = messages[1:] %}
    {%- else %}
        {{- raise_exception("Cannot put tools in the first user message when there's no first user message!") }}
{%- endif %}
    {{- '<|start_header_id|>user<|end_header_id|>\n\n' -}}
    {{- "Given the following functions, please respond with a JSON for a function call " }}
    {{- "with its proper arguments that best answers the given prompt.\n\n" }}
    {{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.' }}
    {{- "Do not use variables.\n\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\n\n" }}
    {%- endfor %}
    {{- first_user_message + "<|eot_id|>"}}
{%- endif %}

{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}" }}
        {{- "<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
'''

QWEN_3 = r'''{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\n\n' }}
    {%- endif %}
    {{- "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function signatures within <tools></tools> XML tags:\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools>\n\nFor each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call><|im_end|>\n" }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}
                    {{- '\n' }}
                {%- endif %}
                {%- if tool_call.function %}
                    {%- set tool_call = tool_call.function %}
                {%- endif %}
                {{- '<tool_call>\n{"name": "' }}
                {{- tool_call.name }}
                {{- '", "arguments": ' }}
                {%- if tool_call.arguments is string %}
                    {{- tool_call.arguments }}
                {%- else %}
                    {{- tool_call.arguments | tojson }}
                {%- endif %}
                {{- '}\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' }}
        {{- content }}
        {{- '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
'''

GEMMA_3 = r'''{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '

' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '

' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '
' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>
' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model
'}}
{%- endif -%}
'''

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

MISTRAL_1 = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)

MISTRAL_3 = r'''{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}

{#- This block checks for alternating user/assistant messages, skipping tool calling messages #}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or message.role == "tool_results" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, conversation roles must alternate user/assistant/user/assistant/...") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}

{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}
                        {{- ", " }}
                    {%- endif %}
                {%- endfor %}
                {{- "}}" }}
                {%- if not loop.last %}
                    {{- ", " }}
                {%- else %}
                    {{- "]" }}
                {%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}
            {{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id|length != 9 %}
                {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
            {%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}
            {%- if not loop.last %}
                {{- ", " }}
            {%- else %}
                {{- "]" + eos_token }}
            {%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- elif message["role"] == "tool_results" or message["role"] == "tool" %}
        {%- if message.content is defined and message.content.content is defined %}
            {%- set content = message.content.content %}
        {%- else %}
            {%- set content = message.content %}
        {%- endif %}
        {{- '[TOOL_RESULTS] {"content": ' + content|string + ", " }}
        {%- if not message.tool_call_id is defined or message.tool_call_id|length != 9 %}
            {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
        {%- endif %}
        {{- '"call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, with the exception of an initial optional system message!") }}
    {%- endif %}
{%- endfor %}
'''

# No model's: what the templates above leave out of Python and of transformers' environment.
PYTHON = r'''{# Blocks take their line with them, #}
  {% if true %}
text
  {% endif %}
{%- macro item(x, last=false) %}
[{{ x }}{{ '' if last else ',' }}]
{%- endmacro %}
{{ none }} {{ true }} {{ 1.0 }} {{ 1e16 }} {{ 0.00001 }} {{ 1e22|string }} {{ 'a' ~ 1 }} {{ 7 // 2 }} {{ 7 / 2 }} {{ 2 ** 5 }}
{{ ['a', "it's", 'tab\t', none, false, 1.5] }} {{ {'b': 1, 'a': [2]} }} {{ ('x', 1)|list }}
{{ messages|tojson }}
{{ messages|tojson(indent=2) }}
{{ messages|tojson(ensure_ascii=true, separators=(',', ':'), sort_keys=true) }}
{{ [1e16, 0.1, 1e-7, -0.0, [], {}]|tojson }} {{ "<&'>"|tojson }}
{% for message in messages %}
{% if message.role == 'skip' %}{% continue %}{% endif %}
{% generation %}
{{ item(message.content, loop.last) }}
{%- endgeneration %}
{{ loop.previtem.role if loop.previtem is defined }} {{ loop.nextitem is defined }} {{ message.missing }}
{% if loop.index == 3 %}{% break %}{% endif %}
{% endfor %}
{{ '  a b  '.strip() }}|{{ '\x1c a'|trim }}|{{ 'xxaxx'.strip('x') }}|{{ 'a,b,c'.split(',')|join('-') }}|{{ 'a  b'.split() }}
{{ 'prefix-a'.removeprefix('prefix-') }} {{ 'a.txt'.removesuffix('.txt') }} {{ 'ab'.upper() }} {{ 'title case'.title() }} {{ 'abc'[::-1] }} {{ 'abc'[-2:] }} {{ 'a%' in 'a%b' }}
{{ 'x' is sequence }} {{ 'x' is iterable }} {{ {} is mapping }} {{ {} is sequence }} {{ 1 is number }} {{ missing is defined }} {{ messages[0].get('none', 'other') }}
{% for key, value in {'b': 1, 'a': 2}.items() %}{{ key }}={{ value }};{% endfor %}
{{ dict(a=1, b='c') }} {{ range(3)|list }} {{ messages|map(attribute='role')|list }} {{ messages|selectattr('role', 'equalto', 'user')|list|length }} {{ messages|rejectattr('role', 'equalto', 'user')|map(attribute='content')|first }}
{{ strftime_now('%d %b %Y') }} {{ strftime_now('%Y-%m-%d %H:%M:%S') }} {{ strftime_now('%A, %B %d, %I:%M %p %j %y %a') }}
{{ pad_token }}
'''

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather somewhere, in <b>°C</b> & 'words'.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "enum": ["Łódź", "東京"]}, "days": {"type": "integer", "default": 1}},
            "required": ["place"],
        },
    },
}


def say(role, content, **more):
    return {"role": role, "content": content, **more}


def call(arguments):
    return {"id": "abcdef123", "type": "function", "function": {"name": "weather", "arguments": arguments}}


ASK = say("user", "  How far is the moon? 🌙\n")
CHATS = {
    "one question": [ASK],
    "a system message": [say("system", "Be brief.\n"), ASK],
    "an empty question": [say("user", "")],
    "several turns": [
        say("system", "You are <b>Ada</b> & friends."),
        say("user", "Hi"),
        say("assistant", " Hello, 你好!\n"),
        say("user", "{{ not a template }} {% raw %}"),
        say("assistant", "<think>\nWhat now?\n</think>\n\nYes."),
        say("user", "e\u0301 \u00a0\u2028 \U0001f469\u200d\U0001f680"),
    ],
    "the answer last": [say("user", "2+2?"), say("assistant", "<think>\n\nsums\n</think>\n\n4")],
    "reasoning apart": [say("user", "2+2?"), say("assistant", "4", reasoning_content="\nsums\n"), say("user", "Sure?")],
    "reasoning by another name": [say("user", "2+2?"), say("assistant", "4", reasoning="sums")],
    "two questions in a row": [say("user", "a"), say("user", "b")],
    "parts": [say("user", [{"type": "text", "text": " Look: "}, {"type": "image"}, {"type": "text", "text": "what?"}])],
    "a null": [say("user", "a", name=None, tool_calls=None)],
    "a call": [
        say("user", "Weather in Łódź?"),
        say("assistant", "", tool_calls=[call({"place": "Łódź", "days": 2, "exact": True, "share": 1e-7, "more": None})]),
        say("tool", '{"celsius": -3.5}', tool_call_id="abcdef123"),
        say("assistant", "It is -3.5 °C."),
        say("user", "Thanks"),
    ],
    "calls": [
        say("user", "Weather in both?"),
        say("assistant", None, tool_calls=[call({"place": "Łódź"}), call({"place": "東京"})]),
        say("tool", "cold", tool_call_id="abcdef123"),
        say("tool", "warm", tool_call_id="abcdef123"),
    ],
    "a short id": [say("user", "?"), say("assistant", "", tool_calls=[{**call({}), "id": "1"}])],
    "only an answer": [say("assistant", "So.")],
}

MODELS = {
    "llama_3": (LLAMA_3, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}),
    "llama_3_2": (LLAMA_3_2, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}),
    "qwen_3": (QWEN_3, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}),
    "gemma_3": (GEMMA_3, {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}),
    "smollm2": (SMOLLM2, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}),
    "mistral_1": (MISTRAL_1, {"bos_token": "<s>", "eos_token": "</s>"}),
    "mistral_3": (MISTRAL_3, {"bos_token": "<s>", "eos_token": "</s>"}),
    "python": (PYTHON, {"pad_token": "<pad>"}),
}


class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return NOW


def cases(model, template, tokens):
    """Every chat with and without the beginning of an answer; some with tools, some with a variable."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **tokens)
    for name, messages in CHATS.items():
        if model == "python" and name not in ("one question", "several turns", "calls"):
            continue
        for tools in ([WEATHER], None) if "call" in name or name == "one question" else (None,):
            for variables in ({}, {"enable_thinking": False}) if name == "one question" else ({},):
                for prompt in (True, False):
                    case = {"chat": name, "tools": tools is not None, "variables": variables, "add_generation_prompt": prompt}
                    try:
                        case["expected"] = tokenizer.apply_chat_template(
                            messages, tools, chat_template=template, add_generation_prompt=prompt, tokenize=False, **variables
                        )
                    except Exception as error:
                        case["error"] = str(error)
                        case["raised"] = type(error).__name__ == "TemplateError"
                    yield case


def files():
    yield "chats", {"chats": CHATS, "tools": [WEATHER], "now": NOW.isoformat()}
    for name, (template, tokens) in MODELS.items():
        yield name, {"template": template, "tokens": tokens, "cases": list(cases(name, template, tokens))}


def main():
    GOLDEN.mkdir(exist_ok=True)
    with mock.patch.object(chat_template_utils, "datetime", Clock):
        for name, content in files():
            text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
            path = GOLDEN / f"{name}.json"
            if "--check" not in sys.argv:
                path.write_text(text, encoding="utf-8")
            elif path.read_text(encoding="utf-8") != text:
                sys.exit(f"{path} differs")


if __name__ == "__main__":
    main()
