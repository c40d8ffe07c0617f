"""lesskv: large language models with a key-value cache that stays small.

    import lesskv
    model = lesskv.Model("model.gguf")
    sequence = model.sequence(kv="h2o(5%)", ctx=2048)
    for text in sequence.generate("The sea was", max_tokens=40):
        print(text, end="", flush=True)
    print(sequence.stats)

`Model` loads weights, tokenizer and threads; `Sequence` is one text with its cache; `Cache` is the cache alone, over NumPy
arrays, for layers of your own; `lesskv.transformers` puts it under Hugging Face's models. Cache specs are those of the
program (`lesskv methods` lists them), and of `register_selector`. Failures are `lesskv.Error` with the program's own
sentence. Calls that compute release the GIL.
"""
from ._c import Error, version
from .cache import Cache
from .model import Model, Plan, Result, Sequence, Stats
from .selector import Rows, register_selector
from .sweeps import sweep, sweep_rows

__all__ = ["Cache", "Error", "Model", "Plan", "Result", "Rows", "Sequence", "Stats", "register_selector", "sweep",
           "sweep_rows", "version"]
__version__ = version()
