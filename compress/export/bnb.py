"""bitsandbytes NF4: a model that is not quantized yet, quantized and written by bitsandbytes itself.

For a linear `X` of [out, in]: `X.weight` uint8 [out * in / 2, 1], and beside it `absmax`, `quant_map`, `nested_absmax`,
`nested_quant_map` and `quant_state.bitsandbytes__nf4`.

bitsandbytes 0.50 writes a checkpoint with wrong scales, silently, where a CPU forward came before saving and absmax is
not itself quantized. Nothing is run here before saving, and absmax is quantized too (`bnb_4bit_use_double_quant`).
transformers 5.23 cannot save a model again that it loaded from such a checkpoint (NotImplementedError).
"""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

from ..anatomy import ModelView
from ..errors import ModelError, UsageError
from ..storage import save


def write(view: ModelView, folder: Path) -> tuple[int, list[str]]:
    """Write `view` to `folder` in NF4. Returns the number of packed linears and notes.

    Raises:
        UsageError: a linear is quantized already, or bitsandbytes is not installed.
        ModelError: transformers did not find every weight again.
    """
    if view.grids:
        path, grid = next(iter(view.grids.items()))
        raise UsageError(
            "bnb rounds weights to its own grid, and this model lies on another already",
            where=path,
            found=f"{grid.bits} bits, group {grid.group} ({len(view.grids)} linears)",
            change="export the model as it was before its quantize pass, or choose --format compressed-tensors or gptq",
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError("bitsandbytes is not installed", change="pip install 'svlm[bitsandbytes]'")
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=view.storage_dtype,
    )
    options: dict[str, Any] = {"quantization_config": config, "dtype": view.storage_dtype, "device_map": "cpu"}
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".dense.") as dense:
        save(view, Path(dense) / "model")
        model, info = AutoModelForImageTextToText.from_pretrained(
            Path(dense) / "model", output_loading_info=True, **options
        )
        lost = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
        if lost:
            raise ModelError("bitsandbytes did not find every weight", where=lost[0], found=f"{len(lost)} missing")
        model.save_pretrained(folder)
    packed = [name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"]
    if not packed:
        raise ModelError("bitsandbytes packed no linear of this model", where=str(view.source))
    kept = [ref.path for ref in view.linears() if ref.path not in set(packed)]
    notes = ["rounded by bitsandbytes: answers may differ from the original's, 'svlm verify' does not apply to them"]
    if kept:
        notes.append(f"bitsandbytes keeps {len(kept)} linears dense: {', '.join(kept[:3])}")
    return len(packed), notes
