# Makes test/golden/chat.json: conversations as Transformers' own Jinja renders them, with the parts between generation tags.
# Templates: the built-in styles, and some that use what real ones use. Run from the root: python test/golden/make_chat.py
import json
import subprocess

from transformers.utils.chat_template_utils import render_jinja_template

load = "import('jiti').then(async ({ createJiti }) => console.log(JSON.stringify((await createJiti(process.cwd()).import('./src/tokenizer/styles.ts')).chatStyles)))"
styles = json.loads(subprocess.run(["node", "-e", load], capture_output=True, check=True, text=True).stdout)

templates = dict(styles)
templates["indented tags"] = """{{ bos_token }}
{% for message in messages %}
    {% if message['role'] == 'assistant' %}
        {% generation %}
{{ message['content'] | trim }}<end>
        {% endgeneration %}
    {% else %}
<{{ message.role }}>{{ message['content'] }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}<assistant>{% endif %}
"""
templates["trimmed tags"] = """{%- for message in messages -%}
  {{- '<|' ~ message.role ~ '|>' -}}
  {%- if message.role == 'assistant' -%}
    {%- generation -%} {{ message.content }}{{ eos_token }} {%- endgeneration -%}
  {%- else -%} {{ message.content }} {%- endif %}

{% endfor -%}
"""
templates["macro, namespace and tools"] = """{%- macro line(role, text) -%}
<|{{ role }}|>{{ text }}<|stop|>
{%- endmacro -%}
{%- set ns = namespace(count=0) -%}
{%- if tools is not none %}{{ line('tools', tools | tojson) }}{% endif %}
{%- for message in messages if message.role != 'system' %}
{%- set ns.count = ns.count + 1 %}
{{ line(message.role, ns.count ~ ': ' ~ message.content) }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""

conversations = {
    "one turn": [{"role": "user", "content": "Where is Oslo?"}, {"role": "assistant", "content": "In Norway."}],
    "two turns": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello\n\nthere "},
        {"role": "assistant", "content": " Hi! "},
        {"role": "user", "content": "{{ 1 + 1 }} <b>&amp;</b> 'quoted' ünï😀"},
        {"role": "assistant", "content": "Two\n"},
    ],
    "input": [
        {"role": "user", "content": "Sort.\n\n3 1 2", "instruction": "Sort.", "input": "3 1 2"},
        {"role": "assistant", "content": "1 2 3"},
    ],
    "question": [{"role": "user", "content": "Why?"}],
    "empty": [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}],
}
tools = [{"type": "function", "function": {"name": "now", "parameters": {"zone": ["UTC", "CET"]}}}]

tokens = {"bos_token": "<s>", "eos_token": "</s>"}
cases = []
for name, template in templates.items():
    for title, messages in conversations.items():
        for prompt in (False, True):
            for given in (None, tools) if "tools" in name else (None,):
                [text], [spans] = render_jinja_template(
                    conversations=[messages],
                    tools=given,
                    chat_template=template,
                    return_assistant_tokens_mask=True,
                    add_generation_prompt=prompt,
                    **tokens,
                )
                cases.append({"template": name, "conversation": title, "prompt": prompt, "tools": given is not None, "text": text, "spans": spans})

with open("test/golden/chat.json", "w") as file:
    json.dump({"templates": templates, "conversations": conversations, "tools": tools, "tokens": tokens, "cases": cases}, file, ensure_ascii=False, indent=1)
    file.write("\n")
