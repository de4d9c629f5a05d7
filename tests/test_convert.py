"""Weights in taming's and CLIP-GEN's own files: what they are written from and what is read give the same pictures."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from clipgen_modules import ClipGenTransformer, ClipGenVQGAN
from taming.modules.diffusionmodules.model import Decoder, Encoder
from taming.modules.vqvae.quantize import VectorQuantizer
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.model.convert import convert, read_weights
from pipeline.model.prior import ImagePrior
from pipeline.model.vqgan import VQGAN

REPO = Path(__file__).resolve().parent.parent
SIDE = 16


class TamingVQModel(nn.Module):
    """taming.models.vqgan.VQModel's parts under its names, its loss included."""

    def __init__(self) -> None:
        super().__init__()
        shape = {"ch": 32, "out_ch": 3, "ch_mult": (1, 2, 4), "num_res_blocks": 2, "attn_resolutions": (8, 4)}
        shape |= {"in_channels": 3, "resolution": SIDE, "z_channels": 24, "dropout": 0.0}
        self.encoder, self.decoder = Encoder(double_z=False, **shape), Decoder(**shape)
        self.loss = nn.ModuleDict({"discriminator": nn.Conv2d(3, 4, 4), "perceptual_loss": nn.Conv2d(3, 4, 3)})
        self.quantize = VectorQuantizer(40, 12, beta=0.25)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(24, 12, 1), nn.Conv2d(12, 24, 1)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        quantized, _, (_, _, codes) = self.quantize(self.quant_conv(self.encoder(pictures)))
        return self.decoder(self.post_quant_conv(quantized)), codes.view(len(pictures), -1)


def seeded(model: nn.Module) -> Any:
    """Values that show a tensor in the wrong place: norms and biases are not at their start."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def taming(tmp_path_factory: pytest.TempPathFactory) -> tuple[TamingVQModel, Path]:
    """A Lightning checkpoint as taming's training leaves it."""
    from omegaconf import OmegaConf
    from pytorch_lightning.callbacks import ModelCheckpoint

    torch.manual_seed(0)
    model = seeded(TamingVQModel())
    path = tmp_path_factory.mktemp("taming") / "last.ckpt"
    content = {
        "epoch": 12,
        "global_step": 3456,
        "pytorch-lightning_version": "1.0.8",
        # Lightning 1.0 used the callback's class as a key.
        "callbacks": {ModelCheckpoint: {"best_model_score": torch.tensor(0.5), "best_model_path": "x.ckpt"}},
        "checkpoint_callback": ModelCheckpoint(dirpath=str(path.parent)),
        "hyper_parameters": OmegaConf.create({"ddconfig": {"ch": 32, "ch_mult": [1, 2, 4]}, "lossconfig": None}),
        "optimizer_states": [{"state": defaultdict(dict, {0: {"step": 1}}), "param_groups": []}],
        "lr_schedulers": [],
        "state_dict": model.state_dict(),
    }
    torch.save(content, path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    return model, path


def test_a_taming_checkpoint(taming: tuple[TamingVQModel, Path], pictures: Tensor, tmp_path: Path) -> None:
    model, path = taming
    words = [
        sys.executable,
        "pipeline/convert_weights.py",
        str(path),
        "--out",
        str(tmp_path),
        "--resolution",
        str(SIDE),
    ]
    told = subprocess.run(words, cwd=REPO, capture_output=True, text=True, timeout=240)
    assert told.returncode == 0, told.stderr
    assert "taming VQGAN" in told.stdout
    assert "dropped: 4 of loss" in told.stdout
    read = VQGAN.load(tmp_path)
    assert (read.config.ch_mult, read.config.attn_resolutions, read.config.num_res_blocks) == ((1, 2, 4), (8, 4), 2)
    with torch.no_grad():
        wanted, codes = model(pictures)
    assert len(codes.unique()) > 2
    assert torch.equal(read.codes(pictures), codes)
    with torch.no_grad():
        assert torch.equal(read(pictures)[0], wanted)


def test_a_clipgen_vqgan(pictures: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"ch": 32, "ch_mult": (1, 2, 2), "blocks": 2, "attn": (8,), "side": SIDE}
    model = seeded(ClipGenVQGAN(codes=30, z=16, **sizes))
    torch.save({"model": model.state_dict(), "epoch": 799}, tmp_path / "vqgan_coco.pt")
    made = convert(tmp_path / "vqgan_coco.pt", resolution=SIDE)
    assert (made.format, made.dropped) == ("CLIP-GEN VQGAN", {"discriminator.": 7})
    made.model.save(tmp_path / "vqgan")
    read = VQGAN.load(tmp_path / "vqgan")
    assert read.config.norm_eps == 1e-5
    with torch.no_grad():
        codes = model.codes(pictures)
        wanted = model.pictures(codes).clamp(-1, 1)
    assert len(codes.unique()) > 2
    assert torch.equal(read.codes(pictures), codes)
    # Two forms of attention: the order of summation is all that differs.
    assert torch.allclose(read.pictures(codes), wanted, atol=3e-5)
    assert wanted.std() > 0.1


def test_a_clipgen_transformer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = seeded(ClipGenTransformer(codes=20, layers=3, wide=128, heads=2, length=9, embed=6))
    torch.save({"model": model.state_dict(), "epoch": 199}, tmp_path / "gpt_coco.pt")
    made = convert(tmp_path / "gpt_coco.pt")
    assert made.dropped == {"mask": 3}
    made.model.save(tmp_path / "prior")
    read = ImagePrior.load(tmp_path / "prior")
    assert (read.config.n_tokens, read.config.heads, read.config.layers) == (9, 2, 3)
    embedding = F.normalize(torch.randn(4, 6), dim=-1)
    codes = torch.randint(20, (4, 9))
    with torch.no_grad():
        wanted, found = model(codes[:, :-1], embedding), read(embedding, codes)
    assert torch.allclose(found, wanted, atol=1e-4), (found - wanted).abs().max()
    drawn = read.sample(embedding, temperature=0)
    for n in range(9):
        with torch.no_grad():
            assert torch.equal(model(drawn[:, :n], embedding)[:, -1].argmax(-1), drawn[:, n])


def test_the_gate_names_what_does_not_fit(taming: tuple[TamingVQModel, Path], tmp_path: Path) -> None:
    weights = taming[0].state_dict()
    bad = {k: v for k, v in weights.items() if k != "decoder.conv_in.bias"}
    bad |= {"extra.weight": torch.zeros(1), "post_quant_conv.weight": torch.zeros(2, 2)}
    torch.save({"state_dict": bad}, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match="does not fit") as told:
        convert(tmp_path / "bad.ckpt", resolution=SIDE)
    for fault in (
        "missing decoder.conv_in.bias",
        "unexpected extra.weight",
        "post_quant_conv.weight is [2, 2] instead",
    ):
        assert fault in str(told.value)
    torch.save({"state_dict": {"quantize.embed.weight": torch.zeros(1)}}, tmp_path / "gumbel.ckpt")
    with pytest.raises(ValueError, match="Gumbel"):
        convert(tmp_path / "gumbel.ckpt")
    torch.save({"state_dict": {"fc.weight": torch.zeros(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="neither a VQGAN of taming"):
        convert(tmp_path / "other.ckpt")
    for name, content in (("text.ckpt", b"no checkpoint"), ("old.pt", pickle.dumps({"model": 1}))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            convert(tmp_path / name)


class Dangerous:
    """What it pickles to would be called by a plain unpickler."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


def test_nothing_that_a_file_pickles_is_run(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("alive")
    dangers = {
        "remove": Dangerous(os.remove, str(victim)),
        "call": Dangerous(subprocess.call, ["rm", str(victim)]),
        "eval": Dangerous(eval, f"__import__('os').remove({str(victim)!r})"),
    }
    for name, danger in dangers.items():
        torch.save({"callbacks": danger, "state_dict": {"a": torch.zeros(1)}}, tmp_path / name)
    # torch refuses some modules by name; all else is an empty shell.
    with pytest.raises(ValueError, match=r"module (posix|os|nt) is blocked"):
        read_weights(tmp_path / "remove")
    for name in ("call", "eval"):
        assert set(read_weights(tmp_path / name)) == {"a"}
    assert victim.read_text() == "alive"
