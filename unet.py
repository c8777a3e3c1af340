"""The network ε_θ(x_t, t) of the sheet (4): a small UNet that is told the time."""
import torch
from torch import nn
from torch.nn import functional as F


class TimeEmbedding(nn.Module):
    """The time t as a vector that a network can use (sheet, 4): sines and cosines, then an MLP.

    The frequencies fall geometrically from 1 to 1/1000 (Vaswani et al. 2017, §3.5): the fast ones
    tell neighbouring times apart, the slow ones the beginning of the process from its end.

    dim: length of the vector; features: number of sines and cosines together, even.
    Input: t of shape (B,), of any number type. Output: (B, dim), float32.
    """

    def __init__(self, dim, features=64):
        super().__init__()
        self.features = features
        self.mlp = nn.Sequential(
            nn.Linear(features, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU())

    def waves(self, t):
        """The sines, then the cosines of t at each frequency: (B, features)."""
        half = self.features // 2
        frequencies = 1000 ** -(torch.arange(half, device=t.device) / (half - 1))
        angles = t[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    def forward(self, t):
        return self.mlp(self.waves(t))


class ResidualBlock(nn.Module):
    """x + a correction that knows the time: convolution, normalisation, time, SiLU, convolution.

    The time enters as a scale and a shift for each channel. The scale matters: the gain with which
    noise must be read off a picture is 1/√(1-ᾱ_t), from 71 at t = 1 to 1.07 at t = 200. Where the
    width changes, x goes through a 1x1 convolution of its own. The correction is 0 at the start.
    """

    def __init__(self, width_in, width, time_dim):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.norm = nn.GroupNorm(width // 4, width)
        self.time = nn.Linear(time_dim, 2 * width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.shortcut = nn.Identity() if width_in == width else nn.Conv2d(width_in, width, 1)
        for layer in self.time, self.conv2:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x, time):
        scale, shift = self.time(time)[:, :, None, None].chunk(2, dim=1)
        h = self.norm(self.conv1(x)) * (1 + scale) + shift
        return self.shortcut(x) + self.conv2(F.silu(h))


class UNet(nn.Module):
    """ε_θ(x, t): what noise is in the picture x at time t? Sheet (4), eq. (7).

        x ─ 3x3 ─ block ─ block ──────────── skip ──────────── block ─ block ─ 3x3 ─ ε  16 x 28 x 28
                            │                                    │
                   mean of 2x2, 1x1                    1x1, every pixel four times
                            │                                    │
                          block ─ block ──── skip ──── block ─ block                    32 x 14 x 14
                                    │                    │
                           mean of 2x2, 1x1    1x1, every pixel four times
                                    │                    │
                                  block ────────────── block                            64 x 7 x 7

    Every block is a ResidualBlock that is told the time. On the way up, the first block of a level
    sees what comes from below and, over the skip, what the way down had there. At the right: the
    width and the sides of each level for a digit.

    in_channels: 1 for grey pictures, 3 for colour.
    channels: the width of each level, from the full resolution down; multiples of 4.
    told_t: if False, the network sees t = 0 at all times, to measure what the time is worth.
    Input: x (B, in_channels, H, W), H and W multiples of 2^(levels-1); t (B,).
    Output: the shape of x; zero before any training, so that the first loss (8) is 1.
    Raises ValueError for a width or a shape that does not fit.
    """

    def __init__(self, in_channels=1, channels=(16, 32, 64), time_dim=64, told_t=True):
        super().__init__()
        if not channels or any(width < 4 or width % 4 for width in channels):
            raise ValueError(f"channels must be multiples of 4, one or more, got {tuple(channels)}")
        self.in_channels, self.told_t = in_channels, told_t
        self.factor = 2 ** (len(channels) - 1)
        self.time = TimeEmbedding(time_dim)
        self.first = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.down = nn.ModuleList(self.two_blocks(c, c, time_dim) for c in channels)
        self.up = nn.ModuleList(self.two_blocks(2 * c, c, time_dim) for c in channels[:-1])
        pairs = list(zip(channels, channels[1:]))
        self.widen = nn.ModuleList(nn.Conv2d(above, below, 1) for above, below in pairs)
        self.narrow = nn.ModuleList(nn.Conv2d(below, above, 1) for above, below in pairs)
        self.norm = nn.GroupNorm(channels[0] // 4, channels[0])
        self.last = nn.Conv2d(channels[0], in_channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    @staticmethod
    def two_blocks(width_in, width, time_dim):
        return nn.ModuleList(ResidualBlock(w, width, time_dim) for w in (width_in, width))

    def forward(self, x, t):
        self._check(x, t)
        time = self.time(t if self.told_t else torch.zeros_like(t))
        h, skips = self.first(x), []
        for level, blocks in enumerate(self.down):
            if level > 0:
                skips.append(h)
                h = self.widen[level - 1](F.avg_pool2d(h, 2))
            for block in blocks:
                h = block(h, time)
        for narrow, blocks in zip(reversed(self.narrow), reversed(self.up)):
            h = F.interpolate(narrow(h), scale_factor=2)
            h = torch.cat([h, skips.pop()], dim=1)
            for block in blocks:
                h = block(h, time)
        return self.last(F.silu(self.norm(h)))

    def _check(self, x, t):
        fits = x.dim() == 4 and x.shape[1] == self.in_channels
        if not fits or x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise ValueError(f"x must have shape (B, {self.in_channels}, H, W), H and W multiples "
                             f"of {self.factor}, got {tuple(x.shape)}")
        if t.shape != x.shape[:1]:
            raise ValueError(f"t must have shape ({len(x)},), one time for each picture, "
                             f"got {tuple(t.shape)}")
