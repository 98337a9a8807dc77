"""What is inside a block: one `Layout` for each block class that svlm knows.

A layout lists the linears of a block as steps in the order in which they run. The linears of one step receive one and
the same input tensor, so they share their input statistics, and quantizing step after step is "true-sequential" GPTQ
(arXiv 2210.17323). Where a norm's output goes to a step and nowhere else, the step names it: a per-channel scale may
then be moved between the two (SmoothQuant, arXiv 2211.10438; AWQ, arXiv 2306.00978). tests/compress/test_anatomy.py
traces a real forward of every family and holds each claim of this table against it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import ModelError, did_you_mean

ROLES = frozenset(
    [f"{kind}.{part}" for kind in ("attn", "cross") for part in ("q", "k", "v", "qkv", "o")]
    + ["mlp.gate", "mlp.up", "mlp.down", "mlp.gate_up", "other"]
)


@dataclass(frozen=True)
class Step:
    """Linears that receive the same input tensor: (role, path inside the block), and the norm that feeds only them."""

    linears: tuple[tuple[str, str], ...]
    norm: str | None = None


@dataclass(frozen=True)
class Layout:
    """The linears of one class of blocks.

    Attributes:
        steps: in order of execution. A linear that a certain block lacks (cross-attention in every other layer, plain
            or gated MLP) is left out; a linear that the block has and no step names is an error.
        head_dim: dotted attribute of the block that holds the width of one attention head.
        rotary: whether queries and keys are rotated by position.
        norms_if: dotted attribute of the block; the steps' norms hold only where it is true.
        entry: a norm of the block whose output the first step alone reads, but with the channels of several positions
            side by side (patch merging): input channel j of its linears is channel ``j % width`` of the norm.
        matrix: a bare parameter [inputs, outputs] that reads `entry` in place of linears.
        qk_norms: modules that queries and keys, heads not yet split, pass through before attention.
    """

    steps: tuple[Step, ...]
    head_dim: str | None = None
    rotary: bool = False
    norms_if: str | None = None
    entry: str | None = None
    matrix: str | None = None
    qk_norms: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str = "") -> Layout:
        """Read a layout as a row file writes it: ``{steps: [{norm: ..., linears: {attn.q: path}}], head_dim: ...}``.

        Raises:
            ModelError: an unknown key or role.
        """
        _only(data, {"steps", "head_dim", "rotary", "norms_if", "entry", "matrix", "qk_norms"}, where)
        steps = []
        for row in data["steps"]:
            _only(row, {"norm", "linears"}, where)
            pairs = []
            for role, paths in row["linears"].items():
                if role not in ROLES:
                    raise ModelError(f"no such role: '{role}'", where=where, change=did_you_mean(role, ROLES))
                pairs += [(role, path) for path in ([paths] if isinstance(paths, str) else paths)]
            steps.append(Step(tuple(pairs), row.get("norm")))
        names = {key: data.get(key) for key in ("head_dim", "norms_if", "entry", "matrix")}
        rotary, qk_norms = bool(data.get("rotary", False)), tuple(data.get("qk_norms", ()))
        return cls(tuple(steps), rotary=rotary, qk_norms=qk_norms, **names)

    def to_json(self) -> dict[str, Any]:
        steps = []
        for step in self.steps:
            linears: dict[str, list[str]] = {}
            for role, path in step.linears:
                linears.setdefault(role, []).append(path)
            steps.append({"norm": step.norm, "linears": linears})
        names = ("head_dim", "rotary", "norms_if", "entry", "matrix")
        return {"steps": steps, **{n: getattr(self, n) for n in names}, "qk_norms": list(self.qk_norms)}


def _only(data: Mapping[str, Any], known: set[str], where: str) -> None:
    for key in data:
        if key not in known:
            raise ModelError(f"no such key in an anatomy row: '{key}'", where=where, change=did_you_mean(key, known))


def _step(norm: str | None = None, /, **linears: str) -> Step:
    """`_step("norm1", attn_q="attn.q_proj")`: roles are written with an underscore in place of the first dot."""
    return Step(tuple((role.replace("_", ".", 1), path) for role, path in linears.items()), norm)


def _attention(
    norm: str | None, module: str, out: str, *, q: str = "q_proj", k: str = "k_proj", v: str = "v_proj"
) -> tuple[Step, ...]:
    inputs = _step(norm, attn_q=f"{module}.{q}", attn_k=f"{module}.{k}", attn_v=f"{module}.{v}")
    return inputs, _step(attn_o=f"{module}.{out}")


def _cross(
    module: str, out: str, *, q: str = "q_proj", k: str = "k_proj", v: str = "v_proj", norm: str | None = None
) -> tuple[Step, ...]:
    return (
        _step(norm, cross_q=f"{module}.{q}"),
        _step(cross_k=f"{module}.{k}", cross_v=f"{module}.{v}"),
        _step(cross_o=f"{module}.{out}"),
    )


def _fused(norm: str | None, qkv: str, out: str) -> tuple[Step, ...]:
    return _step(norm, attn_qkv=qkv), _step(attn_o=out)


def _mlp(norm: str | None, up: str, down: str) -> tuple[Step, ...]:
    return _step(norm, mlp_up=up), _step(mlp_down=down)


def _gated(
    norm: str | None, gate: str = "mlp.gate_proj", up: str = "mlp.up_proj", down: str = "mlp.down_proj"
) -> tuple[Step, ...]:
    return _step(norm, mlp_gate=gate, mlp_up=up), _step(mlp_down=down)


def _llama(before_mlp: str = "post_attention_layernorm") -> Layout:
    steps = _attention("input_layernorm", "self_attn", "o_proj") + _gated(before_mlp)
    return Layout(steps, "self_attn.head_dim", rotary=True)


def _clip() -> Layout:
    steps = _attention("layer_norm1", "self_attn", "out_proj") + _mlp("layer_norm2", "mlp.fc1", "mlp.fc2")
    return Layout(steps, "self_attn.head_dim")


def _vit() -> Layout:
    steps = _attention("layernorm_before", "attention", "o_proj") + _mlp("layernorm_after", "mlp.fc1", "mlp.fc2")
    return Layout(steps, "attention.head_dim")


def _bart(cross: bool, pre_norm: bool = False) -> Layout:
    """Post-norm (BART, TrOCR): a norm's output also goes on as the residual, so no norm feeds a step alone."""
    steps = _attention("self_attn_layer_norm" if pre_norm else None, "self_attn", "out_proj")
    if cross:
        steps += _cross("encoder_attn", "out_proj", norm="encoder_attn_layer_norm" if pre_norm else None)
    return Layout(steps + _mlp("final_layer_norm" if pre_norm else None, "fc1", "fc2"), "self_attn.head_dim")


def _qwen_vision(mlp: tuple[Step, ...]) -> Layout:
    return Layout(_fused("norm1", "attn.qkv", "attn.proj") + mlp, "attn.head_dim", rotary=True)


def _davit(attention: str, windows: bool) -> Layout:
    # windows are cut between the norm and the qkv linear: not the same tensor any more, hence no norm
    norm = None if windows else "norm1"
    steps = _fused(norm, f"{attention}.qkv", f"{attention}.proj")
    return Layout(steps + _mlp("norm2", "ffn.fc1", "ffn.fc2"))


def _projector(*linears: str, norm: str | None = None, norms_if: str | None = None, entry: str | None = None) -> Layout:
    steps = (_step(norm, other=linears[0]),) if len(linears) == 1 else _mlp(norm, *linears)
    return Layout(steps, norms_if=norms_if, entry=entry)


LAYOUTS: dict[str, Layout] = {
    # vision towers
    "CLIPEncoderLayer": _clip(),
    "SiglipEncoderLayer": _clip(),
    "Siglip2EncoderLayer": _clip(),
    "Idefics3EncoderLayer": _clip(),
    "SmolVLMEncoderLayer": _clip(),
    "Blip2EncoderLayer": Layout(
        _fused("layer_norm1", "self_attn.qkv", "self_attn.projection") + _mlp("layer_norm2", "mlp.fc1", "mlp.fc2"),
        "self_attn.head_dim",
    ),
    "ViTLayer": _vit(),
    "DeiTLayer": _vit(),
    "InternVLVisionLayer": Layout(
        _attention("layernorm_before", "attention", "projection_layer") + _mlp("layernorm_after", "mlp.fc1", "mlp.fc2"),
        "attention.head_dim",
        qk_norms=("attention.q_norm", "attention.k_norm"),
    ),
    "PixtralAttentionLayer": Layout(
        _attention("attention_norm", "attention", "o_proj")
        + _gated("ffn_norm", "feed_forward.gate_proj", "feed_forward.up_proj", "feed_forward.down_proj"),
        "attention.head_dim",
        rotary=True,
    ),
    "Qwen2VLVisionBlock": _qwen_vision(_mlp("norm2", "mlp.fc1", "mlp.fc2")),
    "Qwen2_5_VLVisionBlock": _qwen_vision(_gated("norm2")),
    "Qwen3VLVisionBlock": _qwen_vision(_mlp("norm2", "mlp.linear_fc1", "mlp.linear_fc2")),
    "Florence2VisionSpatialBlock": _davit("window_attn", windows=True),
    "Florence2VisionChannelBlock": _davit("channel_attn", windows=False),
    "DonutSwinLayer": Layout(
        _attention(None, "attention", "output.dense", q="self.query", k="self.key", v="self.value")
        + _mlp("layernorm_after", "intermediate.dense", "output.dense"),
        "attention.self.attention_head_size",
    ),
    "SwinLayer": Layout(
        _attention(None, "attention", "o_proj") + _mlp("layernorm_after", "mlp.fc1", "mlp.fc2"), "attention.head_dim"
    ),
    "DonutSwinPatchMerging": _projector("reduction", norm="norm"),
    "SwinPatchMerging": _projector("reduction", norm="norm"),
    # connectors
    "LlavaMultiModalProjector": _projector("linear_1", "linear_2"),
    "LlavaNextMultiModalProjector": _projector("linear_1", "linear_2"),
    "LlavaOnevisionMultiModalProjector": _projector("linear_1", "linear_2"),
    "InternVLMultiModalProjector": _projector("linear_1", "linear_2", norm="layer_norm"),
    "PaliGemmaMultiModalProjector": _projector("linear"),
    "Gemma3MultiModalProjector": Layout((), entry="mm_soft_emb_norm", matrix="mm_input_projection_weight"),
    "Florence2MultiModalProjector": _projector("image_projection"),
    "Idefics3Connector": _projector("modality_projection.proj"),
    "SmolVLMConnector": _projector("modality_projection.proj"),
    "PatchMerger": _projector("mlp.0", "mlp.2", entry="ln_q"),
    "Qwen2_5_VLPatchMerger": _projector("mlp.0", "mlp.2", entry="ln_q"),
    "Qwen3VLVisionPatchMerger": _projector(
        "linear_fc1", "linear_fc2", norm="norm", norms_if="use_postshuffle_norm", entry="norm"
    ),
    "Blip2QFormerLayer": Layout(
        _attention(None, "attention", "output.dense", q="attention.query", k="attention.key", v="attention.value")
        + _cross("crossattention", "output.dense", q="attention.query", k="attention.key", v="attention.value")
        + _mlp(None, "intermediate_query.dense", "output_query.dense"),
        "attention.attention.attention_head_size",
    ),
    # language models
    **dict.fromkeys(
        [
            "LlamaDecoderLayer",
            "MistralDecoderLayer",
            "Qwen2DecoderLayer",
            "Qwen3DecoderLayer",
            "Qwen2VLDecoderLayer",
            "Qwen2_5_VLDecoderLayer",
            "Qwen3VLTextDecoderLayer",
            "GemmaDecoderLayer",
        ],
        _llama(),
    ),
    "Gemma2DecoderLayer": _llama("pre_feedforward_layernorm"),
    "Gemma3DecoderLayer": _llama("pre_feedforward_layernorm"),
    "Phi3DecoderLayer": Layout(
        (
            *_fused("input_layernorm", "self_attn.qkv_proj", "self_attn.o_proj"),
            _step("post_attention_layernorm", mlp_gate_up="mlp.gate_up_proj"),
            _step(mlp_down="mlp.down_proj"),
        ),
        "self_attn.head_dim",
        rotary=True,
    ),
    "OPTDecoderLayer": Layout(
        _attention("self_attn_layer_norm", "self_attn", "out_proj") + _mlp("final_layer_norm", "fc1", "fc2"),
        "self_attn.head_dim",
        norms_if="do_layer_norm_before",
    ),
    "T5Block": Layout(
        _attention("layer.0.layer_norm", "layer.0.SelfAttention", "o", q="q", k="k", v="v")
        + _cross("layer.1.EncDecAttention", "o", q="q", k="k", v="v", norm="layer.1.layer_norm")
        + tuple(
            step
            for i in (1, 2)
            for step in (
                _step(
                    f"layer.{i}.layer_norm",
                    mlp_gate=f"layer.{i}.DenseReluDense.wi_0",
                    mlp_up=f"layer.{i}.DenseReluDense.wi_1",
                ),
                _step(f"layer.{i}.layer_norm", mlp_up=f"layer.{i}.DenseReluDense.wi"),
                _step(mlp_down=f"layer.{i}.DenseReluDense.wo"),
            )
        ),
        "layer.0.SelfAttention.key_value_proj_dim",
    ),
    "BartEncoderLayer": _bart(cross=False),
    "BartDecoderLayer": _bart(cross=True),
    "TrOCRDecoderLayer": _bart(cross=True),
    "MBartEncoderLayer": _bart(cross=False, pre_norm=True),
    "MBartDecoderLayer": _bart(cross=True, pre_norm=True),
    # what passes put onto a model
    "QueryCompressor": Layout(tuple(_step(other=f"{part}_proj") for part in "qkvo")),
    # a linear that is a unit of its own
    "Linear": Layout((_step(other=""),)),
}
