"""The network ε_θ(x_t, t) of the sheet (4): a small UNet that is told the time."""
import torch
from torch import nn
from torch.nn import functional as F


class TimeEmbedding(nn.Module):
    """The time t as a vector that a network can use (sheet, 4): sines and cosines of t, then a small MLP.

    The frequencies fall geometrically from 1 to 1/10000 (Vaswani et al. 2017, §3.5): the fast ones
    tell neighbouring times apart, the slow ones the beginning of the process from its end.

    dim: length of the vector; features: number of sines and cosines together, even.
    Input: t of shape (B,), of any number type. Output: (B, dim), float32.
    """

    def __init__(self, dim, features=64):
        super().__init__()
        self.features = features
        self.mlp = nn.Sequential(nn.Linear(features, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU())

    def forward(self, t):
        half = self.features // 2
        frequencies = 10000 ** -(torch.arange(half, device=t.device) / (half - 1))
        angles = t[:, None] * frequencies
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=1))


class ResidualBlock(nn.Module):
    """x + a correction that depends on the time: convolution, normalisation, time, SiLU, convolution.

    The time enters as a scale and a shift for each channel. The scale matters: the gain with which noise
    must be read off a picture is 1/√(1-ᾱ_t), from 71 at t = 1 to 1.07 at t = 200. Where the width changes,
    x goes through a 1x1 convolution of its own. The correction is 0 at the start.
    """

    def __init__(self, width_in, width, time_dim):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.norm = nn.GroupNorm(width // 4, width)
        self.time = nn.Linear(time_dim, 2 * width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.shortcut = nn.Conv2d(width_in, width, 1) if width_in != width else nn.Identity()
        for layer in self.time, self.conv2:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x, time):
        scale, shift = self.time(time)[:, :, None, None].chunk(2, dim=1)
        h = torch.addcmul(shift, self.norm(self.conv1(x)), 1 + scale)  # norm * (1 + scale) + shift, in one go
        return self.shortcut(x) + self.conv2(F.silu(h))


class UNet(nn.Module):
    """ε_θ(x, t): what noise is in the picture x at time t? Sheet (4), eq. (7).

    Two residual blocks at full resolution, where depth buys most for its cost; going down, a residual block
    at each level, then half the side and the next width; one at the bottom; going up, twice the side again, and
    at each level a block that also sees what the way down had there; two more at full resolution.

    in_channels: 1 for grey pictures, 3 for colour.
    channels: the width of each level, from the full resolution down; multiples of 4.
    Input: x (B, in_channels, H, W), H and W multiples of 2^(levels-1); t (B,).
    Output: the shape of x; zero before any training, so that the first loss (8) is 1.
    Raises ValueError for a width or a shape that does not fit.
    """

    def __init__(self, in_channels=1, channels=(16, 32, 64), time_dim=64):
        super().__init__()
        if not channels or any(c < 4 or c % 4 for c in channels):
            raise ValueError(f"channels must be multiples of 4, at least one, got {tuple(channels)}")
        self.in_channels, self.factor = in_channels, 2 ** (len(channels) - 1)
        pairs = list(zip(channels, channels[1:]))
        self.time = TimeEmbedding(time_dim)
        self.stem = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.before = nn.ModuleList(ResidualBlock(channels[0], channels[0], time_dim) for _ in range(2))
        self.down = nn.ModuleList(ResidualBlock(c, c, time_dim) for c in channels)
        self.widen = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in pairs)
        self.middle = ResidualBlock(channels[-1], channels[-1], time_dim)
        self.narrow = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in pairs)
        self.up = nn.ModuleList(ResidualBlock(2 * c, c, time_dim) for c in channels)
        self.after = nn.ModuleList(ResidualBlock(channels[0], channels[0], time_dim) for _ in range(2))
        self.norm = nn.GroupNorm(channels[0] // 4, channels[0])
        self.out = nn.Conv2d(channels[0], in_channels, 3, padding=1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x, t):
        if x.dim() != 4 or x.shape[1] != self.in_channels or x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise ValueError(f"x must have shape (B, {self.in_channels}, H, W) with H and W multiples of "
                             f"{self.factor}, got {tuple(x.shape)}")
        if t.shape != x.shape[:1]:
            raise ValueError(f"t must have shape ({len(x)},), one time for each picture, got {tuple(t.shape)}")
        time = self.time(t)
        h = self.stem(x)
        for block in self.before:
            h = block(h, time)
        skips = []
        for block, widen in zip(self.down, [*self.widen, None]):
            h = block(h, time)
            skips.append(h)
            if widen:
                h = widen(F.avg_pool2d(h, 2))
        h = self.middle(h, time)
        for block, narrow in zip(reversed(self.up), [None, *reversed(self.narrow)]):
            if narrow:
                h = F.interpolate(narrow(h), scale_factor=2)
            h = block(torch.cat([h, skips.pop()], dim=1), time)
        for block in self.after:
            h = block(h, time)
        return self.out(F.silu(self.norm(h)))
