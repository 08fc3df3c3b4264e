"""Tokenizers of pictures: the published layout of Chameleon's, against others' code and a plain formulation of it."""

import re

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_digits
from torch.nn import functional

from unimega.data import images as contract
from unimega.errors import CheckpointError, ConfigError
from unimega.models import vision
from unimega.models.vision.chameleon import ChameleonTokenizer, read_config
from unimega.models.vision.digits import PatchTokenizer
from unimega.models.vision.pixels import square
from unimega.models.vision.vqgan import VQGAN, VQGANConfig

SMALL = VQGANConfig(
    resolution=64,
    base_channels=32,
    multipliers=(1, 1, 2),
    blocks=2,
    attention_sides=(32,),
    latent_channels=48,
    width=24,
    codebook=96,
)


def make(config=SMALL, seed=0):
    torch.manual_seed(seed)
    model = VQGAN(config)
    with torch.no_grad():
        for name, tensor in model.named_parameters():  # norms and biases away from 1 and 0, so that each one counts
            tensor.add_(torch.randn_like(tensor) * (0.3 if "norm" in name or "bias" in name else 0.02))
        seen = model.latents(torch.rand(2, 3, config.resolution, config.resolution) * 2 - 1)
        seen = seen.permute(0, 2, 3, 1).flatten(0, 2)  # rows among the latents: pictures use many codes
        model.quantize.embedding.weight.copy_(seen[torch.randperm(len(seen))[: config.codebook]])
    return model.eval()


def yaml_of(config, **changes):
    sizes = {
        "double_z": False,
        "z_channels": config.latent_channels,
        "resolution": config.resolution,
        "in_channels": 3,
        "out_ch": 3,
        "ch": config.base_channels,
        "ch_mult": list(config.multipliers),
        "num_res_blocks": config.blocks,
        "attn_resolutions": list(config.attention_sides),
        "dropout": 0.0,
    } | changes
    params = {"embed_dim": config.width, "n_embed": config.codebook, "ddconfig": sizes, "lossconfig": {"target": "x"}}
    return yaml.safe_dump({"model": {"target": "taming.models.vqgan.VQModel", "params": params}})


def save(folder, model, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "vqgan.yaml").write_text(yaml_of(model.config, **changes))
    extra = {"loss.discriminator.main.0.weight": torch.ones(2)}
    torch.save({"state_dict": model.state_dict() | extra, "global_step": 3}, folder / "vqgan.ckpt")
    return folder


def plain_swish_norm(x, w, name):
    x = functional.group_norm(x, 32, w[name + ".weight"], w[name + ".bias"], eps=1e-6)
    return functional.silu(x)


def plain_conv(x, w, name, **options):
    return functional.conv2d(x, w[name + ".weight"], w[name + ".bias"], **options)


def plain_residual(x, w, name):
    y = plain_conv(plain_swish_norm(x, w, name + ".norm1"), w, name + ".conv1", padding=1)
    y = plain_conv(plain_swish_norm(y, w, name + ".norm2"), w, name + ".conv2", padding=1)
    return (plain_conv(x, w, name + ".nin_shortcut") if name + ".nin_shortcut.weight" in w else x) + y


def plain_attention(x, w, name):
    normed = functional.group_norm(x, 32, w[name + ".norm.weight"], w[name + ".norm.bias"], eps=1e-6)
    q, k, v = (plain_conv(normed, w, f"{name}.{part}").flatten(2).transpose(1, 2)[:, None] for part in "qkv")
    mixed = functional.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
    return x + plain_conv(mixed, w, name + ".proj_out")


def plain_decode(codes, w):
    """Decoding as taming-transformers describes it, from a table of tensors alone."""
    side = int(codes.shape[1] ** 0.5)
    x = w["quantize.embedding.weight"][codes].transpose(1, 2).reshape(len(codes), -1, side, side)
    x = plain_conv(plain_conv(x, w, "post_quant_conv"), w, "decoder.conv_in", padding=1)
    x = plain_residual(x, w, "decoder.mid.block_1")
    x = plain_residual(plain_attention(x, w, "decoder.mid.attn_1"), w, "decoder.mid.block_2")
    levels = 1 + max(int(name.split(".")[2]) for name in w if name.startswith("decoder.up."))
    for level in reversed(range(levels)):
        for block in range(3):
            x = plain_residual(x, w, f"decoder.up.{level}.block.{block}")
            if f"decoder.up.{level}.attn.{block}.q.weight" in w:
                x = plain_attention(x, w, f"decoder.up.{level}.attn.{block}")
        if level:
            x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            x = plain_conv(x, w, f"decoder.up.{level}.upsample.conv", padding=1)
    return plain_conv(plain_swish_norm(x, w, "decoder.norm_out"), w, "decoder.conv_out", padding=1)


def of_transformers(config):
    from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig
    from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE

    named = ChameleonVQVAEConfig(
        embed_dim=config.width,
        num_embeddings=config.codebook,
        latent_channels=config.latent_channels,
        resolution=config.resolution,
        base_channels=config.base_channels,
        channel_multiplier=list(config.multipliers),
        num_res_blocks=config.blocks,
        attn_resolutions=list(config.attention_sides),
    )
    return ChameleonVQVAE(named).eval()


def test_codes_are_those_of_transformers_chameleon():
    model, theirs = make(), of_transformers(SMALL)
    shared = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("decoder.")}
    theirs.load_state_dict(shared, strict=True)
    images = torch.rand(3, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        expected = theirs.encode(images)
        codes, latents = model.encode(images), model.encoder(images)
    assert codes.shape == (3, 256) and len(codes.unique()) > 20
    assert torch.equal(codes.flatten(), expected.image_tokens.flatten())
    torch.testing.assert_close(latents, expected.last_hidden_state, rtol=0, atol=1e-5)


def test_decoding_is_that_of_a_plain_formulation():
    model = make()
    codes = torch.randint(0, SMALL.codebook, (2, 256))
    with torch.no_grad():
        found, expected = model.decode(codes), plain_decode(codes, model.state_dict())
    assert found.shape == (2, 3, 64, 64)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def test_the_published_sizes_give_the_published_names_and_a_grid_of_1024():
    with torch.device("meta"):
        model = VQGAN(VQGANConfig())
        codes = model.encode(torch.zeros(2, 3, 512, 512))
        assert model.decode(codes).shape == (2, 3, 512, 512)
    assert codes.shape == (2, 1024)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    residual = r"(norm1|conv1|norm2|conv2|nin_shortcut)"
    parts = rf"(block\.\d\.{residual}|(down|up)sample\.conv)"
    middle = rf"mid\.(block_[12]\.{residual}|attn_1\.(norm|q|k|v|proj_out))"
    side = rf"(conv_in|conv_out|norm_out|{middle}|(down|up)\.\d\.{parts})"
    known = re.compile(
        rf"((encoder|decoder)\.{side}|quant_conv|post_quant_conv)\.(weight|bias)|quantize\.embedding\.weight"
    )
    assert all(known.fullmatch(name) for name in shapes)
    assert shapes["encoder.down.2.block.0.nin_shortcut.weight"] == (256, 128, 1, 1)
    assert shapes["encoder.down.3.downsample.conv.weight"] == (256, 256, 3, 3)
    assert "encoder.down.4.downsample.conv.weight" not in shapes and "decoder.up.0.upsample.conv.weight" not in shapes
    assert shapes["decoder.up.4.block.2.conv2.weight"] == (512, 512, 3, 3)
    assert shapes["quantize.embedding.weight"] == (8192, 256)
    with torch.device("meta"):
        theirs = {name: tuple(tensor.shape) for name, tensor in of_transformers(VQGANConfig()).state_dict().items()}
    assert theirs == {name: shape for name, shape in shapes.items() if not name.startswith("decoder.")}


def test_a_trained_model_draws_what_it_encoded():
    config = VQGANConfig(
        resolution=16, base_channels=32, multipliers=(1, 1), blocks=1, latent_channels=32, width=8, codebook=64
    )
    torch.manual_seed(0)
    model = VQGAN(config)
    places = torch.linspace(-1, 1, 16)
    images = torch.stack([torch.stack([f(places)[:, None] * g(places)] * 3) for f, g in (
        (torch.sin, torch.cos), (torch.cos, torch.sign), (torch.sign, torch.sign))])  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(80):
        latents = model.latents(images)
        rows = model.quantize.embedding(model.quantize.nearest(latents.detach()))
        nearest = rows.reshape(3, 8, 8, -1).permute(0, 3, 1, 2)
        drawn = model.pixels(latents + (nearest - latents).detach())
        loss = functional.mse_loss(drawn, images) + functional.mse_loss(nearest, latents.detach())
        loss = loss + 0.25 * functional.mse_loss(latents, nearest.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        again = model.decode(model.encode(images))
    assert functional.mse_loss(again, images) < 0.1 * functional.mse_loss(again.flip(0), images)


def test_a_checkpoint_is_loaded_by_name(tmp_path):
    model = make()
    folder = save(tmp_path / "vq", model)
    tokenizer = vision.load("chameleon", folder)
    assert (tokenizer.codebook, tokenizer.grid) == (96, (16, 16))
    draw = np.random.default_rng(0)
    pictures = [draw.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((64, 64), (100, 70), (40, 90))]
    codes = tokenizer.encode(pictures)
    batch = torch.from_numpy(np.stack([tokenizer.prepare(picture) for picture in pictures]))
    with torch.no_grad():
        assert codes.dtype == np.int32 and np.array_equal(codes, model.encode(batch).numpy())
        expected = (model.decode(torch.from_numpy(codes).long()).clamp(-1, 1) + 1) / 2
    drawn = tokenizer.decode(codes)
    assert drawn.dtype == np.uint8 and np.array_equal(
        drawn, (expected.permute(0, 2, 3, 1).numpy() * 255).astype(np.uint8)
    )
    assert tokenizer.encode([]).shape == (0, 256)
    others = tokenizer.encode([pictures[0], 255 - pictures[1], 255 - pictures[2]])
    assert np.array_equal(others[0], codes[0]) and not np.array_equal(others[1], codes[1])
    again = vision.load("chameleon", folder / "vqgan.ckpt")
    assert again.fingerprint == tokenizer.fingerprint != ChameleonTokenizer(make(seed=1)).fingerprint


def test_more_pictures_than_a_batch(tmp_path):
    config = VQGANConfig(resolution=8, base_channels=32, multipliers=(1,), blocks=1, width=4, codebook=16)
    tokenizer = ChameleonTokenizer(make(config))
    pictures = list(np.random.default_rng(0).integers(0, 256, (19, 8, 8, 3), dtype=np.uint8))
    codes = tokenizer.encode(pictures)
    assert codes.shape == (19, 64)
    for number in (0, 8, 18):
        assert np.array_equal(tokenizer.encode([pictures[number]])[0], codes[number])
    assert tokenizer.decode(codes).shape == (19, 8, 8, 3)


def change(folder, name, tensor):
    values = torch.load(folder / "vqgan.ckpt")
    if tensor is None:
        del values["state_dict"][name]
    else:
        values["state_dict"][name] = tensor
    torch.save(values, folder / "vqgan.ckpt")


BAD = {
    "no yaml": (lambda f: (f / "vqgan.yaml").unlink(), r"no VQGAN. A folder with vqgan\.yaml and vqgan\.ckpt or"),
    "no weights": (lambda f: (f / "vqgan.ckpt").unlink(), r"no VQGAN"),
    "missing": (
        lambda f: change(f, "encoder.conv_in.weight", None),
        r"1 of \d+ tensors are missing \(first encoder\.conv_in\.weight\)",
    ),
    "unknown": (
        lambda f: change(f, "encoder.extra", torch.ones(1)),
        r"vqgan\.ckpt: 1 are not known \(first encoder\.extra\)",
    ),
    "renamed": (
        lambda f: (change(f, "quant_conv.bias", None), change(f, "quant.bias", torch.ones(24))),
        r"1 of \d+ tensors are missing \(first quant_conv\.bias\) and 1 are not known \(first quant\.bias\)",
    ),
    "another codebook": (
        lambda f: change(f, "quantize.embedding.weight", torch.ones(95, 24)),
        r"quantize\.embedding\.weight is \[95, 24\], vqgan\.yaml asks for \[96, 24\]",
    ),
    "not finite": (
        lambda f: change(f, "quant_conv.bias", torch.full((24,), torch.nan)),
        r"quant_conv\.bias holds",
    ),
    "cut": (
        lambda f: (f / "vqgan.ckpt").write_bytes((f / "vqgan.ckpt").read_bytes()[:5000]),
        r"vqgan\.ckpt: cannot be read \(",
    ),
    "empty": (lambda f: (f / "vqgan.ckpt").write_bytes(b""), r"vqgan\.ckpt: cannot be read \("),
    "code in it": (
        lambda f: torch.save({"state_dict": {"a": re.compile("a")}}, f / "vqgan.ckpt"),
        r"holds more than tensors: nothing else is loaded",
    ),
    "a tensor": (lambda f: torch.save(torch.ones(2), f / "vqgan.ckpt"), r"not a table of tensors"),
    "not yaml": (lambda f: (f / "vqgan.yaml").write_text("a: [1"), r"vqgan\.yaml: cannot be read as YAML"),
    "no sizes": (lambda f: (f / "vqgan.yaml").write_text("a: 1"), r"no model\.params\.ddconfig"),
    "double z": (lambda f: (f / "vqgan.yaml").write_text(yaml_of(SMALL, double_z=True)), r"double_z=True is not supp"),
    "new size": (lambda f: (f / "vqgan.yaml").write_text(yaml_of(SMALL, heads=2)), r"ddconfig\.heads is not known"),
    "channels": (lambda f: (f / "vqgan.yaml").write_text(yaml_of(SMALL, ch=40)), r"ch=40 times 1 is not divisible by"),
    "side": (lambda f: (f / "vqgan.yaml").write_text(yaml_of(SMALL, resolution=66)), r"resolution=66 cannot be halv"),
    "text": (lambda f: (f / "vqgan.yaml").write_text(yaml_of(SMALL, ch="128")), r"ch='128' is not a whole number"),
    "list": (lambda f: (f / "vqgan.yaml").write_text(yaml_of(SMALL, ch_mult=2)), r"ch_mult=2 is not a list"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_checkpoint_of_something_else_gets_one_line(tmp_path, case):
    folder = save(tmp_path / "vq", make())
    damage, line = BAD[case]
    damage(folder)
    with pytest.raises(CheckpointError, match=line) as caught:
        vision.load("chameleon", folder)
    assert "\n" not in str(caught.value)


def test_the_yaml_of_the_published_checkpoint(tmp_path):
    (tmp_path / "vqgan.yaml").write_text(yaml_of(VQGANConfig()))
    assert read_config(tmp_path / "vqgan.yaml") == VQGANConfig()


@pytest.mark.parametrize("size", [(512, 512), (700, 512), (512, 701), (1000, 333), (37, 90), (511, 513)])
def test_pictures_are_fitted_as_the_original_does(size):
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    image = Image.fromarray(picture)  # width, height
    scale = 512 / min(image.size)
    image = image.resize((round(scale * image.size[0]), round(scale * image.size[1])), Image.LANCZOS)
    x, y = (image.width - 512) // 2, (image.height - 512) // 2
    expected = np.array(image.crop((x, y, x + 512, y + 512)))
    assert np.array_equal(square(picture, 512), expected)
    tokenizer = ChameleonTokenizer(make())
    small = square(picture, 64)
    exact = torch.from_numpy(small / 255.0 * 2 - 1).permute(2, 0, 1).float()
    assert torch.equal(torch.from_numpy(np.ascontiguousarray(tokenizer.prepare(picture))), exact)


def test_a_strip_does_not_fill_the_memory():
    strip = np.zeros((1, 60_000, 3), dtype=np.uint8)
    strip[:, 30_000:] = 255
    assert square(strip, 512).shape == square(strip.transpose(1, 0, 2), 512).shape == (512, 512, 3)


def test_digits():
    scans = (load_digits().images / 16).astype(np.float32)
    draw = np.random.default_rng(0)
    tokenizer = PatchTokenizer(draw.random((32, 4), dtype=np.float32))
    codes = tokenizer.encode_scans(scans)
    patches = scans.reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 16, 1, 4)
    assert np.array_equal(codes, ((patches - tokenizer.centres) ** 2).sum(-1).argmin(-1))
    assert np.array_equal(tokenizer.encode_scans(tokenizer.decode_scans(codes)), codes)
    pictures = np.repeat(np.rint(scans * 255).astype(np.uint8)[..., None], 3, axis=3)
    found = tokenizer.encode(list(pictures))
    assert found.dtype == np.int32 and found.shape == (len(scans), 16)
    assert (found == codes).mean() > 0.995  # 8 bits a pixel move a few patches between centres
    assert np.array_equal(tokenizer.decode(found)[..., 0], np.rint(tokenizer.decode_scans(found) * 255))
    large = pictures[0].repeat(4, 0).repeat(4, 1)
    assert tokenizer.encode([large]).shape == (1, 16) and tokenizer.encode([]).shape == (0, 16)


def test_digits_are_loaded_from_the_file_of_the_demo(tmp_path):
    centres = np.random.default_rng(0).random((32, 4), dtype=np.float32)
    np.savez(tmp_path / "scans.npz", centres=centres, labels=np.arange(3))
    tokenizer = vision.load("digits", tmp_path / "scans.npz")
    assert np.array_equal(tokenizer.decode_scans(np.zeros((1, 16), int))[0, :2, :2].ravel(), centres[0])
    assert (tokenizer.codebook, tokenizer.grid, len(tokenizer.fingerprint)) == (32, (4, 4), 64)
    np.savez(tmp_path / "other.npz", centres=np.zeros((3, 5)))
    (tmp_path / "text.npz").write_text("a")
    for name, line in (("none.npz", "no npz with centres"), ("text.npz", "no npz"), ("other.npz", r"\[3, 5\], floats")):
        with pytest.raises(CheckpointError, match=line):
            vision.load("digits", tmp_path / name)
    with pytest.raises(ConfigError, match=r"'vqvae' is not known. There are chameleon, digits"):
        vision.load("vqvae", tmp_path)


def test_both_meet_the_contract_of_preprocessing():
    found: list[contract.ImageTokenizer] = [ChameleonTokenizer(make()), PatchTokenizer(np.ones((2, 4), np.float32))]
    picture = np.zeros((9, 9, 3), dtype=np.uint8)
    for tokenizer in found:
        codes = tokenizer.encode([picture])
        assert codes.dtype == np.int32 and codes.shape == (1, tokenizer.grid[0] * tokenizer.grid[1])
        assert 0 <= codes.min() <= codes.max() < tokenizer.codebook and len(tokenizer.fingerprint) == 64
