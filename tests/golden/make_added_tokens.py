"""Computes token ids with tokenizers that were changed after they were made.

    python make_added_tokens.py MODEL_DIR OUT.json

Each case is an edit of the tokenizer folders of MODEL_DIR: files that are removed, and JSON files into which keys are put.
Prompts go through diffusers' replacement of textual inversions of several vectors, then through the tokenizer as diffusers loads
and calls it. Made with transformers 5.23.0 and diffusers 0.42.1.
"""
import json
import shutil
import sys
import tempfile
from pathlib import Path

from diffusers.loaders import TextualInversionLoaderMixin
from transformers import CLIPTokenizer

PROMPTS = [
    "", "a photo of <cat>", "<cat> and <DOG>, <dog>", "<CAT> x<cat>y", "<cat>_1 <cat>_2 <cat>_3", "  <cat>  !  ", "a red heart!!",
    "<art-style> <art-style>,<art-style>", "the" + " cat" * 73 + " <cat>", "the" + " cat" * 90 + " <dog>", "naïve <|endoftext|> <cat>",
]


def token(content, **flags):
    return dict(dict(content=content, lstrip=False, normalized=True, rstrip=False, single_word=False, special=False), **flags)


def cases(first):
    """`first` is the first id after the vocabulary."""
    padding = {"strategy": {"Fixed": 77}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 3513, "pad_type_id": 0,
               "pad_token": "<|endoftext|>"}
    truncation = {"direction": "Right", "max_length": 77, "strategy": "LongestFirst", "stride": 0}
    added = {name: first + i for i, name in enumerate(["<cat>", "<cat>_1", "<cat>_2", "<dog>"])}
    decoder = {str(first): token("<cat>", lstrip=True), str(first + 1): token("<dog>", normalized=False, special=True)}
    return {
        "saved after use": (["merges.txt", "vocab.json"], {"tokenizer.json": {"padding": padding, "truncation": truncation}}),
        "saved after use, other sides": ([], {"tokenizer.json": {
            "padding": dict(padding, direction="Left", pad_to_multiple_of=8), "truncation": dict(truncation, direction="Left", max_length=9)}}),
        "added_tokens.json without tokenizer.json": (["tokenizer.json"], {"added_tokens.json": added}),
        "added_tokens.json beside tokenizer.json": ([], {"added_tokens.json": added,
                                                         "special_tokens_map.json": {"additional_special_tokens": ["<dog>", "<art-style>"]}}),
        "added_tokens_decoder": ([], {"tokenizer_config.json": {"added_tokens_decoder": decoder}}),
        "added_tokens_decoder without tokenizer.json": (["tokenizer.json"], {"tokenizer_config.json": {"added_tokens_decoder": decoder}}),
        "additional_special_tokens": ([], {"tokenizer_config.json": {"additional_special_tokens": ["<cat>", "<dog>"]}}),
    }


def main(model, out):
    convert = TextualInversionLoaderMixin()._maybe_convert_prompt
    result = {"made_with": "transformers 5.23.0, diffusers 0.42.1", "prompts": PROMPTS, "cases": {}}
    first = max(json.loads((Path(model) / "tokenizer/vocab.json").read_text()).values()) + 1
    for name, (removed, put) in cases(first).items():
        case = {"removed": removed, "put": put}
        for part in ("tokenizer", "tokenizer_2"):
            with tempfile.TemporaryDirectory() as folder:
                folder = Path(folder) / part
                shutil.copytree(Path(model) / part, folder)
                for file in removed:
                    (folder / file).unlink()
                for file, keys in put.items():
                    path = folder / file
                    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | keys))
                tokenizer = CLIPTokenizer.from_pretrained(folder)
                case[part] = [tokenizer(convert(p, tokenizer), padding="max_length", max_length=tokenizer.model_max_length, truncation=True).input_ids
                              for p in PROMPTS]
        result["cases"][name] = case
    lines = json.dumps(result, indent=1)
    # The ids of each prompt are on one line.
    import re
    Path(out).write_text(re.sub(r"\[\s+((?:\d+,\s+)*\d+)\s+\]", lambda m: "[" + re.sub(r"\s+", " ", m.group(1)) + "]", lines) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
