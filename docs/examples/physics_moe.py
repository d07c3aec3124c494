"""Enforce an equation of your own, advection with decay, inside a network, and predict speeds that it never saw."""

import torch

from torchfolio.dynamics import FNO, PDE, ExpertConstraint, Grid, equation_loss


class AdvectionDecay(PDE):
    """u_t + c u_x + u / 2 = 0 on a circle."""

    def terms(self, field, grid):
        return {"u": field, "u_t": grid.derivative(field, "t"), "u_x": grid.derivative(field, "x")}

    def residual(self, terms, params):
        return terms["u_t"] + params["speed"] * terms["u_x"] + 0.5 * terms["u"]


torch.manual_seed(0)
grid = Grid(periodic=("x",), t=torch.linspace(0, 1, 16), x=torch.arange(24) / 24)
t, x = grid.points().unbind(-1)
wave = torch.sin(2 * torch.pi * grid.axes["x"])
net = FNO(4, 12, modes=(4, 4), width=16, depth=2)
layer = ExpertConstraint(AdvectionDecay(), experts=(2, 1))


def predict(speed):
    """Basis functions from time, place and speed; the layer combines them so that the equation holds."""
    circle = torch.stack([t, torch.sin(2 * torch.pi * x), torch.cos(2 * torch.pi * x)], -1).expand(
        len(speed), -1, -1, -1
    )
    features = torch.cat([circle, speed.view(-1, 1, 1, 1).expand(-1, *grid.shape, 1)], -1)
    return layer(net(features.float()), grid, wave.expand(len(speed), -1), {"speed": speed}).u


optimizer = torch.optim.Adam(net.parameters(), 1e-2)
for _ in range(100):
    speed = torch.rand(4)
    loss = equation_loss(AdvectionDecay(), predict(speed), grid, wave.float(), {"speed": speed})
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
with torch.no_grad():
    truth = torch.exp(-t / 2) * torch.sin(2 * torch.pi * (x - 0.6 * t))
    error = (predict(torch.tensor([0.6]))[0] - truth).norm() / truth.norm()
print(f"relative error at a new speed: {error:.3f}")
