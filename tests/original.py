"""A JEPA as a user of `eb_jepa` has it: other classes, with the original's attribute names and call signatures.

Written from the published behaviour. It shares nothing with fastjepa's own modules, so that recognising it can only be
by structure.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _framewise(network: nn.Module, x: Tensor) -> Tensor:
    if x.dim() == 4:
        return network.forward_frames(x)  # type: ignore[operator]
    b, _, t = x.shape[:3]
    out = network.forward_frames(x.permute(0, 2, 1, 3, 4).flatten(0, 1))  # type: ignore[operator]
    return out.view(b, t, *out.shape[1:]).permute(0, 2, 1, 3, 4)


class Block(nn.Module):
    def __init__(self, cin: int, cout: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.shortcut = nn.Sequential()
        if stride != 1 or cin != cout:
            self.shortcut = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out = out + self.shortcut(x)
        return self.relu(out)


class Encoder(nn.Module):
    def __init__(self, cin: int, h: int, cout: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(cin, h, 3, 1, 1, bias=False), nn.BatchNorm2d(h)
        self.relu = nn.ReLU(inplace=True)
        self.layer1, self.layer2, self.layer3 = Block(h, h), Block(h, 2 * h), Block(2 * h, cout)

    def forward_frames(self, x: Tensor) -> Tensor:
        return self.layer3(self.layer2(self.layer1(self.relu(self.bn1(self.conv1(x))))))

    def forward(self, x: Tensor) -> Tensor:
        return _framewise(self, x)


class UNet(nn.Module):
    def __init__(self, cin: int, h: int, cout: int) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(cin, h, 3, 1, 1, bias=False), nn.BatchNorm2d(h), nn.ReLU()
        self.enc1, self.enc2, self.enc3 = Block(h, h), Block(h, 2 * h, 2), Block(2 * h, 4 * h, 2)
        self.bott = Block(4 * h, 8 * h, 2)
        self.up3, self.dec3 = nn.ConvTranspose2d(8 * h, 4 * h, 2, 2), Block(8 * h, 4 * h)
        self.up2, self.dec2 = nn.ConvTranspose2d(4 * h, 2 * h, 2, 2), Block(4 * h, 2 * h)
        self.up1, self.dec1 = nn.ConvTranspose2d(2 * h, h, 2, 2), Block(2 * h, h)
        self.head = nn.Conv2d(h, cout, 1)

    def _up(self, up: nn.Module, x: Tensor, skip: Tensor) -> Tensor:
        x = up(x)
        if x.shape[-2:] != skip.shape[-2:]:
            x = F.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=False)
        return torch.cat([x, skip], 1)

    def forward_frames(self, x: Tensor) -> Tensor:
        s1 = self.enc1(self.relu(self.bn1(self.conv1(x))))
        s2 = self.enc2(s1)
        s3 = self.enc3(s2)
        d3 = self.dec3(self._up(self.up3, self.bott(s3), s3))
        d2 = self.dec2(self._up(self.up2, d3, s2))
        return self.head(self.dec1(self._up(self.up1, d2, s1)))

    def forward(self, x: Tensor) -> Tensor:
        return _framewise(self, x)


class PairPredictor(nn.Module):
    def __init__(self, predictor: nn.Module, context_length: int = 2) -> None:
        super().__init__()
        self.predictor, self.context_length, self.is_rnn = predictor, context_length, False

    def forward(self, x: Tensor, a: Tensor | None) -> Tensor:
        return self.predictor(torch.cat([x[:, :, :-1], x[:, :, 1:]], dim=1))


class MLP(nn.Module):
    def __init__(self, a: int, b: int, c: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU(), nn.Linear(b, c, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def _rows(z: Tensor) -> Tensor:
    return z.transpose(0, 1).flatten(1).transpose(0, 1)


class Regularizer(nn.Module):
    def __init__(self, std_coeff: float, cov_coeff: float, proj: nn.Module) -> None:
        super().__init__()
        self.std_coeff, self.cov_coeff, self.proj = std_coeff, cov_coeff, proj

    def forward(self, state: Tensor, actions: Tensor | None = None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        f = self.proj(_rows(state))
        f = f - f.mean(0)
        std = torch.relu(1 - (f.var(0) + 1e-4).sqrt()).mean()
        c = f.T @ f / (f.shape[0] - 1)
        n = c.shape[0]
        cov = c.flatten()[:-1].view(n - 1, n + 1)[:, 1:].flatten().pow(2).mean()
        return self.std_coeff * std + self.cov_coeff * cov, std + cov, {"std_loss": std, "cov_loss": cov}


class PredictionCost(nn.Module):
    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, state: Tensor, predi: Tensor) -> Tensor:
        return F.mse_loss(self.proj(_rows(state)), self.proj(_rows(predi)))


class OriginalJEPA(nn.Module):
    def __init__(self, *, h: int = 2, d: int = 4, hidden: int = 6, out: int = 5) -> None:
        super().__init__()
        proj = MLP(d, hidden, out)
        self.encoder = Encoder(1, h, d)
        self.action_encoder = self.encoder
        self.predictor = PairPredictor(UNet(2 * d, h, d))
        self.regularizer = Regularizer(10.0, 100.0, proj)
        self.predcost = PredictionCost(proj)

    def loss(self, video: Tensor, steps: int) -> Tensor:
        """The parallel unroll's total loss."""
        state = self.encoder(video)
        total = self.regularizer(state, None)[0]
        current = state
        for _ in range(steps):
            current = torch.cat((state[:, :, :2], self.predictor(current, None)[:, :, :-1]), dim=2)
            total = total + self.predcost(state, current) / steps
        return total
