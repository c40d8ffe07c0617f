"""The kvpress side of compare.py: a model under a press, which rows it keeps, and the token after them."""
import time

import kvpress
import torch
import transformers
from kvpress.presses.kvzap_press import KVzapConfig, KVzapModel


def make_press(method, ratio, o):
    """The press of a method, None for the full cache; o: rows.Options."""
    if method == "full":
        return None
    if method == "window":
        return kvpress.StreamingLLMPress(ratio, n_sink=o.sinks)
    if method == "snapkv":
        return kvpress.SnapKVPress(ratio, window_size=o.window, kernel_size=o.kernel)
    if method == "ada":
        return kvpress.AdaKVPress(make_press("snapkv", ratio, o), alpha_safeguard=o.alpha)
    if method == "pyramid":
        return kvpress.PyramidKVPress(ratio, window_size=o.pyramid_window, kernel_size=o.kernel, beta=o.beta)
    if method == "think":
        return kvpress.ThinKPress(o.channels, window_size=o.window)
    if method == "think-window":
        return WindowWhole(o.channels, window_size=o.window)
    if method == "kvzap":
        return TrainedScores(ratio, o.sidecar)
    raise ValueError(f"no method '{method}'")


class WindowWhole(kvpress.ThinKPress):
    """ThinKPress but for the newest window_size keys, which keep all channels as in the paper."""

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        newest = keys[:, :, -self.window_size:].clone()
        pruned, values = super().compress(module, hidden_states, keys, values, attentions, kwargs)
        pruned[:, :, -self.window_size:] = newest
        return pruned, values


class TrainedScores(kvpress.KVzapPress):
    """KVzapPress with a sidecar's scores (docs/formats.md) in place of those that NVIDIA published for other models."""

    def __init__(self, ratio, sidecar):
        import gguf  # for this press alone
        super().__init__(ratio)
        reader = gguf.GGUFReader(sidecar)
        heads = reader.fields["kvzap.head_count_kv"].contents()
        tensors = {t.name: torch.tensor(t.data) for t in reader.tensors if t.name in ("kvzap.weight", "kvzap.bias")}
        weight, bias = tensors["kvzap.weight"], tensors["kvzap.bias"]
        self.kvzap_model = KVzapModel(KVzapConfig(input_dim=weight.shape[1], output_dim=heads[0], n_modules=len(heads)))
        for layer, w, b in zip(self.kvzap_model.layers, weight.split(heads), bias.split(heads)):
            layer.weight.data, layer.bias.data = w, b

    def post_init_from_model(self, model):  # KVzapPress's own loads the published ones
        pass


class Watch:
    """Tells which rows a press keeps, layer by layer. A press chooses by keys and queries alone, so it is handed
    positions in place of values: those it returns are what it kept, and the values are gathered by them."""

    def __init__(self, press):
        self.press, self.original, self.kept = press, press.compress, {}
        press.compress = self.compress

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        positions = torch.arange(keys.shape[2], dtype=torch.float64)[None, None, :, None].expand_as(values)
        new_keys, kept = self.original(module, hidden_states, keys, positions, attentions, kwargs)
        heads = [set(head.tolist()) for head in kept[0, :, :, 0].long()]
        if isinstance(self.press, kvpress.AdaKVPress):  # masks rows instead of removing them
            for head, row in zip(*(x.tolist() for x in module.masked_key_indices[1:])):
                heads[head].discard(row)
        self.kept[module.layer_idx] = heads
        return new_keys, values.gather(2, kept.long()).contiguous()

    def layers(self):
        return [self.kept[layer] for layer in sorted(self.kept)]


class Model:
    def __init__(self, checkpoint, threads):
        torch.set_num_threads(threads)
        transformers.utils.logging.disable_progress_bar()
        # AdaKVPress refuses eager attention; torch's own kernel sums in another order, no more.
        self.model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32,
                                                                       attn_implementation="sdpa").eval()

    @torch.no_grad()
    def read(self, ids, press):
        """Reads a prompt under a press: its cache, the last token's logits, and the seconds it took."""
        for layer in self.model.model.layers:
            layer.self_attn.masked_key_indices = None  # an earlier AdaKVPress leaves its own
        cache, prompt = transformers.DynamicCache(), torch.tensor([ids])
        start = time.perf_counter()
        if press is None:
            logits = self.model(prompt, past_key_values=cache, logits_to_keep=1).logits
        else:
            with press(self.model):
                logits = self.model(prompt, past_key_values=cache, logits_to_keep=1).logits
        return cache, logits[0, -1].tolist(), time.perf_counter() - start

    @torch.no_grad()
    def step(self, cache, token, position):
        """Logits after one more token at its true position, which sees the rows that were kept."""
        return self.model(torch.tensor([[token]]), past_key_values=cache,
                          position_ids=torch.tensor([[position]])).logits[0, -1].tolist()


def bytes_of(cache):
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
