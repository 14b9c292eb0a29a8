"""Computes token ids of many odd prompts with transformers.

    python make_tokens.py MODEL_DIR OUT.json

MODEL_DIR/tokenizer and MODEL_DIR/tokenizer_2 are loaded as diffusers loads them. "ids" are padded and
cut to 77, and "raw" are neither padded nor cut.
"""
import json
import sys
from pathlib import Path

from transformers import AutoTokenizer, CLIPTokenizer

PROMPTS = [
    "", " ", "a picture of a cat face", "A Picture Of A CAT FACE", "a photograph of an astronaut riding a horse",
    "cat,dog;bird.", "wait... what?!?! (((really))) -- [yes]", "((best quality)), {{masterpiece}}, <lora:x:0.5>", "a_b-c/d\\e|f~g`h",
    "!", "!!!", "! a cat", "a ! cat", "a cat!", "a cat !", "a cat!! dog", "wow!!! amazing!!!", "a!b!c", "?! !? ?!?", "cat !\n! dog", "!'s", "(!)", "\"cat!\"",
    "1234567890", "2 cats and 10 dogs, 3.5 km, 4k", "1st 2nd x2 2x", "\u00bd \u00b2 \u0663\u0664 \u2167",
    "don't", "DON'T", "I'm they'll we've you're he'd it's", "rock 'n' roll 'tis ''s 'S", "cats' dog's's", "don\u2019t it\u2019s",
    "caf\u00e9 na\u00efve \u00fcber", "cafe\u0301 nai\u0308ve u\u0308ber", "\u00c9COLE \u00c4\u00d6\u00dc", "q\u0307\u0323 x\u0301\u0302", "\u0301 cat", "\u212b \u2126 \uf900 \uac00 \u1100\u1161",
    "\u0130stanbul I\u0131", "stra\u00dfe STRASSE \u1e9e", "\u039f\u0394\u03a5\u03a3\u03a3\u0395\u03a5\u03a3", "\ufb01sh \uff21\uff22\uff43", "\u01c5 \u1f88",
    "\U0001f600 grinning", "\U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f \U0001f1e9\U0001f1ea \U0001f44d\U0001f3fd", "cat\U0001f431dog",
    "\u4e2d\u6587\u56fe\u7247", "\u732b\u306e\u5199\u771f", "\uace0\uc591\uc774 \uc0ac\uc9c4", "\u0915\u093f\u0924\u093e\u092c", "\u0643\u0644\u0628 \u05db\u05dc\u05d1", "\u043a\u043e\u0442 \u041a\u041e\u0422",
    "a\tcat\n\nand\r\na  dog", "   leading and trailing   ", "\n", "a\u00a0cat\u2003dog\u3000bird", "a\u0085cat\u2028dog\u2029bird", "a\x0bcat\x0cdog\x1cbird\x1fcow",
    "a\x00cat\x07dog\x7fbird\x9b", "zero\u200bwidth\u200cand\u200djoin\ufeff", "soft\u00adhyphen", "\ufffd \ue000 \U0010ffff",
    "<|endoftext|>", "a cat <|endoftext|> and a dog", "cat<|endoftext|>dog", "<|startoftext|> a cat", "a cat <|ENDOFTEXT|> dog", "<|StartOfText|> a cat", "< |endoftext| >", "<|endoftext|", "x<|endoftext|>!",
    "a cat</w> dog", "the" + " cat" * 73, "the" + " cat" * 74, "the" + " cat" * 75, "the" + " cat" * 90, "!" * 74, "!" * 75, "!" * 90,
    "a" * 300, "supercalifragilisticexpialidocious pneumonoultramicroscopicsilicovolcanoconiosis", "https://example.org/a?b=c&d=%20e#f",
]


def read(folder):
    tokenizer, auto = CLIPTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(tokenizer) is type(auto)
    ids = [tokenizer(p, padding="max_length", max_length=77, truncation=True).input_ids for p in PROMPTS]
    raw = [tokenizer(p).input_ids for p in PROMPTS]
    assert raw == [auto(p).input_ids for p in PROMPTS]
    assert all(len(i) == 77 for i in ids)
    return {
        "class": type(tokenizer).__name__, "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "model_max_length": tokenizer.model_max_length,
        "added_tokens": {str(i): dict(content=t.content, special=t.special, normalized=t.normalized, lstrip=t.lstrip, rstrip=t.rstrip,
                                      single_word=t.single_word) for i, t in sorted(tokenizer.added_tokens_decoder.items())},
        "raw": raw, "ids": ids,
    }


def main(model, out):
    result = {"made_with": "transformers 5.23.0", "prompts": PROMPTS}
    for name in ("tokenizer", "tokenizer_2"):
        result[name] = read(Path(model) / name)
    lines = []
    for key, value in result.items():  # The ids of each prompt are on one line.
        if isinstance(value, dict):
            inner = [f'  {json.dumps(k)}: ' + ("[\n   " + ",\n   ".join(map(json.dumps, v)) + "\n  ]" if k in ("raw", "ids") else json.dumps(v))
                     for k, v in value.items()]
            lines.append(f" {json.dumps(key)}: {{\n" + ",\n".join(inner) + "\n }")
        elif isinstance(value, list):
            lines.append(f" {json.dumps(key)}: [\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value)}")
    Path(out).write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
