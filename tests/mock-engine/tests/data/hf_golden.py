"""Writes hf_golden.json: what Hugging Face's tokenizer makes of the model that `baton-mock-engine make-model` writes.

    baton-mock-engine make-model /tmp/model && python hf_golden.py /tmp/model > hf_golden.json

Needs transformers. Run it again whenever the tokenizer or the chat template changes.
"""

import json
import sys

from transformers import AutoConfig, AutoTokenizer

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two  spaces   three\n\n\ttab and trailing  ",
    "It's what they'd've said: we'll see, I'm sure; DON'T, don’t.",
    "def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n",
    "x=1;y = 22  ;z= 333_444 + 5.5e-6 # 10,000 or 1’000",
    "Grüße aus Köln, naïve café; Žluťoučký kůň; ß ẞ ﬁ",
    "Съешь ещё этих мягких французских булок, да выпей чаю.",
    "敏捷的棕色狐狸。机器学习 αβγ नमस्ते दुनिया สวัสดี 안녕하세요",
    "🚀🔥❤️👍🏽 family: 👨‍👩‍👧‍👦 flags: 🇩🇪",
    "e\u0301 vs \u00e9, \u200bzero\u00a0width and \u3000ideographic\u2003spaces\u0085next\u2028line",
    "numbers ½ ² ³ ① Ⅷ ١٢٣ ൧൨",
    "<|im_start|>user\nspecial<|im_end|>\n<|endoftext|> <|im_start|",
    "null\u0000byte \u0001 \ufffd \U0001f9ff",
    "\r\nwindows\r\nlines\r",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    '{"name": "get_weather", "arguments": {"city": "Zürich", "days": [1, 2, 3], "unit": null}}',
    "The quick brown fox jumps over the lazy dog. " * 20,
]

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city — today's.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Name, e.g. \"Köln\" <b>"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
TIME = {"type": "function", "function": {"name": "now"}}


def call(name: str, **arguments: object) -> dict:
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}


CHATS = [
    {"messages": [{"role": "user", "content": "Hello?"}]},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?\n"}]},
    {
        "messages": [
            {"role": "user", "content": "One"},
            {"role": "assistant", "content": "Two"},
            {"role": "user", "content": "Drei — 三"},
        ]
    },
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}], "add_generation_prompt": False},
    {"messages": [{"role": "user", "content": "Weather?"}], "tools": [WEATHER, TIME]},
    {
        "messages": [
            {"role": "system", "content": "Use tools."},
            {"role": "user", "content": "Weather in Zürich and Köln?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [call("get_weather", city="Zürich", days=2), call("get_weather", city="Köln", nested={"a": [1, 2.5, True, None], "b": {}})],
            },
            {"role": "tool", "tool_call_id": "call_1", "content": "21 °C & sunny"},
            {"role": "tool", "tool_call_id": "call_1", "content": "{\"t\": 19}"},
            {"role": "assistant", "content": "Warm.", "tool_calls": [call("now")]},
            {"role": "tool", "content": "12:00"},
            {"role": "user", "content": "Thanks <|im_end|>"},
        ],
        "tools": [WEATHER],
    },
    {"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "late"}, {"role": "user", "content": "b"}]},
]


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    config = AutoConfig.from_pretrained(sys.argv[1])
    assert config.vocab_size == len(tokenizer), (config.vocab_size, len(tokenizer))
    chats = []
    for chat in CHATS:
        options = {"add_generation_prompt": True} | {key: chat[key] for key in chat if key != "messages"}
        prompt = tokenizer.apply_chat_template(chat["messages"], tokenize=False, **options)
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        chats.append(chat | {"prompt": prompt, "ids": ids})
    golden = {
        "special": {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
        "texts": [{"text": text, "ids": tokenizer(text)["input_ids"]} for text in TEXTS],
        "chats": chats,
    }
    json.dump(golden, sys.stdout, ensure_ascii=True, separators=(",", ":"))
    print()


main()
