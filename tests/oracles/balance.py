"""MBQ's gradient ratio as one would write it first: the whole graph, every gradient kept, tokens looked at one by one.

Written from section 3 of arXiv 2412.19509, with none of the product's code.
"""

import statistics

import torch


def output_gradients(model, batch, paths, seq2seq):
    """dL/dY at the outputs of the modules at `paths`, [samples, tokens, channels]; L sums over the answers' tokens."""
    outputs = {}

    def keep(path):
        def hook(_module, _args, out):
            out.retain_grad()
            outputs[path] = out

        return hook

    handles = [model.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    logits = model(**batch, use_cache=False).logits
    loss = torch.zeros(())
    for sample, labels in enumerate(batch["labels"].tolist()):
        for place, label in enumerate(labels):
            if label == -100 or (place == 0 and not seq2seq):
                continue
            reads = place if seq2seq else place - 1
            loss = loss - torch.log_softmax(logits[sample, reads], -1)[label]
    loss.backward()
    for handle in handles:
        handle.remove()
    samples = len(batch["labels"])
    found = {}
    for path, out in outputs.items():
        gradient = torch.zeros_like(out) if out.grad is None else out.grad
        found[path] = gradient.reshape(samples, -1, gradient.shape[-1])
    model.zero_grad()
    return found


def kinds(batch, image_ids, seq2seq):
    """Rows of words: vision, text, answer (a text token at which an answer's prediction is read) or padding."""
    rows = []
    for sample, ids in enumerate(batch["input_ids"].tolist()):
        row = []
        for place, token in enumerate(ids):
            if "attention_mask" in batch and not batch["attention_mask"][sample, place]:
                row.append("padding")
            elif token in image_ids:
                row.append("vision")
            elif not seq2seq and place + 1 < len(ids) and batch["labels"][sample, place + 1] != -100:
                row.append("answer")
            else:
                row.append("text")
        rows.append(row)
    return rows


class Means:
    """Mean absolute gradient over the tokens of a kind; answers are text, too."""

    def __init__(self):
        self.sums, self.counts = {}, {}

    def add(self, gradient, words):
        for tokens, row in zip(gradient, words, strict=True):
            for token, word in zip(tokens, row, strict=True):
                for kind in {"answer": ("answer", "text")}.get(word, (word,)):
                    self.sums[kind] = self.sums.get(kind, 0.0) + float(token.abs().mean())
                    self.counts[kind] = self.counts.get(kind, 0) + 1

    def __getitem__(self, kind):
        return self.sums[kind] / self.counts[kind] if kind in self.sums else None

    def ratio(self):
        below = self["text"] if self["answer"] is None else self["answer"]
        return self["vision"] / below


def lift(ratios):
    """Every layer's ratio, at least the median over layers."""
    return [max(r, statistics.median(ratios)) for r in ratios]
