"""Learn a pendulum with friction from irregular samples by a neural ODE, and read a formula off the learned field."""

import torch

from torchfolio.dynamics import NeuralODE, SymbolicRegressor, VectorField, odeint


def pendulum(t, y):
    angle, speed = y.unbind(-1)
    return torch.stack([speed, -angle - 0.3 * speed], -1)


torch.manual_seed(0)
ts = torch.rand(24).sort().values * 4
ts[0] = 0
starts = 2 * torch.rand(32, 2) - 1
data, _ = odeint(pendulum, starts, ts)

model = NeuralODE(VectorField(2, width=32, depth=1, activation=torch.nn.Tanh()), rtol=1e-3, atol=1e-4)
optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
for step in range(81):
    loss = (model(starts, ts) - data).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 40 == 0:
        print(f"step {step}: loss {loss:.4f}, {model.stats.nfe_forward} evaluations")

states = data.flatten(0, 1)[::4]
with torch.no_grad():
    slopes = model.field(torch.tensor(0.0), states)
search = SymbolicRegressor(populations=4, rounds=4, random_state=0).fit(states.numpy(), slopes[:, 1].numpy())
for candidate in search.pareto_[:5]:
    print(f"{candidate.complexity} nodes, loss {candidate.loss:.5f}: {candidate.expression}")
