"""A checkpoint whose experts are MXFP4, as gpt-oss is released, is extracted as it is.

Shapes: E experts, I inputs and O outputs of an expert's projection.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from specx.extract.config import ExtractConfig
from specx.extract.pipeline import run
from specx.storage.reader import FeatureReader
from specx.storage.store import FeatureStore

FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
"""Magnitudes of e2m1 (OCP Microscaling Formats 1.0, table 5); the fourth bit is the sign."""
BLOCK = 32
EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return blocks (E, O, I / 32, 16) and scales (E, O, I / 32) uint8 of a weight (E, I, O), and what they say."""
    blocks = weight.float().transpose(1, 2).unflatten(2, (-1, BLOCK))
    exponent = (blocks.abs().amax(-1).clamp_min(2.0**-100).log2().floor() - 2).clamp_min(-100)
    scaled = blocks / exponent.exp2()[..., None]
    magnitude = (scaled.abs()[..., None] - FP4).abs().argmin(-1)
    code = (magnitude + 8 * (scaled < 0)).to(torch.uint8)
    values = (FP4[magnitude] * scaled.sign() * exponent.exp2()[..., None]).flatten(2).transpose(1, 2)
    packed = code[..., 0::2] | (code[..., 1::2] << 4)
    return packed.contiguous(), (exponent + 127).to(torch.uint8), values.to(torch.bfloat16).contiguous()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, target: Path) -> tuple[Path, Path]:
    """The tiny target with MXFP4 experts, and the same function with bfloat16 ones."""
    folder = tmp_path_factory.mktemp("mxfp4")
    packed, plain = (Path(shutil.copytree(target, folder / name)) for name in ("packed", "plain"))
    packed_tensors, plain_tensors = {}, {}
    for name, tensor in load_file(target / "model.safetensors").items():
        if name.endswith(EXPERT_WEIGHTS):
            packed_tensors[f"{name}_blocks"], packed_tensors[f"{name}_scales"], plain_tensors[name] = quantize(tensor)
        else:
            packed_tensors[name] = plain_tensors[name] = tensor
    save_file(packed_tensors, packed / "model.safetensors", metadata={"format": "pt"})
    save_file(plain_tensors, plain / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((packed / "config.json").read_text())
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    (packed / "config.json").write_text(json.dumps(config))
    return packed, plain


def test_features_of_mxfp4_experts_are_those_of_the_same_weights_in_bfloat16(
    checkpoints: tuple[Path, Path], regen: Path, tmp_path: Path
) -> None:
    stores = []
    for number, checkpoint in enumerate(checkpoints):
        path = tmp_path / str(number)
        run(ExtractConfig(target=str(checkpoint), data=(str(regen / "train.parquet"),), store=str(path), limit=5))
        stores.append(FeatureStore.open(path))
    packed, plain = stores
    assert packed.info.target.weights_hash != plain.info.target.weights_hash
    assert packed.info.compute_dtype == "bfloat16"
    for number in range(5):
        found, expected = (FeatureReader(store).features(number) for store in stores)
        for name, values in expected.arrays().items():
            assert found.arrays()[name].tobytes() == values.tobytes(), name
