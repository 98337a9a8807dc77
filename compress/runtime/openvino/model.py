"""A VLM that runs in OpenVINO: the model's own code around graphs that hold all of its weights."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...anatomy import ModelView
from ...errors import UsageError
from ..greedy import Wish, answer, beyond, given
from .attention import of_whole_pictures
from .convert import EMBEDDING, HEAD, MASKED, Call


class Graph:
    """A compiled graph with one request: arrays in, arrays out. Outputs are valid until the next run."""

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled
        self.request = compiled.create_infer_request()
        self.held: list[Any] = []

    def run(self, *inputs: np.ndarray) -> list[np.ndarray]:
        """Arrays are read where they are wherever openvino can, which asks little of Python at each token."""
        from openvino import Tensor as Shared

        self.held = [Shared(np.require(values, requirements=("C", "W")), shared_memory=True) for values in inputs]
        for port, tensor in enumerate(self.held):
            self.request.set_input_tensor(port, tensor)
        self.request.infer()
        return [self.request.get_output_tensor(port).data for port in range(len(self.compiled.outputs))]


class Pictures:
    """A tower's or connector's graph, and, where it can be had, a faster one for pictures without empty places.

    Each is compiled when it is first needed; the latter at once.
    """

    def __init__(self, core: Any, source: Any, settings: Mapping[str, Any]) -> None:
        """`source`: a graph, or the path of one, which is read now: something else may lie there later."""
        self._core, self._settings = core, dict(settings)
        graph = core.read_model(source) if isinstance(source, str) else source
        whole = of_whole_pictures(graph)
        self._later = None if whole is None else graph
        self._graphs = {True: self._compiled(graph if whole is None else whole)}
        if whole is None:
            self._graphs[False] = self._graphs[True]

    def run(self, *inputs: np.ndarray) -> list[np.ndarray]:
        """As `Graph.run`."""
        whole = all(bool(values.all()) for values in inputs if values.dtype == np.bool_)
        if whole not in self._graphs:
            self._graphs[whole], self._later = self._compiled(self._later), None
        return self._graphs[whole].run(*inputs)

    def _compiled(self, graph: Any) -> Graph:
        return Graph(self._core.compile_model(graph, "CPU", self._settings))


def array(tensor: Tensor) -> np.ndarray:
    """A contiguous array of a tensor; floats as float32."""
    tensor = tensor.detach()
    return (tensor.float() if tensor.is_floating_point() else tensor).contiguous().numpy()


class LanguageState:
    """The decoder's graph, and what the tokens after the prompt need to know: their positions and what they may see."""

    def __init__(self, graph: Graph, decoder: nn.Module, kinds: tuple[str, ...], lead: tuple[int, ...]) -> None:
        self.graph, self.decoder, self.kinds, self.lead = graph, decoder, kinds, lead
        self.config: Any = decoder.config
        self.seen: list[np.ndarray] = []
        self.next = np.zeros(0, dtype=np.int64)
        self.beams = np.zeros(0, dtype=np.int32)

    def prompt(self, embeds: Tensor, mask: Any, positions: Tensor | None) -> Tensor:
        """Hidden states [B, q, D] of a prompt; forgets what was before."""
        rows, new = embeds.shape[:2]
        if positions is None:
            flat = mask if isinstance(mask, Tensor) and mask.ndim == 2 else torch.ones(rows, new, dtype=torch.long)
            positions = (flat.long().cumsum(-1) - 1).clamp_min(0) if not self.lead else torch.arange(new)
        positions = positions.expand(*self.lead, rows, new)
        masks = [array(m) for m in self.masks(embeds, mask, positions)]
        self.graph.request.reset_state()
        self.beams = np.arange(rows, dtype=np.int32)
        hidden = self.graph.run(array(embeds), array(positions), *masks, self.beams)[0]
        self.seen = [m[:, :, -1:, :] for m in masks]
        flat_positions = array(positions).reshape(-1, rows, new)
        self.next = flat_positions.max(axis=(0, 2)) + 1
        return torch.from_numpy(hidden.copy())

    def step(self, embeds: np.ndarray) -> np.ndarray:
        """Hidden states [B, 1, D] of one more token."""
        rows = len(embeds)
        self.seen = [np.concatenate([m, np.zeros((rows, 1, 1, 1), np.float32)], 3) for m in self.seen]
        positions = np.broadcast_to(self.next[:, None], (*self.lead, rows, 1))
        masks = [self._windowed(kind, m) for kind, m in zip(self.kinds or ("",), self.seen)]
        hidden = self.graph.run(embeds, np.ascontiguousarray(positions), *masks, self.beams)[0]
        self.next = self.next + 1
        return hidden

    def _windowed(self, kind: str, mask: np.ndarray) -> np.ndarray:
        """`mask` of one new token with what has left the sliding window taken out."""
        window = self.window(kind)
        if not window or mask.shape[3] <= window:
            return mask
        mask = mask.copy()
        mask[..., :-window] = MASKED
        return mask

    def window(self, kind: str) -> int:
        """The sliding window of layers of this kind; 0 where they have none."""
        if kind == "full_attention":
            return 0
        window = getattr(self.config, "sliding_window", None)
        return window if window and getattr(self.config, "use_sliding_window", True) is not False else 0

    def masks(self, embeds: Tensor, mask: Any, positions: Tensor) -> list[Tensor]:
        """What the model's own code makes of `mask`, as values to add to scores: [B, 1, q, q] for each kind."""
        from transformers.masking_utils import create_masks_for_generate

        if not isinstance(mask, dict) and not (isinstance(mask, Tensor) and mask.ndim == 4):
            plain = positions.reshape(-1, *positions.shape[-2:])[0]
            mask = create_masks_for_generate(
                config=self.config,
                inputs_embeds=embeds,
                attention_mask=mask,
                past_key_values=None,
                position_ids=plain,
            )
        given = [mask[kind] if isinstance(mask, dict) else mask for kind in self.kinds or ("",)]
        return [_additive(m, embeds.shape[0], embeds.shape[1]) for m in given]


def mask_kinds(decoder: Any, embeds: Tensor, mask: Any) -> tuple[str, ...]:
    """Kinds of layers that have masks of their own, () where all share one."""
    from transformers.masking_utils import create_masks_for_generate

    if not isinstance(mask, dict) and not (isinstance(mask, Tensor) and mask.ndim == 4):
        mask = create_masks_for_generate(
            config=decoder.config, inputs_embeds=embeds, attention_mask=mask, past_key_values=None, position_ids=None
        )
    return tuple(sorted(mask)) if isinstance(mask, dict) else ()


def _additive(mask: Any, rows: int, new: int) -> Tensor:
    if mask is None:
        return torch.full((new, new), MASKED).triu(1).expand(rows, 1, new, new)
    seen = mask if mask.dtype == torch.bool else mask > MASKED
    return torch.where(seen, 0.0, MASKED).expand(rows, 1, new, new)


def run_image(graph: Pictures, call: Call, args: tuple, kwargs: Mapping[str, Any], where: str) -> Any:
    """A tower's or connector's output, picture by picture: several at once take as long.

    Raises:
        UsageError: pictures of another size than the graph was made for.
    """
    tensors = call.tensors(args, kwargs)
    shapes = [tuple(t.shape[1:]) for t in tensors]
    if shapes != call.shapes:
        raise UsageError(
            "the openvino runtime was converted for pictures of another size",
            where=where,
            found=f"{shapes}, not {call.shapes}",
            change="give pictures as the model's processor makes them, or svlm.load(..., example=batch) with such ones",
        )
    arrays = [array(t) for t in tensors]
    found: list[Tensor] = []
    for i in range(len(arrays[0])):
        outs = graph.run(*(a[i : i + 1] for a in arrays))
        if not found:
            found = [torch.empty(len(arrays[0]), *out.shape[1:]) for out in outs]
        for whole, out in zip(found, outs):
            whole[i : i + 1] = torch.from_numpy(out)
    return call.output(found)


class OpenVINOModel:
    """What `svlm.load(OUT, runtime="openvino")` returns: `generate` and forward as in torch, greedy.

    Attributes:
        config, generation_config: of the model. notes: what became of its constants, and how it is compiled.
    """

    def __init__(
        self,
        view: ModelView,
        graphs: Mapping[str, Graph],
        pictures: Mapping[str, Pictures],
        language: LanguageState,
        calls: Mapping[str, Call],
        notes: dict[str, Any],
    ) -> None:
        self.skeleton, self.view = view.model, view
        self.config, self.generation_config = view.model.config, view.model.generation_config
        self.graphs, self.pictures, self.language = dict(graphs), dict(pictures), language
        self.calls, self.notes = dict(calls), notes
        self.device = torch.device("cpu")
        self.turn = threading.RLock()  # a graph has one request, and the decoder's one cache
        self._attach()

    def _attach(self) -> None:
        """Let the modules of the skeleton run their graphs; hooks on them go on working."""
        for path, call in self.calls.items():
            module = self.skeleton.get_submodule(path)

            def image(*args: Any, _path: str = path, _call: Call = call, **kwargs: Any) -> Any:
                return run_image(self.pictures[_path], _call, args, kwargs, _path)

            module.forward = image
        for name, module in (
            (EMBEDDING, self.skeleton.get_input_embeddings()),
            (HEAD, self.skeleton.get_output_embeddings()),
        ):

            def rows(values: Tensor, *args: Any, _name: str = name, **kwargs: Any) -> Tensor:
                return torch.from_numpy(self.graphs[_name].run(array(values))[0].copy())

            module.forward = rows
        self.view.decoder.forward = self._decode

    def _decode(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        **more: Any,
    ) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPast

        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            raise UsageError(
                "the openvino runtime keeps its own cache", change="call generate, or the model on whole prompts"
            )
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.skeleton.get_input_embeddings()(input_ids)
        hidden = self.language.prompt(inputs_embeds, attention_mask, position_ids)
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=past_key_values)

    @torch.no_grad()
    def __call__(self, **inputs: Any) -> Any:
        """The forward of a whole prompt: logits [B, L, vocabulary]."""
        inputs.pop("use_cache", None)
        with self.turn:
            return self.skeleton(**inputs, use_cache=False)

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, **asked: Any) -> Tensor:
        """Greedy answers, prompt included, as transformers' generate returns them: [B, L + new]. Threads take turns.

        Args:
            inputs: ``input_ids``, [B, L], where they are not given by name. max_new_tokens: default: the model's
                generation config, else 20.

        Raises:
            UsageError: a setting that a greedy answer does not have, or no room for a new token.
        """
        if inputs is not None:
            asked["input_ids"] = inputs
        asked.pop("use_cache", None)  # the graphs have a cache of their own, and the tokens are the same
        if found := beyond(self.skeleton, asked):
            raise UsageError(
                "the openvino runtime generates greedily",
                where=f"generate({found[0]})",
                found=repr(found[1])[:80],
                change="svlm.load(OUT) generates in torch with every setting of transformers",
            )
        config = self.generation_config
        settings = given(config) | {k: asked.pop(k) for k in list(asked) if k in vars(config)}
        limit = settings.get("max_new_tokens")
        if limit is None:
            limit = settings["max_length"] - _length(asked) if settings.get("max_length") else 20
        if limit < 1:
            where = "generate(max_new_tokens)"
            raise UsageError("no new token is asked for", where=where, found=str(limit), change="ask for 1 or more")
        embedding, head = self.graphs[EMBEDDING], self.graphs[HEAD]

        def step(last: np.ndarray) -> np.ndarray:
            hidden = self.language.step(embedding.run(last[:, None])[0])
            return head.run(hidden)[0][:, -1].argmax(-1)

        with self.turn:
            prompt = self.skeleton.generate(**asked, max_new_tokens=1, do_sample=False)
            wish = Wish.of(limit, settings.get("eos_token_id"), settings.get("pad_token_id"))
            tokens = answer(prompt[:, -1].numpy(), step, wish)
        return torch.cat([prompt[:, :-1], torch.from_numpy(tokens)], 1)


def _length(asked: Mapping[str, Any]) -> int:
    """Tokens of the prompts, padding included."""
    return next(asked[key].shape[1] for key in ("input_ids", "inputs_embeds") if key in asked)
