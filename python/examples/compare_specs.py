"""compare_specs.py MODEL TEXT SPEC...: what each cache costs on your own text, as a table and a picture (KL against bytes).

    python compare_specs.py models/lesskv-small.gguf docs/sample.txt full "h2o(5%)" "h2o(5%)+less" "full+q4" "window(10%)"
"""
import argparse

import lesskv


def picture(rows, path, width=560, height=360, margin=60):
    """KL against bytes, one point a cache, as an SVG."""
    most_bytes, most_kl = (max(r[key] for r in rows) or 1 for key in ("kv_bytes", "kl_mean"))
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="12">',
             f'<path d="M{margin} 10V{height - margin}H{width - 10}" fill="none" stroke="black"/>',
             f'<text x="{width // 2}" y="{height - 20}">cache, KiB (to {most_bytes // 1024})</text>',
             f'<text x="10" y="20">KL from full, nats (to {most_kl:.3f})</text>']
    for row in rows:
        x = margin + row["kv_bytes"] / most_bytes * (width - 2 * margin)
        y = height - margin - row["kl_mean"] / most_kl * (height - 2 * margin)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"/><text x="{x + 7:.1f}" y="{y - 5:.1f}">{row["kv_spec"]}</text>')
    with open(path, "w") as out:
        out.write("\n".join(parts + ["</svg>"]) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("specs", nargs="+")
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--out", default="kl_by_bytes.svg")
    args = parser.parse_args()
    model = lesskv.Model(args.model)
    rows = model.evaluate_rows([args.text], kv=args.specs, ctx=args.ctx, windows=args.windows, divergence=True)
    for row in sorted(rows, key=lambda r: r["kv_bytes"]):
        print(f"{row['kv_bytes'] / 1024:10.1f} KiB  KL {row['kl_mean']:.4f}  same top 1 {100 * row['same_top1']:.1f} %  {row['kv_spec']}")
    picture(rows, args.out)
    print(f"{args.out}: KL against bytes")


if __name__ == "__main__":
    main()
