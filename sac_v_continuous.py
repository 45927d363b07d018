# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "torch==2.13.0", "gymnasium[classic-control,mujoco]>=1.3,<1.5", "minatar>=1.0.15,<1.1", "moviepy>=2.1,<3",
#     "mujoco>=3.3,<3.11", "numpy>=2.0,<3", "tensorboard>=2.18,<3", "tqdm>=4.66,<5", "tyro>=1.0,<2",
#     "wandb>=0.31,<0.32",
# ]
# ///
"""SAC of 2018 (Soft Actor-Critic with a value network) for continuous actions, in one file.

A value network learns what the policy is worth, its entropy included, and the critics learn from that network:

    value         E_{a ~ pi}[min_i Q_i - alpha log pi], with alpha fixed
    actor         E_{a ~ pi}[alpha log pi - min_i Q_i]
    critic        y = reward_scale r + gamma (1 - terminated) V'(s')

docs/algorithms.md lists where this differs from CleanRL's, docs/metrics.md what is logged.
"""

import copy
import math
from collections import namedtuple
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.func import functional_call, grad_and_value


@dataclass
class Args:
    env_id: str = "HalfCheetah-v5"
    """any Gymnasium id with bounded continuous actions and flat observations (Hopper-v5, Pendulum-v1, ...)"""
    env_kwargs: tuple[str, ...] = ()
    """the environment's keyword arguments, key=value each, and gymnasium.make's (max_episode_steps=200)"""
    total_timesteps: int = 1_000_000
    """environment steps of the run"""
    seed: int = 1
    """seed of the weights, the actions, the replay samples and every episode"""
    exp_name: str = Path(__file__).stem
    """name of this experiment, part of the run's name"""
    run_name: str | None = None
    """folder of this run under runs/ (None: {env_id}__{exp_name}__{seed}__{timestamp})"""
    resume: bool = False
    """go on from the last checkpoint, if there is one (without --run-name: the latest of this task, name and seed)"""
    checkpoint_interval: int = 100_000
    """steps between two checkpoints, each written at the end of an episode"""
    evaluate: str | None = None
    """train nothing, but play --eval-episodes episodes of this run (its folder), deterministic and stochastic"""
    eval_episodes: int = 10
    """episodes of the deterministic policy played after training, and in each evaluation"""
    eval_interval: int | None = None
    """steps between two evaluations, on an environment of their own, that change nothing in the run (None: none)"""
    log_interval: int = 1_000
    """steps between two logged values of the losses and of the policy (episodes are logged as they end)"""
    track: bool = False
    """send the run to Weights & Biases as well (WANDB_MODE=offline needs no login)"""
    wandb_project_name: str = "klac"
    """W&B project"""
    wandb_entity: str | None = None
    """W&B team or user"""
    capture_video: bool = False
    """record clips of at most 300 frames, from training, its last evaluation and --evaluate"""
    compile: bool = True
    """compile each update into one graph (CUDA graphs on a GPU); a minute the first time (--no-compile: to debug)"""
    cuda: bool = True
    """use a GPU where there is one"""
    buffer_size: int = 1_000_000
    """capacity of the replay buffer, in transitions"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """weight of the new parameters in a target network's update (1: copy)"""
    batch_size: int = 256
    """transitions in a batch"""
    learning_starts: int = 5_000
    """warm-up steps with uniformly random actions, before any update"""
    policy_lr: float = 3e-4
    """learning rate of the actor"""
    q_lr: float = 3e-4
    """learning rate of the critics and of the value network"""
    target_network_frequency: int = 1
    """environment steps per update of the target networks"""
    alpha: float = 1.0
    """temperature: what a nat of entropy is worth, in scaled rewards"""
    autotune: ClassVar[bool] = False
    """no flag: the temperature is fixed"""
    reward_scale: float = 5.0
    """the critics learn from rewards times this (the paper's: 5, for Humanoid 20); returns are logged unscaled"""
    exploit_radius: float = 0.25
    """half-width r of the exploitation region around the mean action, in the environment's action units"""


def make_env(args: Args, render: bool = False) -> gym.Env:
    """One plain environment. Raises UsageError if it cannot be used."""
    env = make_gym(args, args.env_id, render)
    space, box = env.observation_space, env.action_space
    valid = "a bounded, flat Box of floats (gymnasium.wrappers.TransformAction makes one; Discrete: klac_discrete.py)"
    bounded = isinstance(box, gym.spaces.Box) and len(box.shape) == 1 and box.shape[0] > 0 and box.dtype.kind == "f"
    if bounded:  # bounds whose distance overflows are none
        half_width = (box.high / 2 - box.low / 2).astype(float)
        bounded = (half_width > 0).all() and (half_width < 1e38).all()
    require(bounded, f"--env-id {args.env_id}: actions must be {valid}, not {box}")
    flat = isinstance(space, gym.spaces.Box) and len(space.shape) == 1 and space.shape[0] > 0
    require(flat, f"--env-id {args.env_id}: observations must be flat (one dimension), not {space}")
    return Checked(env, args)


def parameter(fan_in: int, *shape: int) -> nn.Parameter:
    """As PyTorch's linear layers start. Gradients come from torch.func: no parameter asks for one."""
    return nn.Parameter((2 * torch.rand(shape) - 1) / math.sqrt(fan_in), requires_grad=False)


class Networks(nn.Module):
    """A stack of k networks with two hidden layers of 256, (B, inputs) to (k, B, outputs); several inputs are joined.
    The actor is a stack of one, the twin critics are two."""

    def __init__(self, k: int, inputs: int, outputs: int):
        super().__init__()
        self.w1, self.b1 = parameter(inputs, k, inputs, 256), parameter(inputs, k, 1, 256)
        self.w2, self.b2 = parameter(256, k, 256, 256), parameter(256, k, 1, 256)
        self.w3, self.b3 = parameter(256, k, 256, outputs), parameter(256, k, 1, outputs)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        x = torch.cat(inputs, dim=1).expand(len(self.w1), -1, -1)
        h = (x @ self.w1 + self.b1).relu()
        h = (h @ self.w2 + self.b2).relu()
        return h @ self.w3 + self.b3


class Actor(Networks):
    """A Gaussian squashed by tanh into the action box."""

    def __init__(self, obs_dim: int, box: gym.spaces.Box):
        super().__init__(1, obs_dim, 2 * box.shape[0])
        self.box = box
        low, high = [torch.as_tensor(bound / 2, dtype=torch.float32) for bound in (box.low, box.high)]
        self.register_buffer("scale", high - low, persistent=False)
        self.register_buffer("centre", high + low, persistent=False)

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log standard deviation of the Gaussian before tanh, (B, d) each."""
        mean, x = super().forward(obs)[0].chunk(2, dim=1)
        return mean, -5 + 3.5 * (torch.tanh(x) + 1)

    def squash(self, u: torch.Tensor) -> torch.Tensor:
        """The action of u, a point before tanh."""
        return torch.tanh(u) * self.scale + self.centre

    def log_prob(self, mean: torch.Tensor, log_std: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """log pi(squash(u)|s) in action units, (B,), finite however near the bounds."""
        log_normal = -0.5 * ((u - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)
        log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u)) + self.scale.log()  # log of d squash / d u
        return (log_normal - log_slope).sum(1)


def make_networks(args: Args, env: gym.Env) -> tuple[Actor, Networks]:
    """The actor and the twin critics."""
    obs_dim, d = env.observation_space.shape[0], env.action_space.shape[0]
    return Actor(obs_dim, env.action_space), Networks(2, obs_dim + d, 1)


@torch.inference_mode()
def act(actor: Actor, obs: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
    """An action drawn from pi(.|obs), or without a generator the mean's, (d,)."""
    u, log_std = actor(torch.as_tensor(obs, dtype=torch.float32, device=actor.scale.device).unsqueeze(0))
    if rng is not None:
        u = u + log_std.exp() * gaussian(rng, u)
    return actor.squash(u)[0].cpu().numpy().clip(actor.box.low, actor.box.high)


def gaussian(rng: np.random.Generator, like: torch.Tensor) -> torch.Tensor:
    """Standard normal noise, drawn outside the compiled graphs."""
    return torch.as_tensor(rng.standard_normal(like.shape, np.float32), device=like.device)


Batch = namedtuple("Batch", "obs actions rewards next_obs terminations")


class ReplayBuffer:
    """The last `capacity` transitions, as the environment returned them."""

    def __init__(self, capacity: int, env: gym.Env, device: torch.device):
        obs, action, number = env.observation_space, env.action_space, gym.spaces.Box(-np.inf, np.inf, ())
        spaces = obs, action, number, obs, number
        self.columns = Batch(*[np.zeros((capacity, *space.shape), stored_dtype(space)) for space in spaces])
        self.capacity, self.device, self.added = capacity, device, 0

    def add(self, *transition) -> None:
        """Stores (obs, action, reward, next_obs, terminated): terminated is False at a time limit."""
        for column, value in zip(self.columns, transition, strict=True):
            column[self.added % self.capacity] = value
        self.added += 1

    def sample(self, batch_size: int, rng: np.random.Generator) -> Batch:
        """Draws transitions uniformly: (B, ...) each, observations as float32."""
        i = rng.integers(min(self.added, self.capacity), size=batch_size)
        batch = Batch(*[torch.as_tensor(column[i], device=self.device) for column in self.columns])
        return batch._replace(obs=batch.obs.float(), next_obs=batch.next_obs.float())


def log_volume(box: gym.spaces.Box) -> float:
    """log vol of the action box: the entropy of the uniform policy, in nats."""
    return float(np.log(np.subtract(box.high, box.low, dtype=np.float64)).sum())


def exploit_probability(actor: Actor, obs: torch.Tensor, r: float) -> torch.Tensor:
    """Mean over the observations of the probability of an action within r of the mean's in every dimension."""
    mean, log_std = [x.double() for x in actor(obs)]
    normal, width = torch.distributions.Normal(mean, log_std.exp(), validate_args=False), r / actor.scale
    low, high = [torch.atanh((torch.tanh(mean) + side).clamp(-1, 1)) for side in (-width, width)]  # before tanh
    return (normal.cdf(high) - normal.cdf(low)).prod(1).mean()


def soft_value(batch: Batch, noise: torch.Tensor, actor: Actor, critics: Networks, alpha) -> torch.Tensor:
    """min_i Q_i(s, a) - alpha log pi(a|s), (B,), with a ~ pi."""
    mean, log_std = actor(batch.obs)
    u = mean + log_std.exp() * noise
    min_q = critics(batch.obs, actor.squash(u)).amin(0).squeeze(1)  # (B,)
    return min_q - alpha * actor.log_prob(mean, log_std, u)


def value_loss(parameters: dict, batch: Batch, value: Networks, y: torch.Tensor):
    """The mean squared error of V(s), and the mean V(s)."""
    v = functional_call(value, parameters, (batch.obs,))[0].squeeze(1)  # (B,)
    return (v - y).square().mean(), v.mean()


def value_gradients(batch: Batch, value: Networks, *of_target):
    """V's gradients, by parameter, and what is logged; of_target are soft_value's other arguments. Pure."""
    y = soft_value(batch, *of_target)
    differentiate = grad_and_value(value_loss, has_aux=True)
    gradients, (loss, v) = differentiate(dict(value.named_parameters()), batch, value, y)
    return gradients, {"losses/vf_loss": loss, "losses/vf_values": v}


def td_target(batch: Batch, target_value: Networks, gamma, reward_scale) -> torch.Tensor:
    """y = reward_scale r + gamma (1 - terminated) V'(s'), (B,)."""
    next_v = target_value(batch.next_obs)[0].squeeze(1)
    return reward_scale * batch.rewards + gamma * (1 - batch.terminations) * next_v


def critic_loss(parameters: dict, batch: Batch, critics: Networks, y: torch.Tensor):
    """The sum over the twins of their mean squared errors, and those errors and the mean Q(s, a), (2,) each."""
    q = functional_call(critics, parameters, (batch.obs, batch.actions)).squeeze(2)  # (2, B)
    errors = (q - y).square().mean(1)
    return errors.sum(), (errors, q.mean(1))


def critic_gradients(batch: Batch, critics: Networks, *of_target):
    """The critics' gradients, by parameter, and what is logged; of_target are td_target's other arguments. Pure."""
    y = td_target(batch, *of_target)
    differentiate = grad_and_value(critic_loss, has_aux=True)
    gradients, (loss, (errors, q)) = differentiate(dict(critics.named_parameters()), batch, critics, y)
    log = {"losses/qf1_values": q[0], "losses/qf2_values": q[1], "losses/qf_loss": loss / 2}
    return gradients, log | {"losses/qf1_loss": errors[0], "losses/qf2_loss": errors[1]}


def actor_loss(parameters: dict, batch: Batch, noise: torch.Tensor, actor: Actor, critics: Networks, log_vol, alpha):
    """E_{a ~ pi}[alpha log pi - min_i Q_i], log pi, and log of its ratio to the uniform policy, (B,) each."""
    mean, log_std = functional_call(actor, parameters, (batch.obs,))
    u = mean + log_std.exp() * noise
    log_pi = actor.log_prob(mean, log_std, u)
    min_q = critics(batch.obs, actor.squash(u)).amin(0).squeeze(1)
    return (alpha * log_pi - min_q).mean(), (log_pi, log_pi + log_vol)


def actor_gradients(batch: Batch, noise: torch.Tensor, actor: Actor, *rest):
    """The actor's gradients, by parameter, the KL that the temperature holds, and what is logged. Pure."""
    differentiate = grad_and_value(actor_loss, has_aux=True)
    gradients, (loss, (log_pi, log_ratio)) = differentiate(dict(actor.named_parameters()), batch, noise, actor, *rest)
    kl = log_ratio.mean()
    return gradients, kl, {"losses/actor_loss": loss, "policy/kl": kl, "policy/entropy": -log_pi.mean()}


def train(args: Args) -> Path:
    """Trains one run and returns its folder. Raises UsageError, with nothing written, if a flag cannot work, NotFinite
    if a number is not, NotSaved on a full disk and, when asked to stop, KeyboardInterrupt after it has saved itself."""
    check_flags(args)
    env = make_env(args, args.capture_video)
    box, r = env.action_space, args.exploit_radius
    require(args.reward_scale > 0, f"--reward-scale {args.reward_scale}: must be positive")
    with Run(args, "SAC-V", env) as run:
        if run.finished:
            return run.folder

        args, device = run.args, run.device
        rng, log_vol = np.random.default_rng(args.seed), log_volume(box)
        torch.manual_seed(args.seed)
        actor, critics = [networks.to(device) for networks in make_networks(args, env)]
        value = Networks(1, env.observation_space.shape[0], 1).to(device)
        target_value = copy.deepcopy(value)
        actor_optimizer = torch.optim.Adam(actor.parameters(), lr=args.policy_lr, fused=True)
        q_optimizer = torch.optim.Adam(critics.parameters(), lr=args.q_lr, fused=True)
        v_optimizer = torch.optim.Adam(value.parameters(), lr=args.q_lr, fused=True)
        alpha = torch.tensor(args.alpha, device=device)
        buffer = ReplayBuffer(args.buffer_size, env, device)
        parts = {"actor": actor, "critics": critics, "value": value, "target_value": target_value}
        parts |= {"actor_optimizer": actor_optimizer, "q_optimizer": q_optimizer, "v_optimizer": v_optimizer}
        run.start(parts, buffer, alpha.log(), rng)
        compute_value_gradients, compute_actor_gradients, compute_critic_gradients = run.compile(
            value_gradients, actor_gradients, critic_gradients
        )

        env, episode_ended = film(env, args, run.folder / "videos" / "train", f"from-step-{run.step}"), True
        for global_step in run.steps():
            if episode_ended:
                obs, _ = env.reset(seed=int(rng.integers(2**31)))
                rewards, start_value = [], None

            # Act: at random during the warm-up, then from the policy
            if global_step < args.learning_starts:
                action = rng.uniform(box.low, box.high).astype(np.float32)
            else:
                action = act(actor, obs, rng)
                if not rewards:
                    pair = [torch.as_tensor(x[None], dtype=torch.float32, device=device) for x in (obs, action)]
                    start_value = critics(*pair).amin().item() / args.reward_scale

            # Step and store: next_obs is the episode's own last observation, whatever ended it
            next_obs, reward, terminated, truncated, _ = env.step(action)
            buffer.add(obs, action, reward, next_obs, terminated)
            obs, episode_ended = next_obs, terminated or truncated
            rewards.append(reward)
            if episode_ended:
                run.log_episode(rewards, start_value)

            if global_step > args.learning_starts:
                batch = buffer.sample(args.batch_size, rng)
                noise = gaussian(rng, batch.actions)

                # Value: regress it on the soft value of the policy's action
                gradients, value_log = compute_value_gradients(batch, value, noise, actor, critics, alpha)
                descend(v_optimizer, value, gradients)

                # Actor: towards the Boltzmann policy of the critics
                gradients, _, actor_log = compute_actor_gradients(batch, noise, actor, critics, log_vol, alpha)
                descend(actor_optimizer, actor, gradients)

                # Critics: regress both on the target
                of_target = target_value, args.gamma, args.reward_scale
                gradients, log = compute_critic_gradients(batch, critics, *of_target)
                descend(q_optimizer, critics, gradients)
                log |= value_log | actor_log
                log["losses/alpha"] = alpha
                run.check(log)
                if global_step % args.log_interval == 0:
                    log["policy/exploit_probability"] = exploit_probability(actor, batch.obs, r)
                    run.log_update(log)

            if global_step > args.learning_starts and global_step % args.target_network_frequency == 0:
                for parameter, target in zip(value.parameters(), target_value.parameters(), strict=True):
                    target.lerp_(parameter, args.tau)

            # Checkpoint: between two episodes, so that the next one's seed stands for the environment's state
            if episode_ended and run.wants_checkpoint():
                run.save()

        env.close()
        run.finish(actor=actor, critics=critics)
    return run.folder


# ----------------------------------------------------------------------------------------------------------------------
# The algorithm ends here. What follows is the same, word for word, in every script: checks of flags and environments, a
# run's folder with its lock, log and checkpoint, evaluation, and the command line.
# ----------------------------------------------------------------------------------------------------------------------

import ast
import ctypes.util
import difflib
import fcntl
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
import zipfile
from collections import deque
from contextlib import contextmanager, suppress
from dataclasses import asdict, field, fields, make_dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Context
from typing import Annotated

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


def descend(optimizer: torch.optim.Optimizer, network: nn.Module, gradients: dict[str, torch.Tensor]) -> None:
    """One step of the optimizer of the network's parameters along these gradients."""
    for name, parameter in network.named_parameters():
        parameter.grad = gradients[name]
    optimizer.step()


class UsageError(ValueError):
    """A flag that cannot work; the message names the flag, its value and what would be valid."""


class NotFinite(FloatingPointError):
    """A loss, a weight, an observation, an action or a reward that is not finite, as float32 holds it."""


class NotSaved(OSError):
    """The disk did not take what a run leaves when it is over."""


def require(valid: bool, message: str) -> None:
    if not valid:
        raise UsageError(message)


def say(words: str, file=None) -> None:
    """Prints a line. One that a closed pipe, a full disk or a terminal that is gone does not take ends no run."""
    try:
        # the bar makes room; what interrupts tqdm's own wait for its lock is lost to a RuntimeError
        with tqdm.get_lock(), tqdm.external_write_mode(file, nolock=True):
            print(words, file=file, flush=True)
    except BrokenPipeError:  # which would be raised again at the end of the process
        os.dup2(os.open(os.devnull, os.O_WRONLY), (file or sys.stdout).fileno())
    except (OSError, RuntimeError):  # RuntimeError: a signal's handler interrupted another line
        pass


@contextmanager
def refusing(message: str):
    """Makes any exception of its block a UsageError that begins with `message`: torch, W&B and others raise many."""
    try:
        yield
    except Exception as error:
        raise UsageError(f"{message}: {error!s:.200}") from error


def check_flags(args: Args) -> None:
    """Raises UsageError on the first flag that cannot work on any task."""
    total, rules = args.total_timesteps, []
    for name, value in asdict(args).items():
        if value is None or value == getattr(Args, name, None):  # a fork's own default may be 0 or infinite
            continue
        if name.endswith(("_timesteps", "_interval", "_episodes", "_size", "_samples", "_frequency")):
            rules.append((name, 0 < value < 2**62, "positive and below 2**62"))
        if name in ("exp_name", "run_name"):
            rules.append((name, value == os.path.basename(os.path.abspath(value)), "a plain folder name"))
        if type(value) is float:
            rules.append((name, math.isfinite(value), "finite"))
        if name in ("policy_lr", "q_lr", "exploit_radius"):
            rules.append((name, value > 0, "positive"))
        if name == "target_entropy_scale":
            rules.append((name, 0 < value < 1, "in (0, 1)"))
        if name.endswith("_frequency") or name in ("log_interval", "eval_interval"):
            rules.append((name, value <= total, f"at most --total-timesteps {total}"))
    rules += [
        ("seed", 0 <= args.seed < 2**32, "in [0, 2**32)"),
        ("gamma", 0 <= args.gamma < 1, "in [0, 1)"),
        ("tau", 0 < args.tau <= 1, "in (0, 1]"),
        ("alpha", args.alpha >= 0, "at least 0"),
        ("alpha", not args.autotune or args.alpha == Args.alpha, "given with --no-autotune: otherwise it is learned"),
        ("batch_size", args.batch_size <= args.buffer_size, f"at most --buffer-size {args.buffer_size}"),
        ("learning_starts", 0 <= args.learning_starts < total, f"at least 0 and below --total-timesteps {total}"),
    ]
    for name, valid, expected in rules:
        require(valid, f"--{name.replace('_', '-')} {getattr(args, name)}: must be {expected}")


def check_range(args: Args, name: str, low: float, high: float, why: str = "") -> None:
    """Raises UsageError unless the flag's value is between the two, which the message rounds inwards."""
    value = getattr(args, name)
    low_words = Context(prec=4, rounding=ROUND_CEILING).create_decimal_from_float(low)
    high_words = Context(prec=4, rounding=ROUND_FLOOR).create_decimal_from_float(high)
    valid = f"in ({low_words:g}, {high_words:g}){why}" if low < high else f"another: none is valid here{why}"
    require(low < value < high, f"--{name.replace('_', '-')} {value}: must be {valid}")


def stored_dtype(space: gym.Space) -> np.dtype:
    """What the buffer keeps of a space: its own dtype, but at most float32, and int64 for discrete actions."""
    if isinstance(space, gym.spaces.Discrete):
        return np.dtype(np.int64)
    return np.dtype(np.float32) if space.dtype.kind == "f" and space.dtype.itemsize > 4 else space.dtype


def memory_limit() -> float:
    """Bytes that this process may have, of the machine's or of its container's or SLURM job's; inf if nothing says."""
    limits, files = [math.inf], []
    with suppress(OSError, LookupError):  # not Linux
        limits.append(1024 * int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]))
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            own = line.split(":", 2)[2].strip("/")
            files.append(Path("/sys/fs/cgroup", own, "memory.max"))
            files.append(Path("/sys/fs/cgroup/memory", own, "memory.limit_in_bytes"))  # of version 1 of cgroups
    for file in files:
        for group in file.parents:
            with suppress(OSError, ValueError):  # not there, or "max"
                limits.append(int((group / file.name).read_text()))
    return min(limits)


def check_memory(args: Args, env: gym.Env) -> None:
    """Raises UsageError if the buffer, which claims its memory only as it fills, needs more than there is."""
    spaces = env.observation_space, env.observation_space, env.action_space
    size = 8 + sum(stored_dtype(space).itemsize * math.prod(space.shape) for space in spaces)
    limit = memory_limit()
    words = f"needs {args.buffer_size * size / 1e9:.1f} GB of memory; at most {limit // size} fit"
    require(args.buffer_size * size <= limit, f"--buffer-size {args.buffer_size}: {words}")


class Checked(gym.Wrapper):
    """Trusts nothing that an environment returns: it may overwrite its own arrays, so that each is copied, in the
    buffer's dtype. Discrete actions count from 0 wherever their space starts. Raises UsageError where an observation or
    reward is not what the spaces promise (its range at first alone), NotFinite where it is not finite."""

    def __init__(self, env: gym.Env, args: Args):
        super().__init__(env)
        self.space, self.dtype = env.observation_space, stored_dtype(env.observation_space)
        self.name, self.observes = args.env_id, f"--env-id {args.env_id}: observes"
        env.action_space.seed(0)
        first, _ = self.reset(seed=0)
        action = env.action_space.sample()
        second, *_ = self.step(action if isinstance(action, np.ndarray) else int(action - env.action_space.start))
        for obs in (first, second):
            slack = 1e-3 * (1 + np.abs(obs.astype(float)))
            inside = ((self.space.low - slack <= obs) & (obs <= self.space.high + slack)).all()
            require(inside, f"{self.observes} {obs.min()} to {obs.max()}, its space is {self.space}")

    def convert(self, obs) -> np.ndarray:
        try:
            given = np.asarray(obs)
        except Exception as error:  # it is ragged, or torch's and on a GPU
            raise UsageError(f"--env-id {self.name}: the observation is no array of numbers: {error!s:.200}") from error
        castable = given.dtype.kind in ("buif" if self.dtype.kind == "f" else "bui")
        if not castable or given.shape != self.space.shape:
            raise UsageError(f"{self.observes} {given.dtype} {given.shape}, its space is {self.space}")
        with np.errstate(over="ignore"):
            found = np.array(given, self.dtype, order="C")
        if self.dtype.kind == "f" and not np.isfinite(found).all():
            raise NotFinite("the environment's observation is not finite")
        if self.dtype.kind != "f" and (found != given).any():  # 300 is 44 in a byte
            raise UsageError(f"{self.observes} {given.min()} to {given.max()}, its space is {self.space}")
        return found

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        return self.convert(obs), info

    def step(self, action):
        if isinstance(action, np.ndarray):
            if not np.isfinite(action).all():
                raise NotFinite("the policy's action is not finite")
            sent = action.astype(self.action_space.dtype)
        else:
            sent = action + int(self.action_space.start)
        obs, reward, terminated, truncated, info = self.env.step(sent)
        try:
            reward = float(np.asarray(reward).item())
        except Exception as error:
            raise UsageError(f"--env-id {self.name}: the reward must be one number, not {reward!r:.100}") from error
        if not abs(reward) <= torch.finfo(torch.float32).max:
            raise NotFinite(f"the environment's reward is {reward}")
        return self.convert(obs), reward, bool(terminated), bool(truncated), info


def env_kwargs(args: Args) -> dict:
    """--env-kwargs as a dict: a value is a Python literal, else a string."""
    kwargs = {}
    for pair in args.env_kwargs:
        key, _, value = pair.partition("=")
        require(key.isidentifier() and value, f"--env-kwargs {pair}: must be key=value")
        try:
            kwargs[key] = ast.literal_eval({"true": "True", "false": "False"}.get(value, value))
        except (ValueError, SyntaxError, TypeError):
            kwargs[key] = value
    return kwargs


def make_gym(args: Args, env_id: str, render: bool) -> gym.Env:
    """gym.make, with a time limit where there is none, and observations flattened that are no Box. Raises UsageError if
    it cannot be made or filmed."""
    kwargs, given = env_kwargs(args), [f"--env-id {env_id}"]
    if kwargs:
        given.append(f"--env-kwargs {' '.join(args.env_kwargs)}")
    gym.logger.min_level = gym.logger.ERROR
    if render:
        given.append("--capture-video")
        kwargs["render_mode"] = "rgb_array"
        if not os.environ.get("MUJOCO_GL") and ctypes.util.find_library("EGL"):
            os.environ["MUJOCO_GL"] = "egl"  # works on a server without a display too
    try:
        env = gym.make(env_id, disable_env_checker=True, **kwargs)
        if env.spec.max_episode_steps is None:  # a policy that stays alive would be neither logged nor saved
            env = gym.wrappers.TimeLimit(env, 10_000)
        if not isinstance(env.observation_space, gym.spaces.Box) and env.observation_space.is_np_flattenable:
            env = gym.wrappers.FlattenObservation(env)
        if render:
            env.reset(seed=0)
            frame = env.render()  # fails now rather than in the run
            if env.render_mode != "rgb_array" or getattr(frame, "ndim", None) != 3:
                raise TypeError(f"render_mode is {env.render_mode}, and render() must give an array (height, width, 3)")
        return env
    except Exception as error:  # of Gymnasium, of an imported module, or of the environment itself
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__} in {Path(place.filename).name}, line {place.lineno}: {error}"
        module, colon, name = env_id.rpartition(":")
        if isinstance(error, gym.error.UnregisteredEnv) and name not in gym.registry:
            known = [x for x in gym.registry if x.rpartition("/")[0] == name.rpartition("/")[0] != ""]
            known = known or [x.removeprefix("MinAtar/") for x in gym.registry]
            nearest = [f"{module}{colon}{x}" for x in difflib.get_close_matches(name, known, cutoff=0)]
            reason = f"{error} Nearest ids: {', '.join(nearest)}"
        raise UsageError(f"{' '.join(given)}: {reason}") from error


def load(saved: Path) -> dict | None:
    """What a file holds, or in a run's folder its actor if it is finished, else its checkpoint; None if there is none.
    A file from a stranger can run no code. Raises UsageError if it is damaged, or no saved run."""
    for path in [saved] if saved.is_file() else [saved / "actor.pt", saved / "checkpoint.pt"]:
        if path.exists():
            words = "; without it the run starts afresh" if path.name == "checkpoint.pt" else ""
            with refusing(f"{path}: unreadable{words}"), zipfile.ZipFile(path) as archive:
                require(archive.testzip() is None, "a checksum is wrong")  # torch does not look
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                _ = state["args"]["env_id"], state["actor"]  # what every saved run has
                require("step" in state or path.name != "checkpoint.pt", "it has no step")
                return state
    return None


@contextmanager
def replacing(path: Path):
    """A file to write in, which takes the place of `path` whole or not at all: then, on a full disk for instance, this
    raises OSError."""
    partial = path.with_name(f"partial-{os.getpid()}")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        cause = error
        while cause.__context__ is not None and not isinstance(cause, OSError):  # torch's own error hides the disk's
            cause = cause.__context__
        raise OSError(str(cause)) from error


def save(state: dict, path: Path) -> None:
    with replacing(path) as file:
        torch.save(state, file)


def require_finite(state: dict) -> None:
    """Raises NotFinite if a weight is not."""
    for name in ("actor", "critics"):
        if not all(weights.isfinite().all() for weights in state[name].values()):
            raise NotFinite(f"a weight of the {name} is not finite")


class Run:
    """A run's folder: its name, its lock, what was saved there, its log, and the signals that ask the run to stop."""

    def __init__(self, args: Args, algorithm: str, env: gym.Env):
        """Raises UsageError, with nothing written, if another process has the folder or other flags began the run."""
        check_memory(args, env)
        self.task = args.env_id.split("/")[-1].split(":")[-1]
        prefix = f"{self.task}__{args.exp_name}__{args.seed}__"
        earlier = sorted(path.name for path in Path("runs").glob("*") if path.name.rpartition("__")[0] + "__" == prefix)
        name = earlier[-1] if args.resume and earlier else f"{prefix}{time.time_ns() // 1000}"
        self.folder, self.state = Path("runs", args.run_name or name), None
        self.lock, self.csv, self.writer, self.wandb, self.handlers = None, None, None, None, {}
        self.step, self.saved_step, self.tracked_step, self.hours, self.best_return = 0, 0, -1, 0.0, -math.inf
        self.stopped_by, self.pending, self.first_update, self.returns = None, b"", None, deque(maxlen=20)
        self.device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
        try:
            self.open(args, algorithm)
        except BaseException:
            self.close()
            raise
        if isinstance(env.env, gym.wrappers.FlattenObservation):
            flattened = f"{env.env.env.observation_space!s:.100}"
            say(f"observations flattened, from {flattened} to {env.observation_space.shape}")

    def open(self, args: Args, algorithm: str) -> None:
        """With --resume, locks the folder and reads what it holds. Raises UsageError if other flags began the run."""
        began, written = {}, {}
        if args.resume and os.path.isdir(self.folder):
            self.own()
            self.state = load(self.folder)
            with suppress(OSError, ValueError, LookupError, TypeError):  # it was killed before the file was whole
                written = json.loads((self.folder / "args.json").read_text())
                self.tracked_step = written["provenance"]["tracked_step"]
            began = self.state["args"] if self.state else written
        self.finished = self.state is not None and "step" not in self.state
        self.args = replace(args, compile=args.compile and began.get("compile", True))
        if self.args.compile and not self.finished:
            try:  # it needs a C++ compiler where there is no GPU
                torch.compile(torch.sin)(torch.zeros(8, device=self.device))
            except Exception as error:  # torch raises many
                self.args.compile = False
                say(f"not compiled, and slower: {' '.join(str(error).split()):.150}", sys.stderr)
        self.config = json.loads(json.dumps({**asdict(self.args), "algorithm": algorithm}))
        self.was_tracked = (written or began).get("track", False)
        free = {"run_name", "resume", "checkpoint_interval", "eval_episodes", "eval_interval", "capture_video"}
        free |= {"evaluate", "track", "wandb_project_name", "wandb_entity"}
        if not (self.config.get("anneal") and self.config.get("autotune")):
            free.add("anneal_timesteps")  # of a schedule that is not used
        for flag, now in self.config.items() if began else ():
            before = began.get(flag)
            valid = now == before or flag in free or (flag == "total_timesteps" and now > before)
            require(valid, f"--resume: {self.folder} was started with --{flag.replace('_', '-')} {before}, not {now}")
        if self.finished:
            longer = args.total_timesteps > began["total_timesteps"]
            words = f"{self.folder} is finished, its checkpoint gone"
            require(not longer, f"--total-timesteps {args.total_timesteps}: {words}")
            say(f"{self.folder}: finished already, after {args.total_timesteps} steps")
            (self.folder / "checkpoint.pt").unlink(missing_ok=True)  # if it was killed right here, the last time

    def own(self) -> None:
        """Locks the folder until this process ends, however it ends. Raises UsageError if another process has it."""
        with refusing(f"--run-name {self.folder.name}: must be a folder with a writable file named lock"):
            self.lock = (self.folder / "lock").open("a+")
        self.lock.seek(0)
        holder = self.lock.read().strip() or "another process"
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            why = f"{holder} is running it" if isinstance(error, BlockingIOError) else f"it cannot be locked: {error}"
            raise UsageError(f"--run-name {self.folder.name}: {why}") from error
        self.lock.truncate(0)
        os.register_at_fork(after_in_child=self.lock.close)  # a worker of the environment's may outlive this process
        print(f"process {os.getpid()} on {platform.node()}", file=self.lock, flush=True)
        for partial in self.folder.glob("partial-*"):  # of a process that was killed
            partial.unlink()

    def compile(self, *functions):
        """The functions, with --compile each as one graph (on a GPU captured as CUDA graphs)."""
        if not self.args.compile:
            return functions
        say("compiling at the first update: about a minute the first time on this machine")
        torch.compiler.reset()  # of earlier runs in this process
        torch.empty(30 * 2**20, dtype=torch.uint8)  # freed at once: from then on glibc keeps what is freed for the next
        mode = "reduce-overhead" if self.device.type == "cuda" else None
        return [torch.compile(function, dynamic=False, mode=mode) for function in functions]

    def start(self, parts: dict, buffer: ReplayBuffer, log_alpha: torch.Tensor, rng: np.random.Generator) -> None:
        """Takes what a checkpoint is to hold, puts into it what the last one held, if there is one, and begins to write
        in the folder. Raises UsageError if it cannot."""
        self.parts, self.buffer, self.log_alpha, self.rng = parts, buffer, log_alpha, rng
        state, self.state, csv_size = self.state, None, 0
        if state:
            with refusing(f"{self.folder / 'checkpoint.pt'}: not of this script and task"):
                step = self.step = self.saved_step = state["step"]
                require(type(step) is int and 0 < step <= self.args.total_timesteps, f"it is of step {step}")
                self.hours, self.best_return, csv_size = state["hours"], state["best_return"], state["csv_size"]
                for name, part in parts.items():
                    part.load_state_dict(copy.deepcopy(state[name]))  # so that nothing maps the file
                for column, saved in zip(buffer.columns, state["columns"], strict=True):
                    column[: len(saved)] = saved.numpy()
                buffer.added = state["added"]
                log_alpha.copy_(state["log_alpha"])
                rng.bit_generator.state = state["rng"]
                torch.set_rng_state(state["torch_rng"])
        rows = self.folder / "scalars.csv"
        whole = csv_size == 0 or (rows.exists() and rows.stat().st_size >= csv_size)
        require(whole, f"--resume: {rows} has lost rows since the checkpoint; without the folder the run starts afresh")
        new = f"--run-name {self.folder.name}: must be a new, writable folder"
        require(self.args.resume or not self.folder.exists(), f"{new}; with --resume the one that is there goes on")
        if self.args.track:
            with refusing("--track: W&B"):
                self.start_wandb()
        with refusing(new):
            self.folder.mkdir(parents=True, exist_ok=self.args.resume)
            self.csv = rows.open("ab", buffering=0)
        if self.lock is None:
            self.own()
            begun = (self.folder / "checkpoint.pt").exists() or (self.folder / "actor.pt").exists()
            require(not begun, f"--run-name {self.folder.name}: begun by another process just now; resume it")
        self.csv.truncate(csv_size)  # what was logged after the checkpoint is logged again
        if csv_size == 0:
            self.pending = b"step,tag,value\n"
        self.provenance = provenance(self.device) | {"tracked_step": self.tracked_step}
        with refusing(f"{self.folder}: args.json is not written"):
            self.write_args()
        self.writer = SummaryWriter(self.folder, purge_step=self.step if self.args.resume else None)
        with suppress(ValueError):  # a thread may not
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) != signal.SIG_IGN:  # as it is under nohup
                    self.handlers[number] = signal.signal(number, self.stop)
        torch.set_flush_denormal(True)  # Adam's moments of units that died decay into such numbers, which are slow
        start = f"{self.config['algorithm']} on {self.args.env_id} ({self.device}), from step {self.step}"
        say(f"{self.folder}: {start}")
        self.next_checkpoint, self.next_flush = self.step + self.args.checkpoint_interval, 0.0
        self.began = time.perf_counter()

    def write_args(self) -> None:
        with replacing(self.folder / "args.json") as file:
            file.write((json.dumps(self.config | {"provenance": self.provenance}, indent=2) + "\n").encode())

    def start_wandb(self) -> None:
        import wandb

        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False, verify=False):
            raise ValueError("no login; run `wandb login`, or set WANDB_API_KEY or WANDB_MODE=offline")
        algorithm, name = self.config["algorithm"], self.folder.name
        labels = {"group": self.task, "job_type": algorithm, "tags": [self.task, algorithm]}
        project = {"project": self.args.wandb_project_name, "entity": self.args.wandb_entity, "config": self.config}
        own = {"id": name, "name": name, "resume": "allow" if self.args.resume else "never"}
        self.wandb = wandb.init(**project, **own, **labels, save_code=True, reinit="create_new")
        self.wandb.define_metric("global_step")
        self.wandb.define_metric("*", step_metric="global_step")
        if self.was_tracked:  # what was logged until the kill, or until one before it, is not sent again
            with suppress(OSError, ValueError):  # nothing was
                whole_rows = (self.folder / "scalars.csv").read_bytes().rpartition(b"\n")[0]
                self.tracked_step = max(self.tracked_step, int(whole_rows.rpartition(b"\n")[2].partition(b",")[0]))
        self.tracked_clips = set(self.folder.glob("videos/*/*.mp4"))

    def send(self, step: int, scalars: dict) -> None:
        """Sends scalars to W&B, with the clips that were recorded since."""
        import wandb

        media = {}
        if self.args.capture_video:
            for clip in sorted(set(self.folder.glob("videos/*/*.mp4")) - self.tracked_clips):
                media.setdefault(f"videos/{clip.parent.name}", []).append(wandb.Video(str(clip), format="mp4"))
                self.tracked_clips.add(clip)
        self.wandb.log({"global_step": step, **scalars}, step=step)
        if media:
            with self.warning("clips for W&B"):
                self.wandb.log({"global_step": step, **media}, step=step)

    def stop(self, number: int, _) -> None:
        """A signal's handler: the run saves itself at the end of the episode. A second signal has its usual effect."""
        self.stopped_by = number
        if number == signal.SIGHUP:  # the terminal is gone, which may be said more than once
            self.handlers[number] = signal.SIG_IGN
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        for each, handler in self.handlers.items():
            signal.signal(each, handler)
        say("stopping at the end of this episode; once more to stop now", sys.stderr)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, place) -> None:
        torch.set_flush_denormal(False)
        if self.csv is not None and isinstance(error, Exception):
            last = f"the last checkpoint is of step {self.saved_step}"
            error.add_note(f"at step {self.step}; {last if self.saved_step else 'there is no checkpoint yet'}")
        self.close()
        if self.wandb is not None:
            with self.warning("W&B"):
                self.wandb.finish(exit_code=0 if error is None else 1)
        if self.stopped_by is not None and getattr(kind, "__module__", "").startswith("torch."):
            self.end_stopped()  # a terminal's Ctrl-C ends the C++ compiler too

    def close(self) -> None:
        """Gives back the signals and the folder: a notebook keeps an exception, and with it this run."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.tensorboard("close")
        if self.csv is not None:
            with self.warning("scalars.csv"):
                self.flush()
            self.csv.close()
        if self.lock is not None:
            self.lock.close()

    def steps(self):
        """The environment steps that are left, with a bar on a terminal, and evaluations between them."""
        total, interval = self.args.total_timesteps, self.args.eval_interval
        hidden = None if sys.stderr else True  # None: where it is no terminal
        self.bar = tqdm(total=total, initial=self.step, unit="step", dynamic_ncols=True, disable=hidden)
        for step in range(self.step, total):
            self.step = step
            if interval is not None and step > 0 and step % interval == 0:
                self.evaluate(replace(self.args, capture_video=False))
            yield step
            self.bar.update()
        self.bar.close()

    def evaluate(self, args: Args) -> np.ndarray:
        """Plays and logs the deterministic policy; with --eval-interval the stochastic one too, and the best actor so
        far is kept. Returns the deterministic returns."""
        began, actor = time.perf_counter(), self.parts["actor"]
        returns = evaluate(actor, args, self.folder / "videos" / "eval")
        log = {"eval/episodic_return": returns.mean()}
        if args.eval_interval is not None:
            plain = replace(args, capture_video=False)
            log["eval/stochastic_return"] = evaluate(actor, plain, self.folder, deterministic=False).mean()
            if returns.mean() > self.best_return:
                best = {"args": self.config, "step": self.step, "episodic_return": float(returns.mean())}
                with self.warning("best_actor.pt"):
                    save({**best, "actor": actor.state_dict()}, self.folder / "best_actor.pt")
                    self.best_return = best["episodic_return"]
        self.log(self.step, log)
        if self.first_update is not None:  # so that charts/SPS leaves it out
            self.first_update = self.first_update[0], self.first_update[1] + time.perf_counter() - began
        return returns

    @contextmanager
    def warning(self, what: str):
        """Says in a line that a full disk, or W&B's process, did not take something, and the run goes on."""
        try:
            yield
        except OSError as error:
            say(f"step {self.step}: {self.folder}: {what}: not written: {error}", sys.stderr)

    def tensorboard(self, method: str, *values) -> None:
        """Calls a method of TensorBoard's writer, but not again once it failed: a full disk has ended its thread."""
        writer, self.writer = self.writer, None
        if writer is not None:
            with self.warning("TensorBoard's file, which ends here"):
                getattr(writer, method)(*values)
                self.writer = writer

    def log(self, step: int, scalars: dict) -> None:
        """Logs {tag: value} to TensorBoard, as rows of scalars.csv and, with --track, to W&B."""
        scalars = {tag: float(value) for tag, value in scalars.items()}
        for tag, value in scalars.items():
            self.tensorboard("add_scalar", tag, value, step)
            self.pending += f"{step},{tag},{value:.9g}\n".encode()
        if self.wandb is not None or time.monotonic() > self.next_flush:
            with self.warning("scalars.csv"):
                self.flush()
        if self.wandb is not None and step > self.tracked_step:  # which the next process takes from scalars.csv
            with self.warning("W&B, to which no more is sent"):
                self.send(step, scalars)
                return
            self.wandb = None  # that was refused

    def flush(self) -> None:
        """Writes the rows of scalars.csv. Raises OSError on a full disk: what it refused is kept for the next time."""
        self.next_flush = time.monotonic() + 1
        while self.pending:
            self.pending = self.pending[self.csv.write(self.pending) :]

    def log_episode(self, rewards: list[float], start_value: float | None) -> None:
        """Logs an episode that ended; start_value is the critic's of its first state, if it began after the warm-up."""
        scalars = {"charts/episodic_return": sum(rewards), "charts/episodic_length": len(rewards)}
        if start_value is not None:
            discounted_return = sum(self.args.gamma**t * reward for t, reward in enumerate(rewards))
            scalars["charts/q_minus_return"] = start_value - discounted_return
        self.returns.append(sum(rewards))
        self.log(self.step, scalars)

    def check(self, log: dict) -> None:
        """Raises NotFinite if a loss is not finite, and ends the update."""
        for tag in ("losses/qf_loss", "losses/actor_loss"):
            if not math.isfinite(log.get(tag, 0)):
                raise NotFinite(f"{tag} is {float(log[tag])}")
        if self.first_update is None and "losses/actor_loss" in log:  # all is compiled by then
            self.first_update = self.step, time.perf_counter()
        torch.compiler.cudagraph_mark_step_begin()  # from here on the next update may overwrite what this one returned

    def log_update(self, log: dict) -> None:
        """Logs an update and shows where the run is."""
        now, (first_step, first_time) = time.perf_counter(), self.first_update
        log["charts/SPS"] = (self.step - first_step) / max(now - first_time, 1e-6)
        self.log(self.step, log | {"charts/hours": self.hours_taken()})
        status = f"return {np.mean(self.returns):.2f}" if self.returns else "no episode yet"
        self.bar.set_postfix_str(status)
        if self.bar.disable and self.step // self.args.log_interval % 10 == 0:
            left = (self.args.total_timesteps - self.step) / max(log["charts/SPS"], 1)
            say(f"step {self.step}: {status}, {log['charts/SPS']:.0f} steps/s, {left:.0f} s left")

    def hours_taken(self) -> float:
        """Hours of the run so far, without its pauses."""
        return self.hours + (time.perf_counter() - self.began) / 3600

    def wants_checkpoint(self) -> bool:
        return self.stopped_by is not None or self.step + 1 >= self.next_checkpoint

    def save(self) -> None:
        """Writes a checkpoint, or says why not: the one before is still there. If a signal asked the run to stop, this
        ends it with KeyboardInterrupt. Raises NotFinite if a weight is not finite."""
        self.next_checkpoint = self.step + 1 + self.args.checkpoint_interval
        state = {
            "args": self.config,
            "step": self.step + 1,
            "hours": self.hours_taken(),
            "best_return": self.best_return,
            "added": self.buffer.added,
            "columns": [torch.from_numpy(column[: self.buffer.added]) for column in self.buffer.columns],
            "log_alpha": self.log_alpha,
            "rng": self.rng.bit_generator.state,
            "torch_rng": torch.get_rng_state(),
            **{name: part.state_dict() for name, part in self.parts.items()},
        }
        require_finite(state)
        self.tensorboard("flush")
        with self.warning("checkpoint.pt"):
            self.flush()
            os.fsync(self.csv.fileno())
            save(state | {"csv_size": self.csv.tell()}, self.folder / "checkpoint.pt")
            self.saved_step = self.step + 1
        if self.stopped_by is not None:
            self.end_stopped()

    def end_stopped(self) -> None:
        """Ends a run that a signal stopped, by KeyboardInterrupt."""
        say(f"{self.folder}: stopped; the same command with --resume goes on from step {self.saved_step}")
        raise KeyboardInterrupt(self.stopped_by)

    def finish(self, **networks: nn.Module) -> None:
        """Evaluates the policy, and puts the networks in the checkpoint's place."""
        self.step = self.args.total_timesteps
        states = {name: network.state_dict() for name, network in networks.items()}
        require_finite(states)
        returns = self.evaluate(self.args)
        say(f"{self.folder}: deterministic return {summary(returns)}")
        try:
            self.flush()
            os.fsync(self.csv.fileno())
            save({"args": self.config, **states}, self.folder / "actor.pt")
        except OSError as error:
            words = "with --resume the same command goes on from the last checkpoint"
            raise NotSaved(f"{self.folder}: actor.pt: not written: {error} ({words})") from error
        self.provenance["hours"] = self.hours_taken()
        with self.warning("the hours in args.json"):
            self.write_args()
        (self.folder / "checkpoint.pt").unlink(missing_ok=True)


def provenance(device: torch.device) -> dict:
    """What a run's numbers depend on beside its flags: the revision of the folder that the script is in ("-dirty" if it
    was edited since), versions, processor, threads, device."""
    found = {"revision": None, "python": platform.python_version(), "threads": torch.get_num_threads()}
    found["processor"] = platform.processor()
    found["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    with suppress(OSError):  # there may be no git
        describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        run = subprocess.run(describe, cwd=Path(__file__).resolve().parent, capture_output=True, text=True, check=False)
        found["revision"] = run.stdout.strip() or None
    for name in ("torch", "gymnasium", "mujoco", "minatar", "numpy"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    with suppress(OSError, IndexError):  # not Linux, or no PC
        found["processor"] = Path("/proc/cpuinfo").read_text().split("model name\t: ")[1].split("\n")[0]
    return found


class Filmed(gym.wrappers.RecordVideo):
    """Clips, of which one that cannot be written is given up."""

    def stop_recording(self):
        try:
            super().stop_recording()
        except Exception as error:  # of a full disk, or of frames that differ in size
            say(f"{self.video_folder}: a clip is not written: {error!s:.150}", sys.stderr)
            Path(self.video_folder, f"{self._video_name}.mp4").unlink(missing_ok=True)
            self.recorded_frames, self.recording = [], False


def film(env: gym.Env, args: Args, folder: Path, prefix: str = "clip") -> gym.Env:
    """With --capture-video, the environment with clips of its episodes 0, 1, 8, 27, ... in the folder."""
    if not args.capture_video:
        return env
    try:
        return Filmed(env, str(folder), name_prefix=prefix, video_length=299, gc_trigger=None)  # takes one frame more
    except OSError as error:
        say(f"{folder}: no clip is written: {error!s:.150}", sys.stderr)
        return env


def evaluate(actor: nn.Module, args: Args, video: Path, deterministic: bool = True) -> np.ndarray:
    """Returns of `args.eval_episodes` episodes of the best action, or of sampled ones. It draws from a generator of its
    own: an evaluation changes nothing in a run."""
    env = film(make_env(args, args.capture_video), args, video)
    rng, returns = np.random.default_rng([args.seed, 1]), np.zeros(args.eval_episodes)
    seeds = rng.integers(2**31, size=args.eval_episodes)  # the same ones, whatever the policy draws
    for episode, seed in enumerate(seeds):
        (obs, _), done = env.reset(seed=int(seed)), False
        while not done:
            obs, reward, terminated, truncated, _ = env.step(act(actor, obs, None if deterministic else rng))
            returns[episode] += reward
            done = terminated or truncated
    env.close()
    return returns


def summary(returns: np.ndarray) -> str:
    """Their mean and half the width of its 95% normal interval, which one episode does not have."""
    if len(returns) == 1:
        return f"{returns[0]:.2f} in one episode"
    margin = 1.96 * returns.std(ddof=1) / math.sqrt(len(returns))
    return f"{returns.mean():.2f} +- {margin:.2f} over {len(returns)} episodes"


def load_actor(flag: str, saved: str, args: Args, env: gym.Env) -> nn.Module:
    """The actor of a run's folder or file. Raises UsageError if it is damaged, of other shapes, or not finite. The
    bounds of a Box are not in the file: the actor's actions are scaled to those of `env`."""
    valid = f"an earlier run's folder or actor.pt, for {env.observation_space} and {env.action_space}, and finite"
    with refusing(f"--{flag} {saved}: must be {valid}"):
        state, (actor, _) = load(Path(saved)), make_networks(args, env)
        require(state is not None, "nothing is saved there")
        require(flag != "reference" or "columns" not in state, "the run is not finished")
        actor.load_state_dict(state["actor"])
        require(all(weights.isfinite().all() for weights in actor.parameters()), "it is not")
    return actor


def evaluate_run(args: Args) -> None:
    """Prints the returns of a saved policy, deterministic and stochastic, and writes evaluation.json beside it."""
    saved = Path(args.evaluate)
    state = load(saved)
    require(state is not None, f"--evaluate {saved}: must be the folder of a run that has saved itself, or such a file")
    kept = ("seed", "eval_episodes", "capture_video", "evaluate")
    of_run = {name: value for name, value in state["args"].items() if name in asdict(args) and name not in kept}
    of_run = {"env_kwargs": ()} | {k: tuple(v) if isinstance(v, list) else v for k, v in of_run.items()}
    for name, value in asdict(args).items():
        valid = name in kept or value in (getattr(Args, name), of_run.get(name))
        words = f"not with --evaluate, which plays the run as it was trained, with {of_run.get(name)}"
        require(valid, f"--{name.replace('_', '-')} {value}: {words}")
    check_flags(args)
    args = replace(args, **of_run)
    env = make_env(args)
    actor = load_actor("evaluate", args.evaluate, args, env)
    env.close()
    folder = saved if saved.is_dir() else saved.parent
    found = {"actor": saved.resolve().name, "step": state.get("step"), "seed": args.seed}
    for name in ("deterministic", "stochastic"):
        returns = evaluate(actor, args, folder / "videos" / f"evaluate-{name}", name == "deterministic")
        found[f"{name}_returns"] = returns.tolist()
        say(f"{saved}: {name} return {summary(returns)}")
    with refusing(f"--evaluate {saved}: evaluation.json is not written"):
        (folder / "evaluation.json").write_text(json.dumps(found, indent=2) + "\n")


GROUPS = {  # of --help; a flag that is in none of them is the algorithm's
    "environment": {"env_id", "env_kwargs", "capture_video"},
    "experiment": {"total_timesteps", "seed", "exp_name", "run_name", "resume", "checkpoint_interval"},
    "computation": {"compile", "cuda"},
    "evaluation": {"evaluate", "eval_episodes", "eval_interval"},
    "algorithm": set(),
    "logging": {"log_interval", "track", "wandb_project_name", "wandb_entity"},
}


def show_help() -> None:
    """Prints --help and exits. tyro draws a box for each nested class: each group is a copy of Args without the others'
    flags."""
    boxes, known = [], set().union(*GROUPS.values())
    for group, flags in GROUPS.items():
        changed = []
        for flag in fields(Args):
            shown = tyro.conf.arg(help_behavior_hint="" if flag.default in (None, ()) else None)  # its text says what
            how = shown if flag.name in (flags or {flag.name} - known) else tyro.conf.Suppress
            changed.append((flag.name, Annotated[Args.__annotations__[flag.name], how], flag))
        box = make_dataclass(group, changed, bases=(Args,))
        boxes.append((group, box, field(default_factory=box)))
    first_line = __doc__.partition("\n")[0]
    tyro.cli(make_dataclass("Help", boxes), description=first_line, config=(tyro.conf.OmitArgPrefixes,))


def main() -> None:
    if {"-h", "--help"} & set(sys.argv):
        show_help()
    args = tyro.cli(Args)
    try:
        if args.evaluate is None:
            train(args)
        else:
            evaluate_run(args)
    except (UsageError, NotFinite, NotSaved) as error:
        words = " ".join([f"{Path(__file__).name}: {error}", *getattr(error, "__notes__", [])])
        say(" ".join(words.split()), sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt as stopped:
        sys.exit(128 + (stopped.args[0] if stopped.args else signal.SIGINT))


if __name__ == "__main__":
    main()
