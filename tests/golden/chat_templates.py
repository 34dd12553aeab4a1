"""Writes chat_templates.json: conversations as transformers renders and tokenises them.

    python tests/golden/chat_templates.py

The templates are written for this test, in the manner of the common families. Where a template exists with and without
`{% generation %}`, transformers' mask of the first is what retune must find in the second by itself.
"""

import json
import pathlib

import tokenizers
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
           "[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|end|>"]


def byte_level():
    """One token a byte, as GPT-2, Llama 3 and Qwen would have without merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("Ġ", "a")]
    words = SPECIAL + alphabet + [left + right for left, right in merges]
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # With trimmed offsets, transformers finds no token at a space and gives up on the mask.
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def byte_fallback():
    """In the manner of Llama 2: spaces become ▁, one is put in front, and unknown characters become bytes."""
    words = ["<unk>"] + SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)]
    words += ["▁"] + [chr(code) for code in range(33, 127)] + ["▁t", "he", "▁the", "▁a"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "a")]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])])
    return tokenizer


def finish(tokenizer):
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return tokenizer


TOKENIZERS = {"byte_level": finish(byte_level()), "byte_fallback": finish(byte_fallback())}
CONFIG = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}

# OPEN and CLOSE become `{% generation %}` and `{% endgeneration %}`, or nothing.
CHAT = {
    "chatml": """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>assistant\\n' }}
        OPEN-
        {%- if message.content is string %}{{- message.content }}{%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- if call.function %}{% set call = call.function %}{% endif %}
            {%- if not loop.first or message.content %}{{- '\\n' }}{% endif %}
            {{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
        -CLOSE
        {{- '\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.previtem and loop.previtem.role != "tool" %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' ~ message.content ~ '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != "tool" %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""".strip(),
    # Reasoning is kept in the last turns only, and the last turn always shows some.
    "thinking": """
{%- set ns = namespace(last=messages|length - 1, searching=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and not message.content.startswith('<tool_response>') %}
        {%- set ns.searching = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        OPEN-
        {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
            {{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>' ~ (call.function | tojson) ~ '</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
        -CLOSE
        {{- '\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""".strip(),
    "headers": """
{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = "26 Jul 2024" %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.role == 'tool' or message.role == 'ipython' %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable and message.content is not string %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- elif message.role == 'assistant' %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        OPEN-
        {%- if 'tool_calls' in message %}
            {%- if not message.tool_calls|length == 1 %}
                {{- raise_exception("This model only supports single tool-calls at once!") }}
            {%- endif %}
            {%- set tool_call = message.tool_calls[0].function %}
            {{- '{"name": "' + tool_call.name + '", "parameters": ' }}
            {{- tool_call.arguments | tojson }}
            {{- "}" }}
        {%- else %}
            {{- message['content'] | trim }}
        {%- endif %}
        {{- '<|eot_id|>' }}
        -CLOSE
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""".strip(),
    # The system message moves to the last question, so what comes before a turn changes with what follows it.
    "inst": """
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set users = loop_messages | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if (message == users[-1]) and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        OPEN-
        {{- " " + message["content"]|trim + eos_token }}
        -CLOSE
    {%- endif %}
{%- endfor %}
""".strip(),
    "turns": """
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '
' }}{% if role == 'model' %}OPEN{{ message['content'] | trim + '<end_of_turn>' }}CLOSE{{ '
' }}{% else %}{{ message['content'] | trim + '<end_of_turn>
' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model
'}}{% endif %}
""".strip(),
    # The text ends with a mark that stands nowhere else.
    "ending": """
{% for message in messages %}
{% if message['role'] == 'assistant' %}
{{ '<|assistant|>
' }}OPEN{{ message['content'] + '<|end|>' }}CLOSE{{ '
' }}{% else %}
{{ '<|' + message['role'] + '|>
' + message['content'] + '<|end|>
' }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>
' }}{% else %}{{ eos_token }}{% endif %}
""".strip(),
}


def variant(template, generation):
    if generation:
        return (template.replace("OPEN-", "{%- generation -%}").replace("-CLOSE", "{%- endgeneration -%}")
                .replace("OPEN", "{% generation %}").replace("CLOSE", "{% endgeneration %}"))
    # The tags also trim the space round them.
    return (template.replace("OPEN-", "{%- if true -%}").replace("-CLOSE", "{%- endif -%}")
            .replace("OPEN", "{% if true %}").replace("CLOSE", "{% endif %}"))


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **fields):
    return {"role": "assistant", "content": text, **fields}


TOOLS = [{"type": "function", "function": {
    "name": "weather", "description": "Tells <the> weather & \"more\" – 天气",
    "parameters": {"type": "object", "properties": {
        "place": {"type": "string"}, "days": {"type": "array", "items": {"type": "number", "minimum": 0.5}}},
        "required": ["place"]}}}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Zürich\n\"old\"", "days": [1, 2.0, 1e20, 1e-7]}}}

CONVERSATIONS = {
    "one": [user("Hi the cat"), assistant("Hello the dog.")],
    "system": [{"role": "system", "content": "Be brief. "}, user("What is it?"), assistant("It.")],
    "several": [user("a"), assistant("b"), user("the c"), assistant("the d"), user("e"), assistant("f")],
    "several_system": [{"role": "system", "content": "S"}, user("a"), assistant("b"), user("c"), assistant("d")],
    "unicode": [user("你好 👩‍👩‍👧 é"), assistant("日本語 🇫🇷 naïve"), user("ﷺ"), assistant("e\u0301 ✓")],
    "space": [user("  padded \n"), assistant("\n  padded too \n\n"), user("x "), assistant(" y ")],
    "markup": [user("<b>&amp; 'q' \"d\" \\n {{ x }} {% y %}"), assistant("<think>&</b> </s>? ok")],
    "same": [user("yes"), assistant("yes"), user("yes"), assistant("yes")],
    "ends_with_user": [user("a"), assistant("b"), user("c")],
    "reasoning": [user("q"), assistant("<think>\nlong\n</think>\n\nshort"), user("r"), assistant("<think>\nmore\n</think>\n\nend")],
    "reasoning_field": [user("q"), assistant("short", reasoning_content="long"), user("r"), assistant("end", thinking="more")],
    "tools": [user("Weather?"), assistant(None, tool_calls=[CALL]),
              {"role": "tool", "name": "weather", "content": "{\"sun\": true}"}, assistant("Sunny."),
              user("Thanks"), assistant("Welcome.")],
    "tools_text": [user("Weather?"), assistant("Let me see", tool_calls=[CALL]),
                   {"role": "tool", "content": "rain"}, assistant("Rain.")],
}

# Small templates that each use one thing the engine offers; `messages` is FEATURE_MESSAGES.
FEATURE_MESSAGES = [
    {"role": "user", "content": "Hello World", "n": 3, "x": 1.5, "flag": True, "nothing": None,
     "d": {"b": 1, "a": [1, "two", 3.0, None, True], "items": "trap", "q": "it's \"x\"\n"}},
    {"role": "assistant", "content": "  a,b,,c  ", "n": -1, "x": 1e20, "flag": False, "d": {}},
]
FEATURES = {
    "none": "{{ none }}|{{ None }}", "truth": "{{ true }}|{{ False }}|{{ messages[0].flag }}",
    "undefined": "[{{ nothing_here }}][{{ messages[0].missing }}]",
    "dict": "{{ messages[0].d }}", "list": "{{ messages[0].d.a }}|{{ [] }}|{{ {} }}",
    "tilde": "{{ 'a' ~ 1 ~ none ~ true ~ 1.5 ~ [1, 'b'] }}", "string_filter": "{{ messages[0].d | string }}",
    "floats": "{{ 1.0 }}|{{ messages[0].x }}|{{ messages[1].x }}|{{ 1e-7 }}|{{ 1e16 }}|{{ 123456789.125 }}|{{ 0.1 + 0.2 }}",
    "arithmetic": "{{ 7 // 2 }}|{{ 7 / 2 }}|{{ 7 % 3 }}|{{ -7 // 2 }}|{{ -7 % 3 }}|{{ 2 ** 3 }}|{{ 4 / 2 }}",
    "tojson": "{{ messages[0] | tojson }}",
    "tojson_indent": "{{ messages[0].d | tojson(indent=2) }}|{{ messages[1].d | tojson(indent=4) }}|{{ [] | tojson(indent=1) }}",
    "tojson_options": "{{ messages[0].d | tojson(sort_keys=true, separators=(',', ':')) }}|{{ 'é👍' | tojson(ensure_ascii=true) }}",
    "tojson_html": "{{ '<a href=\"x\">&\\'</a>\\x7f\\u2028' | tojson }}",
    "items": "{% for k, v in messages[0].d.items() %}{{ k }}={{ v }};{% endfor %}",
    "items_filter": "{% for k, v in messages[0].d | items %}{{ k }};{% endfor %}{% for k, v in messages[0].d | dictsort %}{{ k }};{% endfor %}",
    "keys_values": "{{ messages[0].d.keys() | list }}|{{ messages[1].values() | list | length }}",
    "get": "{{ messages[0].get('role') }}|{{ messages[0].get('no') }}|{{ messages[0].get('no', 'd') }}",
    "split": "{{ messages[1].content.split(',') }}|{{ messages[1].content.split() }}|{{ 'a-b-c'.split('-', 1) }}|{{ 'a-b-c'.split('-')[-1] }}",
    "rsplit": "{{ 'a-b-c'.rsplit('-', 1) }}|{{ 'a-b'.partition('-')[2] }}|{{ 'prefixed'.removeprefix('pre') }}|{{ 'x.py'.removesuffix('.py') }}",
    "strip": "[{{ messages[1].content.strip() }}][{{ messages[1].content.lstrip() }}][{{ 'xxaxx'.strip('x') }}][{{ 'abc'.rstrip('c') }}][{{ '  b ' | trim }}]",
    "case": "{{ 'aBc dEf'.title() }}|{{ 'aBc'.upper() }}|{{ 'aBc' | lower }}|{{ 'aBc' | capitalize }}|{{ 'aB c' | title }}",
    "find": "{{ 'hello'.find('l') }}|{{ 'hello'.count('l') }}|{{ 'hello'.startswith('he') }}|{{ 'hello'.endswith(('lo', 'x')) }}|{{ 'ell' in 'hello' }}",
    "replace": "{{ 'aaa'.replace('a', 'b', 1) }}|{{ 'aaa' | replace('a', 'c') }}|{{ ', '.join(['x', 'y']) }}|{{ [1, 2] | join('-') }}",
    "slices": "{{ 'hello'[1:3] }}|{{ 'hello'[-2:] }}|{{ 'hello'[0] }}|{{ messages[::-1][0].role }}|{{ messages[1:] | length }}|{{ 'héllo'[::-1] }}",
    "tests": "{% for v in ['s', 1, 1.5, true, none, [1], {'a': 1}, messages] %}{{ v is string }} {{ v is number }} {{ v is integer }} {{ v is float }} {{ v is boolean }} {{ v is none }} {{ v is sequence }} {{ v is iterable }} {{ v is mapping }} {{ v is true }} {{ v is defined }};{% endfor %}",
    "tests_undefined": "{{ u is defined }} {{ u is undefined }} {{ u is none }} {{ u is string }} {{ u is mapping }} {{ u is sequence }} {{ u is iterable }}",
    "equality": "{{ 1 == 1.0 }} {{ 'a' == 'a' }} {{ [1] == [1] }} {{ true == 1 }} {{ none == false }} {{ '1' == 1 }} {{ 'a' is eq 'a' }} {{ 3 is divisibleby 3 }} {{ 2 is even }}",
    "boolean": "{{ '' or 'x' }}|{{ 'a' and 'b' }}|{{ not [] }}|{{ 0 or none or 'z' }}|{{ messages[0].missing or 'd' }}|{{ 1 if u }}|{{ 'y' if 1 else 'n' }}",
    "default": "{{ u | default('d') }}|{{ none | default('d') }}|{{ '' | default('d', true) }}|{{ none | d('e', true) }}",
    "filters": "{{ [3, 1, 2] | sort }}|{{ [1, 2] | first }}|{{ [1, 2] | last }}|{{ [1, 1] | unique | list }}|{{ [1, 2] | sum }}|{{ [1, 2] | max }}|{{ 'abc' | length }}|{{ 'abc' | reverse }}|{{ [1, 2] | reverse | list }}|{{ '5' | int + 1 }}|{{ '1.5' | float }}|{{ -3 | abs }}|{{ 'abc' | list }}",
    "round": "{{ 2.5 | round }}|{{ 2.567 | round(1) }}|{{ 3 | round | int }}",
    "select": "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}|{{ messages | rejectattr('flag') | map(attribute='role') | list }}|{{ messages | map(attribute='role') | join(',') }}|{{ [1, 2, 3] | select('odd') | list }}|{{ ['a', 'b'] | map('upper') | join }}",
    "indent": "{{ 'a\\nb\\n\\nc' | indent(2) }}|{{ 'a\\nb' | indent(width=4, first=true) }}",
    "format": "{{ '%s-%d' | format('a', 3) }}|{{ '{}-{}'.format('a', 3) }}",
    "loop": "{% for m in messages %}{{ loop.index }}{{ loop.index0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.revindex }}{{ loop.previtem.role if loop.previtem }}{{ loop.nextitem is defined }}{{ loop.cycle('a', 'b') }};{% else %}empty{% endfor %}{% for m in [] %}{% else %}empty{% endfor %}",
    "loop_filter": "{% for m in messages if m.role != 'user' %}{{ loop.length }}{{ m.role }}{% endfor %}",
    "loop_string": "{% for c in 'aé' %}<{{ c }}>{% endfor %}",
    "controls": "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i > 4 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "scope": "{% set x = 1 %}{% for i in [1] %}{% set x = 2 %}{% endfor %}{{ x }}{% if true %}{% set x = 3 %}{% endif %}{{ x }}",
    "namespace": "{% set ns = namespace(found=false, n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% if m.role == 'assistant' %}{% set ns.found = true %}{% endif %}{% endfor %}{{ ns.found }}{{ ns.n }}",
    "macro": "{% macro show(m, sep=': ', end='.') %}{{ m.role }}{{ sep }}{{ caller() if caller }}{{ end }}{% endmacro %}{{ show(messages[0]) }}{{ show(messages[1], end='!') }}{% call show(messages[0], '=') %}body{% endcall %}",
    "macro_recursive": "{% macro walk(v) %}{% if v is mapping %}{% for k in v %}{{ k }}({{ walk(v[k]) }}){% endfor %}{% elif v is iterable and v is not string %}{% for x in v %}{{ walk(x) }},{% endfor %}{% else %}{{ v }}{% endif %}{% endmacro %}{{ walk(messages[0].d) }}",
    "set_block": "{% set text %}a\nb{% endset %}[{{ text }}]{% set text = text | upper %}{{ text }}{% filter upper %}x{{ 'y' }}{% endfilter %}",
    "unpack": "{% set a, b = 1, 2 %}{{ a }}{{ b }}{% for a, b in [(1, 2), (3, 4)] %}{{ a + b }}{% endfor %}",
    "whitespace": "  {% if true %}\n  a\n  {% endif %}\nb\n{%- if true -%}\n  c  \n{%- endif +%}\nd {#- comment -#} e\n  {# x #}\nf\n{{- 'g' -}}\n h\n",
    "newlines": "a\r\nb{% if true %}\r\nc{% endif %}\n\n",
    "raw": "{% raw %}{{ x }}{% endraw %}{{ '{{' }}",
    "escapes": "{{ 'a\\tb\\\\c\\'d\\u00e9' }}|{{ \"it's\" }}|{{ 'x' 'y' }}",
    "dict_literal": "{% set roles = {'user': 'U', 'assistant': 'A'} %}{% for m in messages %}{{ roles[m.role] }}{% endfor %}{{ {'a': 1}.a }}{{ dict(a=1) }}",
    "concat": "{{ [1] + [2] }}|{{ 'a' * 3 }}|{{ 'a' + 'b' }}|{{ (1, 2) }}",
    "in": "{{ 'role' in messages[0] }}|{{ 'x' not in 'abc' }}|{{ 2 in [1, 2] }}|{{ messages[0].role in ['user', 'tool'] }}",
    "attribute": "{{ messages[0]['d']['a'][1] }}|{{ (messages | first).role }}|{{ messages[-1].role }}",
    "items_key": "{{ messages[0].d['items'] }}",
    "generation": "{% for m in messages %}{% generation %}{% set y = m.role %}{{ y }}{% endgeneration %}{% endfor %}[{{ y }}]",
}
REFUSALS = {
    "raised": "{{ raise_exception('only \"user\" & co') }}",
    "undefined_attribute": "{{ nothing.at.all }}",
    "add_none": "{{ 'a' + none }}",
    "syntax": "{% if %}",
}


def backend(name, template):
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=TOKENIZERS[name], **CONFIG)
    tokenizer.chat_template = template
    return tokenizer


def main():
    chats = []
    for style, template in CHAT.items():
        marked, plain = variant(template, True), variant(template, False)
        cases = []
        for conversation, messages in CONVERSATIONS.items():
            tools = TOOLS if conversation.startswith("tools") else None
            case = {"conversation": conversation}
            for name in TOKENIZERS:
                tokenizer = backend(name, marked)
                try:
                    out = tokenizer.apply_chat_template(
                        messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True)
                    text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
                    assert text == backend(name, plain).apply_chat_template(messages, tools=tools, tokenize=False)
                    case["text"] = text
                    case["prompt"] = tokenizer.apply_chat_template(
                        messages, tools=tools, tokenize=False, add_generation_prompt=True)
                    shown = not tools or '"weather"' in text and "Zürich" in text
                    assert shown, "the template does not show the tools"
                    case[name] = {"tokens": out["input_ids"], "mask": "".join(map(str, out["assistant_masks"]))}
                except Exception as error:
                    case["error"] = str(error)
            cases.append(case)
        chats.append({"style": style, "marked": marked, "plain": plain, "cases": cases})

    features = []
    for name, template in FEATURES.items():
        tokenizer = backend("byte_level", template)
        try:
            text = tokenizer.apply_chat_template(FEATURE_MESSAGES, tokenize=False)
            features.append({"name": name, "template": template, "text": text})
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}")
    refusals = []
    for name, template in REFUSALS.items():
        try:
            backend("byte_level", template).apply_chat_template(FEATURE_MESSAGES, tokenize=False)
        except Exception as error:
            refusals.append({"name": name, "template": template, "error": str(error)})

    written = {
        "made_by": {"transformers": transformers.__version__, "tokenizers": tokenizers.__version__},
        "tokenizers": {name: json.loads(tokenizer.to_str()) for name, tokenizer in TOKENIZERS.items()},
        "config": CONFIG,
        "tools": TOOLS,
        "conversations": CONVERSATIONS,
        "chats": chats,
        "feature_messages": FEATURE_MESSAGES,
        "features": features,
        "refusals": refusals,
    }
    file = pathlib.Path(__file__).with_suffix(".json")
    file.write_text(json.dumps(written, ensure_ascii=False, separators=(",", ":")) + "\n")
    print(file, file.stat().st_size, "bytes;", sum("text" in case for chat in chats for case in chat["cases"]), "chats;",
          len(features), "features")


main()
