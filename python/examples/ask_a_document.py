"""ask_a_document.py MODEL DOCUMENT QUESTION: streams a long document through a small cache, then asks.

    python ask_a_document.py models/lesskv-small.gguf docs/sample.txt "The sea was" --kv "window(25%)"

The document is read a chunk at a time, so that memory stays at the cache's own size however long it is.
"""
import argparse
import sys

import lesskv


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("document")
    parser.add_argument("question")
    parser.add_argument("--kv", default="h2o(10%)")
    parser.add_argument("--ctx", type=int, default=2048)
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--predict", type=int, default=40)
    args = parser.parse_args()
    model = lesskv.Model(args.model)
    document = model.tokenize(open(args.document).read())
    tokens = document[: args.ctx - args.predict - len(model.tokenize(args.question))]
    if len(tokens) < len(document):
        print(f"the context of {args.ctx} holds the first {len(tokens)} of {len(document)} tokens (--ctx)", file=sys.stderr)
    sequence = model.sequence(kv=f"{args.kv}+prefill(chunk={args.chunk})", ctx=args.ctx)
    sequence.prefill(tokens)
    stats = sequence.stats
    print(f"read {stats.tokens_seen} tokens: {stats.kv_bytes / 1024:.0f} KiB, {stats.tokens_resident:.0f} rows a head; "
          f"a full f16 cache takes {stats.kv_bytes_full / 1024:.0f} KiB\n\n{args.question}", end="")
    for text in sequence.generate(args.question, max_tokens=args.predict, temperature=0):
        print(text, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
