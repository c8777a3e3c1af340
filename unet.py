"""The network ε_θ(x_t, t) of the sheet (4): a small UNet with the embedded time as an input."""
import torch
from torch import nn
from torch.nn import functional as F


class TimeEmbedding(nn.Module):
    """The time t as a vector of dim numbers (sheet, 4): sinusoids of t, then a small MLP.

        sin(ω_k t) and cos(ω_k t) for K = dim/2 frequencies ω_k = 1000^(-k/(K-1)), k = 0, ..., K-1

    The frequencies fall from 1 to 1/1000 (Vaswani et al. 2017, §3.5, with 10000): the fast ones
    tell neighbouring times apart, the slow ones the beginning of the process from its end.

    dim: even, or ValueError. Input: t (B,). Output: (B, dim), of the dtype of the weights.
    """

    def __init__(self, dim):
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"dim must be even and at least 2, got {dim}")
        self.dim = dim
        self.mlp = nn.Sequential(
            nn.Linear(dim, dim), nn.SiLU(),
            nn.Linear(dim, dim), nn.SiLU())

    def sinusoids(self, t):
        """The sines, then the cosines of t at each frequency: (B, dim), float32."""
        exponents = torch.linspace(0, 1, self.dim // 2, device=t.device)
        angles = t[..., None].float() * 1000 ** -exponents
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    def forward(self, t):
        return self.mlp(self.sinusoids(t).to(self.mlp[0].weight))


class ResidualBlock(nn.Module):
    """x + a correction that depends on the time, and is 0 at the start of training.

    The time enters as a scale and a shift for each channel. The scale matters: the gain from a
    picture to its noise is 1/√(1-ᾱ_t), from 71 at t = 1 to 1.07 at t = 200.

    Input: x (B, width_in, H, W), emb (B, time_dim). Output: (B, width, H, W).
    """

    def __init__(self, width_in, width, time_dim):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.norm = nn.GroupNorm(width // 4, width)
        self.scale_shift = nn.Linear(time_dim, 2 * width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.shortcut = (
            nn.Identity() if width_in == width else nn.Conv2d(width_in, width, 1))
        # Zeros at the start: no scale, no shift, no correction.
        for layer in self.scale_shift, self.conv2:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x, emb):
        scale, shift = self.scale_shift(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.norm(self.conv1(x)) * (1 + scale) + shift
        return self.shortcut(x) + self.conv2(F.silu(h))


class UNet(nn.Module):
    """ε_θ(x, t), the noise in the picture x at time t. Sheet (4), eq. (7).

        x ─ 3x3 ─ 2 blocks ────────── skip ────────── 2 blocks ─ norm ─ SiLU ─ 3x3 ─ ε  16x28x28
                         │                            │
                 mean of 2x2, 1x1              1x1, 2x2 copies
                         │                            │
                         2 blocks ─── skip ─── 2 blocks                                 32x14x14
                                │              │
                        mean of 2x2, 1x1   1x1, 2x2 copies
                                │              │
                                └── 2 blocks ──┘                                        64x7x7

    A block is a ResidualBlock. At the right: the width and the sides of a level, for a digit.
    in_channels: 1 for grey pictures, 3 for colour. channels: the width of each level, from the full
    resolution down, multiples of 4. time_conditioning: if False, the network sees t = 0 always.
    Input: x (B, in_channels, H, W), H and W multiples of 2^(levels-1); t (B,).
    Output: the shape of x; zero before training. ValueError for a width or shape that does not fit.
    """

    def __init__(self, in_channels=1, channels=(16, 32, 64), time_dim=64,
                 time_conditioning=True):
        super().__init__()
        if not channels or any(width < 4 or width % 4 for width in channels):
            raise ValueError(f"channels must be multiples of 4, one or more, got {tuple(channels)}")
        self.in_channels = in_channels
        self.time_conditioning = time_conditioning
        self.time_embedding = TimeEmbedding(time_dim)
        *outer, inner = channels
        steps = list(zip(channels, channels[1:]))  # from each level to the next one below

        def blocks(width_in, width):
            first = ResidualBlock(width_in, width, time_dim)
            return nn.ModuleList([first, ResidualBlock(width, width, time_dim)])

        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)

        # down: each level has two blocks, then a 1x1 convolution to the width of the next
        self.down_blocks = nn.ModuleList(blocks(width, width) for width in outer)
        self.downsample = nn.ModuleList(
            nn.Conv2d(above, below, 1) for above, below in steps)

        # middle: the lowest level
        self.middle = blocks(inner, inner)

        # up: the same backwards; the first block of a level takes the skip connection too
        steps.reverse()
        self.upsample = nn.ModuleList(
            nn.Conv2d(below, above, 1) for above, below in steps)
        self.up_blocks = nn.ModuleList(
            blocks(2 * width, width) for width in reversed(outer))

        # out: from zero, so that an untrained network predicts no noise
        self.norm = nn.GroupNorm(channels[0] // 4, channels[0])
        self.conv_out = nn.Conv2d(channels[0], in_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(self, x, t):
        self.check_shapes(x, t)
        emb = self.time_embedding(t if self.time_conditioning else torch.zeros_like(t))
        h = self.conv_in(x)

        # down: 16x28x28 to 64x7x7 for a digit
        skips = []
        for blocks, downsample in zip(self.down_blocks, self.downsample):
            for block in blocks:
                h = block(h, emb)
            skips.append(h)
            h = downsample(F.avg_pool2d(h, 2))

        # middle: 64x7x7
        for block in self.middle:
            h = block(h, emb)

        # up: 64x7x7 to 16x28x28
        for upsample, blocks in zip(self.upsample, self.up_blocks):
            h = F.interpolate(upsample(h), scale_factor=2)
            h = torch.cat([h, skips.pop()], dim=1)
            for block in blocks:
                h = block(h, emb)

        # out: 1x28x28
        return self.conv_out(F.silu(self.norm(h)))

    def check_shapes(self, x, t):
        factor = 2 ** len(self.downsample)
        is_picture = x.dim() == 4 and x.shape[1] == self.in_channels
        if not is_picture or x.shape[2] % factor or x.shape[3] % factor:
            raise ValueError(f"x must have shape (B, {self.in_channels}, H, W), H and W multiples "
                             f"of {factor}, got {tuple(x.shape)}")
        if t.shape != x.shape[:1]:
            raise ValueError(f"t must have shape ({len(x)},), got {tuple(t.shape)}")
