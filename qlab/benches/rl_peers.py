"""SAC and DQN as one writes them elsewhere, for the rl bench: a JAX loop under scan, and a PyTorch loop.

JAX: gymnax's environment, flashbax's buffer, flax.linen nets with a TrainState each, one scan over steps that act, store,
sample and update (the form of PureJaxRL's DQN and Stoix's SAC). PyTorch: Gymnasium's environment, a NumPy ring, eager
updates with a backward pass a loss (the form of CleanRL). Each maker gives call(n): n more steps of the environment with
one update after each, from a replay that is never empty; it returns the mean return of the episodes that ended.
"""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np

from qlab.benches.kernel_peers import Absent, _need

Loop = Callable[[int], float]
LOG_STD = (-20.0, 2.0)


class Size(NamedTuple):
    """hidden: widths of every net. batch: rows of an update. rate: of Adam. The rest as in `qlab.rl`."""

    hidden: tuple[int, ...]
    batch: int
    capacity: int = 20_000
    rate: float = 1e-3
    discount: float = 0.99
    tau: float = 0.005
    target_every: int = 128
    epsilon: float = 0.04


# ---- JAX ----------------------------------------------------------------------------------------


def _gymnax(name: str) -> tuple[Any, Any]:
    """(environment, parameters). gymnax 1.0 needs the package six without saying so."""
    try:
        module = importlib.import_module("gymnax")
    except ImportError as e:
        raise Absent(f"{e.name or 'gymnax'} is not installed") from None
    found = version("gymnax")
    if int(found.split(".")[0]) < 1:  # its step does not tell an end from a time limit
        raise Absent(f"gymnax {found} is too old, 1.0 or newer is needed")
    return module.make(name)


def _scanned(name: str, size: Size, dummy_action: Any, init: Any, act: Any, update: Any) -> Loop:
    """The loop shared by both algorithms: init(key, obs), act(nets, key, obs), update(nets, key, batch)."""
    import jax
    import jax.numpy as jnp

    flashbax = _need("flashbax")
    env, params = _gymnax(name)
    buffer = flashbax.make_item_buffer(size.capacity, size.batch, size.batch)

    def step(carry, key):
        nets, memory, state, obs, running = carry
        k_act, k_env, k_sample, k_update = jax.random.split(key, 4)
        action = act(nets, k_act, obs[None])[0]
        after, state, reward, ended, cut, info = env.step(k_env, state, action, params)
        item = {
            "obs": obs, "action": action, "reward": reward, "done": ended,
            "next_obs": info["final_observation"],
        }  # fmt: skip
        memory = buffer.add(memory, item)
        running = running + reward

        def learn(nets):
            return update(nets, k_update, buffer.sample(memory, k_sample).experience)

        nets = jax.lax.cond(buffer.can_sample(memory), learn, lambda x: x, nets)
        over = ended | cut
        total = jnp.where(over, running, jnp.nan)
        return (nets, memory, state, after, jnp.where(over, 0.0, running)), total

    k_nets, k_env = jax.random.split(jax.random.key(0))
    obs, state = env.reset(k_env, params)
    item = {
        "obs": obs, "action": dummy_action, "reward": jnp.float32(0), "done": jnp.bool_(False), "next_obs": obs,
    }  # fmt: skip
    at = [(init(k_nets, obs[None]), buffer.init(item), state, obs, jnp.float32(0)), 1]
    run = jax.jit(
        lambda carry, key, n: jax.lax.scan(step, carry, jax.random.split(key, n)),
        static_argnums=2,
        donate_argnums=0,
    )

    def call(n: int) -> float:
        at[0], totals = run(at[0], jax.random.key(at[1]), n)
        at[1] += 1
        ended = np.asarray(totals)[np.isfinite(totals)]
        return float(ended.mean()) if ended.size else math.nan

    return call


def _linen() -> Any:
    from flax import linen

    return linen


def jax_sac(size: Size) -> Loop:
    """SAC on gymnax's Pendulum-v1."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax.training.train_state import TrainState

    nn: Any = _linen()

    class Actor(nn.Module):
        @nn.compact
        def __call__(self, x):
            for width in size.hidden:
                x = nn.relu(nn.Dense(width)(x))
            return nn.Dense(1)(x), jnp.clip(nn.Dense(1)(x), *LOG_STD)

    class Critic(nn.Module):
        @nn.compact
        def __call__(self, x, a):
            x = jnp.concatenate([x, a], -1)
            for width in size.hidden:
                x = nn.relu(nn.Dense(width)(x))
            return nn.Dense(1)(x)[..., 0]

    actor = Actor()
    critic = nn.vmap(
        Critic, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=2
    )()

    def sample(params, key, obs):
        mean, log_std = actor.apply(params, obs)
        noise = jax.random.normal(key, mean.shape)
        u = mean + jnp.exp(log_std) * noise
        density = -0.5 * noise**2 - log_std - 0.5 * jnp.log(2 * jnp.pi)
        slope = 2 * (jnp.log(2.0) - u - jax.nn.softplus(-2 * u))
        return jnp.tanh(u), (density - slope).sum(-1)

    def init(key, obs):
        k1, k2 = jax.random.split(key)
        weights = critic.init(k2, obs, jnp.zeros((1, 1)))
        make = TrainState.create
        return {
            "actor": make(apply_fn=actor.apply, params=actor.init(k1, obs), tx=optax.adam(size.rate)),
            "critic": make(apply_fn=critic.apply, params=weights, tx=optax.adam(size.rate)),
            "target": jax.tree.map(jnp.copy, weights),
            "alpha": make(apply_fn=None, params={"log": jnp.float32(0)}, tx=optax.adam(size.rate)),
        }  # fmt: skip

    def act(nets, key, obs):
        return 2.0 * sample(nets["actor"].params, key, obs)[0]

    def update(nets, key, b):
        k1, k2 = jax.random.split(key)
        alpha = jnp.exp(nets["alpha"].params["log"])
        a2, log_pi2 = sample(nets["actor"].params, k1, b["next_obs"])
        q2 = critic.apply(nets["target"], b["next_obs"], a2).min(0) - alpha * log_pi2
        y = b["reward"] + size.discount * q2  # Pendulum never terminates

        def critic_loss(p):
            return jnp.square(critic.apply(p, b["obs"], b["action"] / 2.0) - y).mean(1).sum()

        q_net = nets["critic"].apply_gradients(grads=jax.grad(critic_loss)(nets["critic"].params))

        def actor_loss(p):
            a, log_pi = sample(p, k2, b["obs"])
            q = critic.apply(q_net.params, b["obs"], a).min(0)
            return (alpha * log_pi - q).mean(), log_pi

        grad, log_pi = jax.grad(actor_loss, has_aux=True)(nets["actor"].params)
        gap = (log_pi - 1.0).mean()
        return {
            "actor": nets["actor"].apply_gradients(grads=grad),
            "critic": q_net,
            "target": optax.incremental_update(q_net.params, nets["target"], size.tau),
            "alpha": nets["alpha"].apply_gradients(grads={"log": -gap}),
        }

    return _scanned("Pendulum-v1", size, jnp.zeros(1), init, act, update)


def jax_dqn(size: Size) -> Loop:
    """Double DQN on gymnax's CartPole-v1."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax.training.train_state import TrainState

    nn: Any = _linen()

    class QNet(nn.Module):
        @nn.compact
        def __call__(self, x):
            for width in size.hidden:
                x = nn.relu(nn.Dense(width)(x))
            return nn.Dense(2)(x)

    net = QNet()

    def init(key, obs):
        params = net.init(key, obs)
        online = TrainState.create(apply_fn=net.apply, params=params, tx=optax.adam(size.rate))
        return online, jax.tree.map(jnp.copy, params)

    def act(nets, key, obs):
        k1, k2 = jax.random.split(key)
        best = net.apply(nets[0].params, obs).argmax(-1)
        explore = jax.random.uniform(k1, best.shape) < size.epsilon
        return jnp.where(explore, jax.random.randint(k2, best.shape, 0, 2), best)

    def update(nets, key, b):
        online, target = nets
        chosen = net.apply(online.params, b["next_obs"]).argmax(-1)
        q2 = jnp.take_along_axis(net.apply(target, b["next_obs"]), chosen[:, None], 1)[:, 0]
        y = b["reward"] + size.discount * (1 - b["done"]) * q2

        def loss(p):
            q = jnp.take_along_axis(net.apply(p, b["obs"]), b["action"][:, None], 1)[:, 0]
            return optax.huber_loss(q, y).mean()

        online = online.apply_gradients(grads=jax.grad(loss)(online.params))
        copy = online.step % size.target_every == 0
        return online, optax.periodic_update(online.params, target, copy, 1)

    return _scanned("CartPole-v1", size, jnp.int32(0), init, act, update)


# ---- PyTorch ------------------------------------------------------------------------------------


def _mlp(torch: Any, num_in: int, hidden: tuple[int, ...], num_out: int) -> Any:
    widths, layers = (num_in, *hidden), []
    for a, b in itertools.pairwise(widths):
        layers += [torch.nn.Linear(a, b), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(widths[-1], num_out))


def _stepped(name: str, size: Size, act: Any, update: Any, action_shape: tuple[int, ...], action_type: Any) -> Loop:  # fmt: skip
    """Gymnasium's environment and a NumPy ring around act(obs) and update(batch of tensors)."""
    torch, gymnasium = _need("torch"), _need("gymnasium")
    env = gymnasium.make(name)
    obs, _ = env.reset(seed=0)
    n, rng = size.capacity, np.random.default_rng(0)
    ring = {
        "obs": np.zeros((n, *obs.shape), np.float32),
        "action": np.zeros((n, *action_shape), action_type),
        "reward": np.zeros(n, np.float32),
        "done": np.zeros(n, np.float32),
        "next_obs": np.zeros((n, *obs.shape), np.float32),
    }
    at = {"obs": obs, "written": 0, "running": 0.0}

    def call(steps: int) -> float:
        ended = []
        for _ in range(steps):
            action = act(torch.as_tensor(at["obs"], dtype=torch.float32)[None])
            after, reward, terminated, truncated, _ = env.step(action)
            i = at["written"] % n
            for key, value in zip(ring, (at["obs"], action, reward, terminated, after), strict=True):  # fmt: skip
                ring[key][i] = value
            at["written"] += 1
            at["running"] += float(reward)
            at["obs"] = after
            if terminated or truncated:
                ended.append(at["running"])
                at["obs"], at["running"] = env.reset()[0], 0.0
            if at["written"] >= size.batch:
                rows = rng.integers(0, min(at["written"], n), size.batch)
                update({k: torch.from_numpy(v[rows]) for k, v in ring.items()})
        return float(np.mean(ended)) if ended else math.nan

    return call


def torch_sac(size: Size) -> Loop:
    """SAC on Gymnasium's Pendulum-v1."""
    torch = _need("torch")
    trunk = _mlp(torch, 3, size.hidden[:-1], size.hidden[-1])
    heads = [torch.nn.Linear(size.hidden[-1], 1) for _ in range(2)]
    critics, targets = ([_mlp(torch, 4, size.hidden, 1) for _ in range(2)] for _ in range(2))
    for q, t in zip(critics, targets, strict=True):
        t.load_state_dict(q.state_dict())
    log_alpha = torch.zeros(1, requires_grad=True)
    policy = [*trunk.parameters(), *(p for h in heads for p in h.parameters())]
    both = [p for q in critics for p in q.parameters()]
    frozen = [p for t in targets for p in t.parameters()]
    adam = torch.optim.Adam
    of_actor, of_critic, of_alpha = (adam(p, lr=size.rate) for p in (policy, both, [log_alpha]))

    def sample(obs):
        x = torch.relu(trunk(obs))
        mean, log_std = heads[0](x), torch.clamp(heads[1](x), *LOG_STD)
        noise = torch.randn_like(mean)
        u = mean + log_std.exp() * noise
        density = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
        slope = 2 * (math.log(2.0) - u - torch.nn.functional.softplus(-2 * u))
        return torch.tanh(u), (density - slope).sum(-1)

    def q_of(nets, obs, action):
        x = torch.cat([obs, action], -1)
        return [q(x)[:, 0] for q in nets]

    def act(obs):
        with torch.no_grad():
            return 2.0 * sample(obs)[0][0].numpy()

    def update(b):
        alpha = log_alpha.detach().exp()
        with torch.no_grad():
            a2, log_pi2 = sample(b["next_obs"])
            q2 = torch.min(*q_of(targets, b["next_obs"], a2)) - alpha * log_pi2
            y = b["reward"] + size.discount * (1 - b["done"]) * q2
        q_0, q_1 = q_of(critics, b["obs"], b["action"] / 2.0)
        loss = ((q_0 - y) ** 2).mean() + ((q_1 - y) ** 2).mean()
        of_critic.zero_grad()
        loss.backward()
        of_critic.step()
        a, log_pi = sample(b["obs"])
        loss = (alpha * log_pi - torch.min(*q_of(critics, b["obs"], a))).mean()
        of_actor.zero_grad()
        loss.backward()
        of_actor.step()
        loss = -log_alpha * (log_pi.detach() - 1.0).mean()
        of_alpha.zero_grad()
        loss.backward()
        of_alpha.step()
        with torch.no_grad():
            for t, p in zip(frozen, both, strict=True):
                t.lerp_(p, size.tau)

    return _stepped("Pendulum-v1", size, act, update, (1,), np.float32)


def torch_dqn(size: Size) -> Loop:
    """Double DQN on Gymnasium's CartPole-v1."""
    torch = _need("torch")
    online, target = (_mlp(torch, 4, size.hidden, 2) for _ in range(2))
    target.load_state_dict(online.state_dict())
    optimizer = torch.optim.Adam(online.parameters(), lr=size.rate)
    rng, count = np.random.default_rng(1), [0]

    def act(obs):
        if rng.random() < size.epsilon:
            return int(rng.integers(2))
        with torch.no_grad():
            return int(online(obs).argmax())

    def update(b):
        with torch.no_grad():
            chosen = online(b["next_obs"]).argmax(1, keepdim=True)
            q2 = target(b["next_obs"]).gather(1, chosen)[:, 0]
            y = b["reward"] + size.discount * (1 - b["done"]) * q2
        q = online(b["obs"]).gather(1, b["action"][:, None])[:, 0]
        loss = torch.nn.functional.smooth_l1_loss(q, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        count[0] += 1
        if count[0] % size.target_every == 0:
            target.load_state_dict(online.state_dict())

    return _stepped("CartPole-v1", size, act, update, (), np.int64)
