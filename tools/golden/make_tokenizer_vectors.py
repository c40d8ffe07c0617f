#!/usr/bin/env python3
"""Makes the tokenizer test vectors in tests/data/tokenizers from independent implementations.

    python3 -m venv venv && venv/bin/pip install tokenizers==0.23.3 sentencepiece==0.2.3
    venv/bin/python tools/golden/make_tokenizer_vectors.py [--shared DIR] [--out tests/data/tokenizers]

byte_bpe.json        a small byte-level BPE vocabulary trained here by `tokenizers`; a list of texts; for each
                     pre-tokenizer the pieces it cuts each text into, and the ids of each text; and for vocabularies
                     that lie in DIR/tokenizers (SmolLM2, GPT-NeoX; not copied) the ids of the same texts
sentence_piece.json  a small BPE model with byte fallback trained here by `sentencepiece`, and the ids of each text

Training text and test texts are below. The pre-tokenizers are put together from the building blocks of `tokenizers`
wherever it has one (Digits, Punctuation, ByteLevel), so that they check our patterns and not only our pattern engine.
"""
import argparse
import io
import json
import pathlib

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, models, trainers
from tokenizers import pre_tokenizers as pre

TRAINING = """
The river ran past the mill and under the old stone bridge, and the miller's daughter counted the barrels as they
rolled down to the boats. There were twenty-three of them, she said, and there ought to have been twenty-four.
Nobody answered. The wind was in the reeds, the rain was on the water, and the barge had already left for the town.
"It doesn't matter," said her father; "we'll count them again when they're paid for." He hadn't slept, and it showed.
In 1867 the mill ground 1250 sacks; in 1868 it ground 1400, which is 12% more, or 150 sacks at $3.50 each.
def count(barrels, start=0):
    total = start
    for barrel in barrels:
        if barrel is not None and barrel.volume >= 100:
            total += 1
    return total  # the miller's rule
Der Fluss floss an der Mühle vorbei, und die Müllerin zählte die Fässer. Größe und Gewicht stimmten nicht.
La rivière coulait près du moulin; l'été était déjà passé. Où est le pont? Le pont n'est plus là.
Река текла мимо мельницы. 水車小屋のそばを川が流れていた。河水流过磨坊。
""" * 4

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

TEXTS = [
    "",
    " ",
    "  ",
    "   ",
    "\t",
    "\n",
    "\n\n",
    "\r\n\r\n",
    " \n",
    "\t\n ",
    "Hello world",
    " Hello world",
    "  Hello   world  ",
    "Hello, world!\nHow are you?\n\n   Fine.\n",
    "the miller's daughter, the MILLER'S daughter",
    "I'm, you're, he'd, we'll, they've, it's, don't",
    "I'M, YOU'RE, HE'D, WE'LL, THEY'VE, IT'S, DON'T",
    "it'SX we'REady they'Llive 'sX 't1 '\u017fX",
    "'s 't 're 've 'm 'll 'd 'x ''s",
    "rock 'n' roll",
    "1 12 123 1234 12345 123456 1234567",
    "3.14159 1,000,000 0x1F 1e-9 50% $3.50 2024-01-31",
    "a1b22c333d4444",
    " 1 12  123",
    "\u00bd \u00b2\u00b3 \u216b \u0661\u0662\u0663 \uff11\uff12\uff13\uff14",
    "x=1; y+=2; z<<=3 && !w || ~v ^ u",
    "`code` $HOME <tag> a|b c^d e~f g+h",
    "(parentheses) [brackets] {braces} \"quotes\" 'single' \u201ccurly\u201d \u00abguillemets\u00bb",
    "wait... what?! -- no -- \u2014 yes \u2026",
    "!!!???...,,,;;;:::",
    "#!/bin/sh\n# comment\nif [ -f x ]; then\n\techo \"$x\" | grep -v '^#'\nfi\n",
    "def f(x):\n    return x ** 2  # square\n\n\n\nclass A:\n\tpass\n",
    "https://example.org/a/b?q=1&r=%20#frag user@example.org",
    "line\rline\r\nline\u2028line\u2029line\u0085line\x0bline\x0cline",
    "a\u00a0b\u3000c\u2003d\u200be\u180ef",
    "\u00a0\u00a0word \u3000\u3000word",
    "trailing spaces   ",
    "   \n   \n   x",
    " \t \t x",
    "\n \n  \n   x",
    "Stra\u00dfe \u00c4pfel \u0130stanbul \u01c5 na\u00efve cafe\u0301 caf\u00e9",
    "\u0420\u0435\u043a\u0430 \u0442\u0435\u043a\u043b\u0430 \u043c\u0438\u043c\u043e \u043c\u0435\u043b\u044c\u043d\u0438\u0446\u044b.",
    "\u6c34\u8eca\u5c0f\u5c4b\u306e\u305d\u3070\u3092\u5ddd\u304c\u6d41\u308c\u3066\u3044\u305f\u3002",
    "\u6cb3\u6c34\u6d41\u8fc7\u78e8\u574a\uff0c\u4e00\u5171123\u6876\uff01",
    "\ud55c\uad6d\uc5b4 \ubb38\uc7a5\uc785\ub2c8\ub2e4. \u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22 \u0939\u093f\u0928\u094d\u0926\u0940 \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "\u1780\u17b6\u1793\u17cb\u178f\u17c2\u1796\u17b7\u179f\u17c1\u179f",
    "\U0001f642 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f 1\ufe0f\u20e3",
    "\U0001d54f\U0001d7d8 \U0001f600text\U0001f600",
    "'\u017f \u017ft 'S'\u017f K's \u212a'll",
    "\u00a7 \u20ac5 \u00b15 \u00d7 \u00f7 \u2260 \u2192 \u2603 \u00a9\u00ae\u2122",
    "\u0000\u0001\u001c\u001f\u007f\u0080\u009f",
    "\ufffd\ufeffbom\ue000private",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "twenty-three barrels, twenty-four barrels; 1867 and 1868: 12% more",
    "_snake_case camelCase SCREAMING_CASE kebab-case dot.case",
    "e\u0301'e\u0301 '\u00e9t\u00e9' l'\u00e9t\u00e9 d'o\u00f9",
]

SPECIAL_TEXTS = [
    "<|im_start|>user\nHow many barrels?<|im_end|>\n<|im_start|>",
    "<|im_end|><|im_end|>",
    "<|im_end <|im_end|",
    " <|endoftext|> ",
    "<tool>count</tool>",
]

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
          r"\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace("{1,3}", "")


def split(pattern):
    return pre.Split(Regex(pattern), "isolated")


def pre_tokenizers():
    """By name, each ending in a ByteLevel that maps bytes to the alphabet."""
    plain = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2 = pre.ByteLevel(add_prefix_space=False, use_regex=True)
    return {
        "gpt-2": gpt2,
        "llama-bpe": pre.Sequence([split(LLAMA3), plain]),
        "qwen2": pre.Sequence([split(QWEN2), plain]),
        "smollm": pre.Sequence([pre.Digits(individual_digits=True), gpt2]),
        "falcon": pre.Sequence([pre.Punctuation("contiguous"), split(GPT2), split("[0-9][0-9][0-9]"), plain]),
        # The punctuation of "default" does not hold the backtick, so Punctuation cannot stand for it.
        "default": pre.Sequence([split(r"[\p{P}$+<=>^~|]+"), split(GPT2), pre.Digits(individual_digits=False),
                                 split("[0-9][0-9][0-9]"), plain]),
    }


def pieces(pre_tokenizer, text):
    result = [text[begin:end] for _, (begin, end) in pre_tokenizer.pre_tokenize_str(text)]
    assert "".join(result) == text, text
    return result


def ids(tokenizer, texts):
    return [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]


def make_byte_bpe(shared):
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
    trained.train_from_iterator([TRAINING], trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False))
    trained.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("</tool>", normalized=False)])
    model = json.loads(trained.to_str())
    vocabulary = trained.get_vocab(with_added_tokens=True)
    tokens = sorted(vocabulary, key=vocabulary.get)
    assert [vocabulary[token] for token in tokens] == list(range(len(tokens)))

    result = {
        "made_by": "tools/golden/make_tokenizer_vectors.py",
        "tokens": tokens,
        "control": SPECIAL,
        "user_defined": ["<tool>", "</tool>"],
        "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in model["model"]["merges"]],
        "texts": TEXTS,
        "special_texts": SPECIAL_TEXTS,
        "pre": {},
        "shared": {},
    }
    for name, pre_tokenizer in pre_tokenizers().items():
        model["model"]["ignore_merges"] = name == "llama-bpe"
        tokenizer = Tokenizer.from_str(json.dumps(model))
        tokenizer.pre_tokenizer = pre_tokenizer
        result["pre"][name] = {"pieces": [pieces(pre_tokenizer, text) for text in TEXTS], "ids": ids(tokenizer, TEXTS),
                               "special_ids": ids(tokenizer, SPECIAL_TEXTS)}
    for file in ["smollm2_tokenizer.json", "gpt_neox_20B_tokenizer.json"] if shared else []:
        model = json.loads((shared / "tokenizers" / file).read_text())
        model["normalizer"] = None  # NFC in GPT-NeoX; GGUF knows no normalizers
        result["shared"][file] = ids(Tokenizer.from_str(json.dumps(model)), TEXTS)
    return result


def make_sentence_piece():
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TRAINING.splitlines()), model_writer=writer, model_type="bpe", vocab_size=700,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        allow_whitespace_only_pieces=True, character_coverage=0.99, minloglevel=2)
    model = sentencepiece.SentencePieceProcessor(model_proto=writer.getvalue())
    n = model.get_piece_size()

    def token_type(i):
        return 2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1

    return {
        "made_by": "tools/golden/make_tokenizer_vectors.py",
        "tokens": [model.id_to_piece(i) for i in range(n)],
        "scores": [model.get_score(i) for i in range(n)],
        "types": [token_type(i) for i in range(n)],
        "texts": TEXTS,
        "ids": [model.encode(text) for text in TEXTS],
    }


def write(path, content):
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{path}: {path.stat().st_size} bytes")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=pathlib.Path, help="adds ids for the vocabularies that lie in DIR/tokenizers")
    parser.add_argument("--out", type=pathlib.Path, default="tests/data/tokenizers")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    write(arguments.out / "byte_bpe.json", make_byte_bpe(arguments.shared))
    write(arguments.out / "sentence_piece.json", make_sentence_piece())


if __name__ == "__main__":
    main()
