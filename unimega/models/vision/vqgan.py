"""The VQGAN of Chameleon (taming-transformers' layout): pictures to a grid of codes and back, for inference.

B pictures, C channels, H x W pixels, h x w the grid of codes, E width of a codebook row, K codes. Parameters bear the
names of the public checkpoint (``encoder.down.0.block.0.conv1.weight``, ``quantize.embedding.weight``, ...), and the
formulas keep its order of operations, so that a tie in the last bit falls as it did there.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

NORM_GROUPS = 32
_NORM_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class VQGANConfig:
    """Sizes; the defaults are Chameleon's."""

    resolution: int = 512
    """Pixels of a side of a picture."""
    in_channels: int = 3
    """Channels of a picture."""
    out_channels: int = 3
    """Channels of a decoded picture."""
    base_channels: int = 128
    """Channels of the level of full size."""
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channels of each level over ``base_channels``; each level after the first has half the side."""
    blocks: int = 2
    """Residual blocks of a level of the encoder; the decoder has one more."""
    attention_sides: tuple[int, ...] = ()
    """Sides (pixels) of the levels whose blocks are followed by attention; the middle always has one."""
    latent_channels: int = 256
    """Channels between the encoder and the quantiser."""
    width: int = 256
    """E, width of a row of the codebook."""
    codebook: int = 8192
    """K, number of codes."""

    @property
    def side(self) -> int:
        """Codes of a side of a picture."""
        return self.resolution >> (len(self.multipliers) - 1)


class VQGAN(nn.Module):
    """Encoder, quantiser and decoder."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = _Encoder(config)
        self.decoder = _Decoder(config)
        self.quantize = _Quantizer(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.width, 1)
        self.post_quant_conv = nn.Conv2d(config.width, config.latent_channels, 1)

    def latents(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """[B, E, h, w] of pictures in -1..1."""
        latents: torch.Tensor = self.quant_conv(self.encoder(images_BCHW))
        return latents

    def encode(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """int64 codes [B, h w], row by row, of pictures in -1..1."""
        return self.quantize.nearest(self.latents(images_BCHW))

    def pixels(self, latents_BEhw: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W], about -1..1, of quantised latents."""
        pixels: torch.Tensor = self.decoder(self.post_quant_conv(latents_BEhw))
        return pixels

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W], about -1..1, of codes [B, h w] of square pictures."""
        rows = self.quantize.embedding(codes)
        side = self.config.side
        return self.pixels(rows.reshape(len(codes), side, side, -1).permute(0, 3, 1, 2).contiguous())


class _Quantizer(nn.Module):
    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.codebook, config.width)

    def nearest(self, latents_BEhw: torch.Tensor) -> torch.Tensor:
        """Codes [B, h w] of the nearest rows; the lower code wins a tie."""
        batch, width = latents_BEhw.shape[:2]
        flat = latents_BEhw.permute(0, 2, 3, 1).reshape(-1, width)
        rows = self.embedding.weight
        distances = (flat**2).sum(1, keepdim=True) + (rows**2).sum(1) - 2 * flat @ rows.T
        return distances.argmin(1).reshape(batch, -1)


class _Encoder(nn.Module):
    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(config.in_channels, config.base_channels, 3, padding=1)
        self.down = nn.ModuleList()
        channels, side = config.base_channels, config.resolution
        for level, multiplier in enumerate(config.multipliers):
            last = level == len(config.multipliers) - 1
            wider = config.base_channels * multiplier
            sampler = None if last else _Downsample(wider)
            self.down.append(_Level(channels, wider, config.blocks, side in config.attention_sides, downsample=sampler))
            channels, side = wider, side if last else side // 2
        self.mid = _Middle(channels)
        self.norm_out = _norm(channels)
        self.conv_out = nn.Conv2d(channels, config.latent_channels, 3, padding=1)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(images_BCHW)
        for level in self.down:
            x = level(x)
        x = self.mid(x)
        x = self.conv_out(_swish(self.norm_out(x)))
        return x


class _Decoder(nn.Module):
    """The encoder upside down: ``up.0`` is the level of full size and runs last."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        top = len(config.multipliers) - 1
        channels, side = config.base_channels * config.multipliers[-1], config.side
        self.conv_in = nn.Conv2d(config.latent_channels, channels, 3, padding=1)
        self.mid = _Middle(channels)
        levels: list[nn.Module] = []
        for level in range(top, -1, -1):
            narrower = config.base_channels * config.multipliers[level]
            sampler = _Upsample(narrower) if level else None
            attends = side in config.attention_sides
            levels.insert(0, _Level(channels, narrower, config.blocks + 1, attends, upsample=sampler))
            channels, side = narrower, side * 2
        self.up = nn.ModuleList(levels)
        self.norm_out = _norm(channels)
        self.conv_out = nn.Conv2d(channels, config.out_channels, 3, padding=1)

    def forward(self, latents_BChw: torch.Tensor) -> torch.Tensor:
        x = self.mid(self.conv_in(latents_BChw))
        for level in reversed(self.up):
            x = level(x)
        x = self.conv_out(_swish(self.norm_out(x)))
        return x


class _Level(nn.Module):
    """Residual blocks of one size, each with attention behind it or none, and the way to the next size."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        blocks: int,
        attends: bool,
        *,
        downsample: nn.Module | None = None,
        upsample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        inputs = [channels] + [out_channels] * (blocks - 1)
        self.block = nn.ModuleList(_Residual(count, out_channels) for count in inputs)
        self.attn = nn.ModuleList(_Attention(out_channels) for _ in range(blocks if attends else 0))
        self.downsample, self.upsample = downsample, upsample

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[number](x)
        for sampler in (self.downsample, self.upsample):
            x = x if sampler is None else sampler(x)
        return x


class _Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = _Residual(channels, channels)
        self.attn_1 = _Attention(channels)
        self.block_2 = _Residual(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block_2(self.attn_1(self.block_1(x)))
        return x


class _Residual(nn.Module):
    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = _norm(channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv1(_swish(self.norm1(x)))
        y = self.conv2(_swish(self.norm2(y)))
        return (x if self.nin_shortcut is None else self.nin_shortcut(x)) + y


class _Attention(nn.Module):
    """One head over the positions of a picture."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x)
        q_BCP, k_BCP, v_BCP = (layer(normed).flatten(2) for layer in (self.q, self.k, self.v))
        scores_BPP = (q_BCP.transpose(1, 2) @ k_BCP) * x.shape[1] ** -0.5
        mixed_BCP = v_BCP @ scores_BPP.softmax(-1).transpose(1, 2)
        y = self.proj_out(mixed_BCP.reshape(x.shape))
        return x + y


class _Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(functional.pad(x, (0, 1, 0, 1)))  # right and below only, as in training
        return x


class _Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, channels, eps=_NORM_EPS)


def _swish(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)
