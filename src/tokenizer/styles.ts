// Chat templates of our own, for models that come without one. Jinja, as Transformers and other readers take it; what the assistant
// writes stands between `generation` tags. Each turn of the assistant ends with a text that tells where to stop.

/** Opening lines that put the begin token first where it is not also the end token, as GPT-2's is. */
const begin = `{%- if bos_token and bos_token != eos_token %}{{- bos_token }}{%- endif %}
`;

/** Each turn in a frame of its own; the assistant's frame is also the prompt for its answer. */
function framed(frame: (role: string) => string, end: string, after = ''): string {
  return `${begin}{%- for message in messages %}
{%- if message.role == 'assistant' %}{{- ${frame("'assistant'")} }}{%- generation %}{{- message.content + '${end}' }}{%- endgeneration %}
{%- else %}{{- ${frame('message.role')} + message.content + '${end}' }}{%- endif %}{{- '${after}' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- ${frame("'assistant'")} }}{%- endif %}
`;
}

/** Templates by name; see docs/finetuning.md for what each writes. */
export const chatStyles = {
  /** Stanford Alpaca's sections, in the form of "Build a Large Language Model (From Scratch)", chapter 7. */
  alpaca: `${begin}{%- if messages and messages[0].role == 'system' %}{{- messages[0].content }}{%- else %}
{{- 'Below is an instruction that describes a task. Write a response that appropriately completes the request.' }}{%- endif %}
{%- for message in messages %}
{%- if message.role == 'user' %}
{%- if message.input %}{{- '\\n\\n### Instruction:\\n' + message.instruction + '\\n\\n### Input:\\n' + message.input }}
{%- else %}{{- '\\n\\n### Instruction:\\n' + message.content }}{%- endif %}
{%- elif message.role == 'assistant' %}{{- '\\n\\n### Response:\\n' }}{%- generation %}{{- message.content + eos_token }}{%- endgeneration %}
{%- elif not loop.first %}{{- raise_exception('the alpaca style takes a system message at the beginning only') }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '\\n\\n### Response:\\n' }}{%- endif %}
`,
  phi3: framed((role) => `'<|' + ${role} + '|>\\n'`, '<|end|>', '\\n'),
  chatml: framed((role) => `'<|im_start|>' + ${role} + '\\n'`, '<|im_end|>', '\\n'),
  llama3: framed((role) => `'<|start_header_id|>' + ${role} + '<|end_header_id|>\\n\\n'`, '<|eot_id|>'),
  /** Has no system role: a system message goes before the first user's. */
  gemma: `${begin}{%- set ns = namespace(system='') %}
{%- for message in messages %}
{%- if message.role == 'system' %}{%- set ns.system = message.content + '\\n\\n' %}
{%- elif message.role == 'assistant' %}{{- '<start_of_turn>model\\n' }}{%- generation %}{{- message.content + '<end_of_turn>' }}{%- endgeneration %}{{- '\\n' }}
{%- else %}{{- '<start_of_turn>' + message.role + '\\n' + ns.system + message.content + '<end_of_turn>\\n' }}{%- set ns.system = '' %}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}
`,
  /** Has no system role: a system message goes before the first user's. */
  mistral: `${begin}{%- set ns = namespace(system='') %}
{%- for message in messages %}
{%- if message.role == 'system' %}{%- set ns.system = message.content + '\\n\\n' %}
{%- elif message.role == 'assistant' %}{%- generation %}{{- ' ' + message.content + eos_token }}{%- endgeneration %}
{%- else %}{{- '[INST] ' + ns.system + message.content + ' [/INST]' }}{%- set ns.system = '' %}{%- endif %}
{%- endfor %}
`,
  /** The texts as they are, one behind the other: for prompts that say everything themselves. */
  plain: `${begin}{%- for message in messages %}
{%- if message.role == 'assistant' %}{%- generation %}{{- message.content + eos_token }}{%- endgeneration %}
{%- else %}{{- message.content }}{%- endif %}
{%- endfor %}
`,
} as const;

/** Name of a built-in chat template. */
export type ChatStyle = keyof typeof chatStyles;
