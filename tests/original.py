"""The JEPA, probes and actions of `eb_jepa` as a user of it has them: other classes, with the original's structure.

Written from its published behaviour, and sharing nothing with fastjepa's own modules, so that recognising it can only
be by structure. Attributes, submodules, constructor arguments, return values and what each does to its arguments are
the original's; the names of the classes are not. What the original raises for, this may raise for in other words.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _small_weights(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Framewise(nn.Module):
    """Images as they are, videos frame by frame."""

    def _forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 4:
            return self._forward(x)
        b = len(x)
        out = self._forward(x.permute(0, 2, 1, 3, 4).flatten(0, 1))
        n, c, h, w = out.shape  # an average pool's vectors have no such shape: the original raises too
        return out.view(b, n // b, c, h, w).permute(0, 2, 1, 3, 4)


class Block(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.shortcut(x)
        return self.relu(out)


class Encoder(Framewise):
    def __init__(
        self, in_d: int, h_d: int, out_d: int, s1: int = 1, s2: int = 1, s3: int = 1, avg_pool: bool = False
    ) -> None:
        super().__init__()
        self.avg_pool = avg_pool
        self.conv1, self.bn1 = nn.Conv2d(in_d, h_d, 3, 1, 1, bias=False), nn.BatchNorm2d(h_d)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = Block(h_d, h_d, s1)
        self.layer2 = Block(h_d, 2 * h_d, s2)
        self.layer3 = Block(2 * h_d, out_d, s3)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1)) if avg_pool else nn.Identity()

    def _forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.avgpool(self.layer3(self.layer2(self.layer1(x))))
        return x.flatten(1) if self.avg_pool else x


class UNet(Framewise):
    def __init__(self, in_d: int, h_d: int, out_d: int, is_rnn: bool = False) -> None:
        super().__init__()
        h = h_d
        self.is_rnn = is_rnn
        self.conv1, self.bn1 = nn.Conv2d(in_d, h, 3, 1, 1, bias=False), nn.BatchNorm2d(h)
        self.relu = nn.ReLU(inplace=True)
        self.enc1, self.enc2, self.enc3 = Block(h, h), Block(h, 2 * h, 2), Block(2 * h, 4 * h, 2)
        self.bott = Block(4 * h, 8 * h, 2)
        self.up3, self.dec3 = nn.ConvTranspose2d(8 * h, 4 * h, 2, 2), Block(8 * h, 4 * h)
        self.up2, self.dec2 = nn.ConvTranspose2d(4 * h, 2 * h, 2, 2), Block(4 * h, 2 * h)
        self.up1, self.dec1 = nn.ConvTranspose2d(2 * h, h, 2, 2), Block(2 * h, h)
        self.head = nn.Conv2d(h, out_d, 1)

    def _up(self, up: nn.Module, x: Tensor, skip: Tensor) -> Tensor:
        x = up(x)
        if x.shape[-2:] != skip.shape[-2:]:
            x = F.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=False)
        return torch.cat([x, skip], 1)

    def _forward(self, x: Tensor) -> Tensor:
        s1 = self.enc1(self.relu(self.bn1(self.conv1(x))))
        s2 = self.enc2(s1)
        s3 = self.enc3(s2)
        d3 = self.dec3(self._up(self.up3, self.bott(s3), s3))
        d2 = self.dec2(self._up(self.up2, d3, s2))
        return self.head(self.dec1(self._up(self.up1, d2, s1)))


class ActionPredictor(nn.Module):
    """Reads states with actions beside them in the channels."""

    def __init__(self, predictor: nn.Module, context_length: int) -> None:
        super().__init__()
        self.predictor = predictor
        self.is_rnn = predictor.is_rnn
        self.context_length = context_length

    def forward(self, x: Tensor, a: Tensor | None) -> Tensor:
        assert a is not None
        return self.predictor(torch.cat([x, a], dim=1))


class PairPredictor(ActionPredictor):
    """Reads pairs of states, whatever `context_length` says."""

    def forward(self, x: Tensor, a: Tensor | None) -> Tensor:
        return self.predictor(torch.cat([x[:, :, :-1], x[:, :, 1:]], dim=1))


class MLP(nn.Module):
    def __init__(self, mlp_spec: str) -> None:
        super().__init__()
        sizes = [int(size) for size in mlp_spec.split("-")]
        layers: list[nn.Module] = []
        for i in range(len(sizes) - 2):
            layers += [nn.Linear(sizes[i], sizes[i + 1]), nn.BatchNorm1d(sizes[i + 1]), nn.ReLU(True)]
        self.net = nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1], bias=False))
        self.out_dim = sizes[-1]

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def _rows(z: Tensor) -> Tensor:
    return z.transpose(0, 1).flatten(1).transpose(0, 1)


class HingeStd(nn.Module):
    def __init__(self, std_margin: float = 1.0) -> None:
        super().__init__()
        self.std_margin = std_margin

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.std_margin - ((x - x.mean(0)).var(0) + 1e-4).sqrt()).mean()


class Covariance(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(0)
        c = x.T @ x / (x.shape[0] - 1)
        n = c.shape[0]
        return c.flatten()[:-1].view(n - 1, n + 1)[:, 1:].flatten().pow(2).mean()


class Regularizer(nn.Module):
    def __init__(self, std_coeff: float, cov_coeff: float, proj: nn.Module | None = None) -> None:
        super().__init__()
        self.std_coeff, self.cov_coeff = std_coeff, cov_coeff
        self.proj = nn.Identity() if proj is None else proj
        self.std_loss_fn, self.cov_loss_fn = HingeStd(), Covariance()

    def forward(self, x: Tensor, actions: Tensor | None = None) -> tuple[Tensor, Tensor, dict[str, float]]:
        fx = self.proj(_rows(x))
        std, cov = self.std_loss_fn(fx), self.cov_loss_fn(fx)
        parts = {"std_loss": std.item(), "cov_loss": cov.item()}  # numbers, not tensors
        return self.std_coeff * std + self.cov_coeff * cov, std + cov, parts


class ActionRegularizer(nn.Module):
    """Variance, covariance, similarity in time and inverse dynamics; `projector`, not `proj`."""

    def __init__(self, cov_coeff: float, std_coeff: float, sim_coeff_t: float, idm: nn.Module) -> None:
        super().__init__()
        self.cov_coeff, self.std_coeff, self.sim_coeff_t = cov_coeff, std_coeff, sim_coeff_t
        self.projector, self.idm = nn.Identity(), idm
        self.std_loss_fn, self.cov_loss_fn = HingeStd(), Covariance()

    def forward(self, x: Tensor, actions: Tensor | None = None) -> tuple[Tensor, Tensor, dict[str, float]]:
        b, _, t, _, _ = x.shape
        x = self.projector(x)
        rows = x.permute(0, 2, 1, 3, 4).reshape(b * t, -1)
        in_time = x.permute(2, 0, 1, 3, 4).reshape(t, b, -1)
        std, cov, sim = self.std_loss_fn(rows), self.cov_loss_fn(rows), (in_time[1:] - in_time[:-1]).pow(2).mean()
        idm = x.new_zeros(())
        if actions is not None:
            pairs = torch.cat((in_time[:-1].transpose(0, 1), in_time[1:].transpose(0, 1)), dim=2).flatten(0, 1)
            idm = F.mse_loss(self.idm(pairs), actions.transpose(1, 2)[:, :-1].flatten(0, 1))
        parts = {"std_loss": std.item(), "cov_loss": cov.item(), "sim_loss_t": sim.item(), "idm_loss": idm.item()}
        weighted = self.cov_coeff * cov + self.std_coeff * std + self.sim_coeff_t * sim + idm
        return weighted, cov + std + sim + idm, parts


class PredictionCost(nn.Module):
    def __init__(self, proj: nn.Module | None = None) -> None:
        super().__init__()
        self.proj = nn.Identity() if proj is None else proj

    def forward(self, state: Tensor, predi: Tensor) -> Tensor:
        return F.mse_loss(self.proj(_rows(state)), self.proj(_rows(predi)))


class VectorEncoder(nn.Module):
    """(B, C, T, H, W) → (B, D, T, 1, 1), frame after frame."""

    def __init__(self, in_d: int, out_d: int) -> None:
        super().__init__()
        self.conv, self.mlp, self.final_ln = nn.Conv2d(in_d, 3, 3, 2, 1), nn.Linear(3, out_d), nn.LayerNorm(out_d)

    def forward(self, x: Tensor) -> Tensor:
        frames = [self.final_ln(self.mlp(F.relu(self.conv(frame)).amax((2, 3)))) for frame in x.unbind(2)]
        return torch.stack(frames, dim=2)[..., None, None]


class GRUPredictor(nn.Module):
    """One step: a state (B, D, 1, 1, 1) and an action (B, A, 1) → the next state."""

    def __init__(self, hidden_size: int, action_dim: int, final_ln: nn.Module) -> None:
        super().__init__()
        self.rnn = nn.GRU(action_dim, hidden_size)
        self.final_ln = final_ln
        self.is_rnn = True
        self.context_length = 0

    def forward(self, state: Tensor, action: Tensor) -> Tensor:
        hidden = state.flatten(1, 4).unsqueeze(0).contiguous()
        out, _ = self.rnn(action.squeeze(-1).unsqueeze(0).contiguous(), hidden)
        return self.final_ln(out)[0][..., None, None, None]


class OriginalJEPA(nn.Module):
    def __init__(
        self, encoder: nn.Module, aencoder: nn.Module, predictor: nn.Module, regularizer: nn.Module, predcost: nn.Module
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.action_encoder = aencoder
        self.predictor = predictor
        self.single_unroll = getattr(self.predictor, "is_rnn", False)
        self.regularizer = regularizer
        self.predcost = predcost
        self.ploss = 0
        self.rloss = 0

    def save(self, file: str) -> None:
        torch.save(self.state_dict(), file)

    @torch.no_grad()
    def encode(self, observations: Tensor) -> Tensor:
        return self.encoder(observations)

    @torch.no_grad()
    def infer(self, observations: Tensor, actions: Tensor | None) -> Tensor:
        return self.unroll(observations, actions, compute_loss=False, return_all_steps=True)[0][0]

    def unroll(
        self,
        observations: Tensor,
        actions: Tensor | None,
        nsteps: int = 1,
        unroll_mode: str = "parallel",
        ctxt_window_time: int = 1,
        compute_loss: bool = True,
        return_all_steps: bool = False,
    ) -> tuple[Any, Any]:
        state = self.encoder(observations)
        context = getattr(self.predictor, "context_length", 0)
        rloss, unweighted, parts = self.regularizer(state, actions) if compute_loss else (None, None, None)
        ploss: Any = 0.0
        encoded = None if actions is None else self.action_encoder(actions)
        steps = []
        if unroll_mode == "parallel":
            current = state
            for _ in range(nsteps):
                current = self.predictor(current, encoded)[:, :, :-1]
                steps.append(current)
                current = torch.cat((state[:, :, :context], current), dim=2)
                if compute_loss:
                    ploss += self.predcost(state, current) / nsteps
        elif unroll_mode == "autoregressive":
            if actions is not None and nsteps > actions.size(2):
                raise ValueError(f"nsteps ({nsteps}) larger than action sequence length ({actions.size(2)})")
            window = 1 if self.single_unroll else ctxt_window_time
            current = state[:, :, :window]
            for i in range(nsteps):
                acts = None if encoded is None else encoded[:, :, max(0, i + 1 - window) : i + 1]
                prediction = self.predictor(current[:, :, -window:], acts)[:, :, -1:]
                current = torch.cat([current, prediction], dim=2)
                steps.append(current.clone())
                if compute_loss:
                    ploss += self.predcost(prediction, state[:, :, i + 1 : i + 2]) / nsteps
        else:
            raise ValueError(f"Unknown unroll_mode: {unroll_mode}")
        losses = (rloss + ploss, rloss, unweighted, parts, ploss) if compute_loss else None
        return (steps if return_all_steps else current), losses


class Probe(nn.Module):
    """A head on the frozen states of a JEPA, and its loss `hcost`."""

    def __init__(self, jepa: nn.Module, head: nn.Module, hcost: nn.Module) -> None:
        super().__init__()
        self.jepa, self.head, self.hcost = jepa, head, hcost

    @torch.no_grad()
    def infer(self, observations: Tensor) -> Tensor:
        return self.head(self.jepa.encode(observations))

    @torch.no_grad()
    def apply_head(self, embeddings: Tensor) -> Tensor:
        return self.head(embeddings)

    def forward(self, observations: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            state = self.jepa.encode(observations)
        return self.hcost(self.head(state.detach()), targets)


class Painter(Framewise):
    """The image decoder: `hidden_dim` is also what it reads, so `in_dim` has to be the same."""

    def __init__(self, in_dim: int, out_dim: int = 1, hidden_dim: int = 16) -> None:
        super().__init__()
        self.scale_factor, self.shift_factor = 1.0, 0.0
        self.net = nn.Sequential(
            nn.Conv2d(hidden_dim, hidden_dim, 3, 1, 1), nn.ReLU(), nn.Conv2d(hidden_dim, out_dim, 3, 1, 1)
        )
        self.apply(_small_weights)

    def _forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Detector(nn.Module):
    """The detection head; its sigmoid is no module."""

    def __init__(self, in_d: int, h_d: int, out_d: int) -> None:
        super().__init__()
        kernel: Any = {"kernel_size": (1, 3, 3), "padding": "same"}
        self.head = nn.Sequential(
            nn.Sequential(nn.Conv3d(in_d, h_d, **kernel), nn.ReLU(), nn.Conv3d(h_d, out_d, **kernel))
        )
        self.apply(_small_weights)

    def _logits(self, x: Tensor) -> Tensor:
        x = torch.stack([F.adaptive_avg_pool2d(x[:, :, t], (8, 8)) for t in range(x.shape[2])], 2)
        return self.head(x).squeeze(1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self._logits(x))

    @torch.no_grad()
    def score(self, preds: list[Tensor], targets: Tensor) -> list[float]:
        from sklearn.metrics import average_precision_score

        return [
            average_precision_score(targets[:, s:].flatten().long(), self._logits(preds[s])[:, s:].flatten())
            for s in range(len(preds) - 1)
        ]


def original_jepa(*, h: int = 2, d: int = 4, hidden: int = 6, out: int = 5, **encoder: Any) -> OriginalJEPA:
    """The published Video JEPA, small; `encoder` are further arguments of the encoder."""
    projector = MLP(f"{d}-{hidden}-{out}")
    states = Encoder(1, h, d, **encoder)
    predictor = PairPredictor(UNet(2 * d, h, d), context_length=2)
    return OriginalJEPA(states, states, predictor, Regularizer(10.0, 100.0, projector), PredictionCost(projector))


def action_jepa(*, d: int = 6, actions: int = 2) -> OriginalJEPA:
    """An action-conditioned JEPA over vectors, with a recurrent predictor and no projector; small."""
    regularizer = ActionRegularizer(8.0, 16.0, 12.0, idm=nn.Linear(2 * d, actions))
    predictor = GRUPredictor(d, actions, final_ln=nn.LayerNorm(d))
    return OriginalJEPA(VectorEncoder(2, d), nn.Identity(), predictor, regularizer, PredictionCost())


def action_unet_jepa(*, h: int = 2, d: int = 4, actions: int = 2) -> OriginalJEPA:
    """An action-conditioned Video JEPA: actions (B, A, T, H, W) are read beside the last state."""
    jepa = original_jepa(h=h, d=d)
    jepa.predictor = ActionPredictor(UNet(d + actions, h, d), context_length=1)
    jepa.action_encoder = nn.Identity()
    return jepa


def unrolled_loss(jepa: nn.Module, video: Tensor, steps: int) -> Tensor:
    """The total loss of the parallel unroll."""
    _, losses = jepa.unroll(video, None, nsteps=steps)  # type: ignore[operator]
    return losses[0]
