"""A selector of one's own, evaluated beside built-in ones at the same number of rows.

    own_selector.py MODEL TEXT [--rows 5%] [--ctx 512] [--windows 4]

`fading` is h2o with a memory that fades: a row's votes are the attention that it received, those of earlier steps worth
less and less.
"""
import argparse

import lesskv


def fading(rows: lesskv.Rows):
    rows.votes *= 0.9
    rows.votes += rows.attention


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--rows", default="10%")
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--windows", type=int, default=4)
    o = parser.parse_args()

    lesskv.register_selector("fading", fading, keeps_votes=True, summary="attention received, the latest first")
    specs = ["full", *(f"{name}({o.rows})" for name in ("window", "h2o", "tova", "fading"))]
    model = lesskv.Model(o.model)
    rows = model.evaluate_rows([o.text], kv=specs, ctx=o.ctx, windows=o.windows, divergence=True)
    for spec, row in zip(specs, rows):
        print(f"{spec:14} KL {row['kl_mean']:.4f}  {row['kv_bytes'] / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
