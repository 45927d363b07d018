"""KLAC (Kullback-Leibler Actor-Critic) for discrete actions, in one file.

SAC pays its critic for the policy's entropy, which can make staying random and alive worth more than the task's reward.
KLAC keeps that regulariser in the actor alone. Equation and line numbers are the paper's:

    critic        y = r + beta + gamma (1 - terminated) E_{a' ~ pi}[min_i Q_i'(s', a')]          Eq. 12, line 10
    actor         E_{a ~ pi}[alpha (log pi - log q) - min_i Q_i]                                 Eq. 13, line 13
    temperature   alpha (H - H*), which holds KL(pi || q) = log n - H at log n - H*              Eq. 10, line 22
    schedule      H*(p), with p, the probability of the best action, annealed linearly           section 5.4, line 17

`--no-bias` sets beta to 0 (KLAC-b), `--no-anneal` holds H* at SAC's 0.89 log n (KLAC-a), both together are KLAC-ab.
The README explains the flags and the metrics; docs/algorithms.md lists where the paper is silent or misprinted.
"""

import difflib
import json
import math
import os
import random
import re
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import minatar.gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__).removesuffix(".py")
    """name of this experiment, part of the run's name"""
    run_name: str | None = None
    """folder of this run under runs/ (default: {env_id}__{exp_name}__{seed}__{timestamp})"""
    seed: int = 1
    """seed of the weights, the actions, the replay samples and every episode"""
    torch_deterministic: bool = True
    """use deterministic CUDA kernels only (the CPU is always deterministic)"""
    cuda: bool = True
    """use a GPU where there is one"""
    track: bool = False
    """send the run to Weights & Biases as well (WANDB_MODE=offline needs no login)"""
    wandb_project_name: str = "klac"
    """W&B project"""
    wandb_entity: str | None = None
    """W&B team or user"""
    capture_video: bool = False
    """record videos of training and evaluation episodes into the run's folder"""
    log_interval: int = 1_000
    """steps between two logged values of the losses and of the policy (episodes are logged as they end)"""
    eval_episodes: int = 10
    """episodes of the deterministic policy (argmax) played after training"""

    env_id: str = "Breakout-v1"
    """a MinAtar game (Breakout-v1, Asterix-v1, ...) or any Gymnasium id with discrete actions and image or flat observations"""
    total_timesteps: int = 3_000_000
    """environment steps of the run"""
    buffer_size: int = 100_000
    """capacity of the replay buffer, in transitions"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 1.0
    """weight of the new parameters in a target network's update (1: copy)"""
    batch_size: int = 64
    """transitions in a batch"""
    learning_starts: int = 20_000
    """warm-up steps with uniformly random actions, before any update"""
    policy_lr: float = 3e-4
    """learning rate of the actor"""
    q_lr: float = 3e-4
    """learning rate of the critics and of the temperature"""
    update_frequency: int = 4
    """environment steps per update of critics, actor and temperature"""
    target_network_frequency: int = 8_000
    """environment steps per update of the target networks"""
    alpha: float = 0.2
    """temperature with --no-autotune (otherwise alpha starts at 1 and is learned)"""
    autotune: bool = True
    """learn the temperature, so that the policy's entropy meets its target"""
    bias: bool = True
    """add beta to the reward in the critic's target"""
    beta: float = 0.01
    """the uniform reward bias"""
    anneal: bool = True
    """anneal the target from p_start to p_end (--no-anneal: SAC's target entropy of 0.89 log n)"""
    p_start: float = 0.5
    """target probability of the best action at step 0, in [1/n, 1)"""
    p_end: float = 0.8
    """target probability of the best action at the end of the annealing, in [1/n, 1)"""
    anneal_timesteps: int | None = None
    """steps over which p moves from p_start to p_end (default: total_timesteps)"""
    reference: str | None = None
    """reference policy q: the actor.pt of an earlier run on the same spaces (default: uniform)"""


class UsageError(Exception):
    """A flag whose value cannot work; the message names the flag, the value and what would be valid."""


class MinAtarFixes(gym.Wrapper):
    """Makes a MinAtar game's episodes independent of each other, and its frames fit for a video."""

    def __init__(self, env):
        super().__init__(env)
        self.metadata = {**env.metadata, "render_fps": 15}

    def reset(self, **kwargs):
        self.unwrapped.game.last_action = 0  # a sticky first action would repeat the previous episode's last one
        return super().reset(**kwargs)

    def render(self):
        frame = np.asarray(super().render() * 255, dtype=np.uint8)
        return frame.repeat(32, axis=0).repeat(32, axis=1)


def make_env(env_id: str, render: bool = False) -> gym.Env:
    """One plain environment. `Seaquest-v1` stands for `MinAtar/Seaquest-v1`. Raises UsageError if it cannot be made."""
    if "MinAtar/Breakout-v1" not in gym.registry:
        minatar.gym.register_envs()
    full_id = f"MinAtar/{env_id}" if f"MinAtar/{env_id}" in gym.registry else env_id
    try:
        env = gym.make(full_id, render_mode="rgb_array" if render else None, disable_env_checker=True)
    except (gym.error.Error, ImportError) as error:
        known = [
            *gym.registry,
            *(name.removeprefix("MinAtar/") for name in gym.registry if name.startswith("MinAtar/")),
        ]
        nearest = ", ".join(difflib.get_close_matches(env_id, known, n=3, cutoff=0.3)) or "Breakout-v1, CartPole-v1"
        raise UsageError(f"--env-id {env_id}: {' '.join(str(error).split())} Nearest ids: {nearest}") from error
    return MinAtarFixes(env) if full_id.startswith("MinAtar/") else env


def record_video(env: gym.Env, folder: Path, name: str) -> gym.Env:
    """Records 1,000 frames from the start of episodes 0, 1, 8, 27, ..., 1000, 2000, ... into `folder`."""
    return gym.wrappers.RecordVideo(env, str(folder), name_prefix=name, video_length=1_000, gc_trigger=None)


def check_args(args: Args, env: gym.Env) -> None:
    """Raises UsageError on the first flag that cannot work, before anything is written."""
    space, n = env.observation_space, getattr(env.action_space, "n", 0)
    if isinstance(env.action_space, gym.spaces.Box):
        raise UsageError(f"--env-id {args.env_id}: has continuous actions; klac_continuous.py is the script for those")
    if not isinstance(env.action_space, gym.spaces.Discrete) or n < 2 or env.action_space.start != 0:
        raise UsageError(f"--env-id {args.env_id}: actions must be Discrete(n) with n > 1, not {env.action_space}")
    is_image = isinstance(space, gym.spaces.Box) and len(space.shape) == 3 and min(space.shape[:2]) >= 3
    if not is_image and not (isinstance(space, gym.spaces.Box) and len(space.shape) == 1):
        raise UsageError(
            f"--env-id {args.env_id}: observations must be images (a Box of H x W x channels, at least 3 x 3) "
            f"or flat (a Box of one dimension), not {space}"
        )
    counts = ("total_timesteps", "buffer_size", "batch_size", "update_frequency", "target_network_frequency")
    counts += ("log_interval", "eval_episodes", "anneal_timesteps")
    rules = [(name, (value := getattr(args, name)) is None or value > 0, "positive") for name in counts]
    rules += [(name, 0 < getattr(args, name) < math.inf, "positive and finite") for name in ("policy_lr", "q_lr")]
    rules += [
        ("seed", 0 <= args.seed < 2**32, "in [0, 2**32)"),
        ("gamma", 0 <= args.gamma < 1, "in [0, 1)"),
        ("tau", 0 < args.tau <= 1, "in (0, 1]"),
        ("alpha", 0 <= args.alpha < math.inf, "non-negative and finite"),
        ("batch_size", args.batch_size <= args.buffer_size, f"at most --buffer-size {args.buffer_size}"),
        (
            "learning_starts",
            0 <= args.learning_starts < args.total_timesteps,
            f"at least 0 and below --total-timesteps {args.total_timesteps}",
        ),
        ("beta", math.isfinite(args.beta), "finite"),
        ("p_start", not args.anneal or 1 / n <= args.p_start < 1, f"in [1/{n}, 1): this task has {n} actions"),
        ("p_end", not args.anneal or 1 / n <= args.p_end < 1, f"in [1/{n}, 1): this task has {n} actions"),
    ]
    for name, valid, expected in rules:
        if not valid:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be {expected}")


def to_tensor(obs: np.ndarray, device: torch.device) -> torch.Tensor:
    """A batch of observations as the networks take it: float32, images (B, H, W, C) as (B, C, H, W), bytes in [0, 1]."""
    x = torch.as_tensor(obs, device=device)
    x = x.permute(0, 3, 1, 2) if x.ndim == 4 else x
    x = x.to(torch.float32, memory_format=torch.contiguous_format)
    return x / 255 if obs.dtype == np.uint8 else x


def make_network(obs_shape: tuple[int, ...], n: int) -> nn.Sequential:
    """Maps (B, *obs) to (B, n): the logits of the actor, or a critic's value of each action."""
    if len(obs_shape) == 3:
        height, width, channels = obs_shape
        encoder = [nn.Conv2d(channels, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * (height - 2) * (width - 2), 128)]
    else:
        encoder = [nn.Linear(obs_shape[0], 128), nn.ReLU(), nn.Linear(128, 128)]
    network = nn.Sequential(*encoder, nn.ReLU(), nn.Linear(128, n))
    for layer in network:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return network


class Batch(NamedTuple):
    obs: torch.Tensor  # (B, *obs) float32
    actions: torch.Tensor  # (B,) int64
    rewards: torch.Tensor  # (B,) float32
    next_obs: torch.Tensor  # (B, *obs) float32
    terminations: torch.Tensor  # (B,) float32: 1 where the episode truly ended, 0 at a time limit


class ReplayBuffer:
    """The last `capacity` transitions, observations in the environment's own dtype (float64 as float32)."""

    def __init__(self, capacity: int, obs_space: gym.spaces.Box, device: torch.device):
        dtype = np.float32 if obs_space.dtype == np.float64 else obs_space.dtype
        self.obs = np.zeros((capacity, *obs_space.shape), dtype)
        self.next_obs = np.zeros((capacity, *obs_space.shape), dtype)
        self.actions = np.zeros(capacity, np.int64)
        self.rewards = np.zeros(capacity, np.float32)
        self.terminations = np.zeros(capacity, np.float32)
        self.capacity, self.device, self.added = capacity, device, 0

    def add(self, obs, action, reward, next_obs, terminated) -> None:
        i = self.added % self.capacity
        self.obs[i], self.next_obs[i] = obs, next_obs
        self.actions[i], self.rewards[i], self.terminations[i] = action, reward, terminated
        self.added += 1

    def sample(self, batch_size: int, rng: np.random.Generator) -> Batch:
        """`batch_size` transitions drawn uniformly with replacement."""
        i = rng.integers(min(self.added, self.capacity), size=batch_size)
        return Batch(
            to_tensor(self.obs[i], self.device),
            torch.as_tensor(self.actions[i], device=self.device),
            torch.as_tensor(self.rewards[i], device=self.device),
            to_tensor(self.next_obs[i], self.device),
            torch.as_tensor(self.terminations[i], device=self.device),
        )


def exploit_probability(step: int, p_start: float, p_end: float, anneal_timesteps: int) -> float:
    """p_t: linear from p_start to p_end over `anneal_timesteps` steps, then constant (line 15, with its lost factor t)."""
    return p_start + (p_end - p_start) * min(1.0, step / anneal_timesteps)


def exploit_entropy(p: float, n: int) -> float:
    """H*(p, n) in nats: the entropy of p on one action and (1 - p) / (n - 1) on each other; 1/n <= p < 1 (line 17)."""
    return -p * math.log(p) - (1 - p) * math.log((1 - p) / (n - 1))


def make_log_q(args: Args, obs_shape: tuple[int, ...], n: int, device: torch.device):
    """The reference policy: a function from observations (B, *obs) to log(n q(a|s)), (B, n) or broadcastable to it.

    Taken relative to the uniform policy, whose value is 0, so that with a uniform q everything below is SAC's to the bit.
    Replace this function to use another reference. Raises UsageError if `args.reference` is no actor for these spaces.
    """
    if args.reference is None:
        return lambda obs: 0.0
    network = make_network(obs_shape, n).to(device)
    load_actor(args.reference, network)
    return lambda obs: F.log_softmax(network(obs), dim=1) + math.log(n)


def td_target(batch: Batch, actor, qf1_target, qf2_target, gamma: float, beta: float) -> torch.Tensor:
    """y = r + beta + gamma (1 - terminated) E_{a' ~ pi}[min_i Q_i'(s', a')], (B,): no entropy (line 10)."""
    log_pi = F.log_softmax(actor(batch.next_obs), dim=1)  # (B, n)
    min_q = torch.minimum(qf1_target(batch.next_obs), qf2_target(batch.next_obs))  # (B, n)
    next_v = (log_pi.exp() * min_q).sum(1)  # (B,)
    return batch.rewards + beta + gamma * (1 - batch.terminations) * next_v


def actor_loss(log_pi: torch.Tensor, log_q: torch.Tensor, min_q: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """alpha KL(pi || q exp(Q / alpha) / Z) up to log Z: E_{a ~ pi}[alpha (log pi - log q) - min_i Q_i] (Eq. 13)."""
    return (log_pi.exp() * (alpha * (log_pi - log_q) - min_q)).sum(1).mean()


def temperature_loss(log_alpha: torch.Tensor, entropy: torch.Tensor, target_entropy: float) -> torch.Tensor:
    """alpha (H - H*): alpha falls while the policy is more random than its target (line 22, with the sign mended)."""
    return log_alpha.exp() * (entropy - target_entropy).detach()


def save_actor(path: Path, actor: nn.Module, args: Args) -> None:
    torch.save({"args": asdict(args), "actor": actor.state_dict()}, path)


def load_actor(path: str, actor: nn.Module) -> None:
    """Loads what save_actor wrote into `actor`, or raises UsageError."""
    try:
        actor.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["actor"])
    except FileNotFoundError as error:
        raise UsageError(f"--reference {path}: no such file; give the actor.pt of an earlier run") from error
    except RuntimeError as error:
        if "state_dict" not in str(error):
            raise UsageError(f"--reference {path}: not an actor.pt of an earlier run") from error
        raise UsageError(
            f"--reference {path}: an actor of another shape; observations and actions must match"
        ) from error
    except Exception as error:
        raise UsageError(f"--reference {path}: not an actor.pt of an earlier run") from error


def start_logging(args: Args, algorithm: str) -> tuple[Path, SummaryWriter]:
    """Makes the run's folder, writes args.json, and opens TensorBoard and, with --track, W&B."""
    name, stamp = re.split("[/:]", args.env_id)[-1], int(time.time())
    if args.track:
        import wandb

        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False, verify=False):
            raise UsageError(
                "--track: not logged in to W&B; run `wandb login`, or set WANDB_API_KEY or WANDB_MODE=offline"
            )
    while True:
        run_dir = Path("runs", args.run_name or f"{name}__{args.exp_name}__{args.seed}__{stamp}")
        try:
            run_dir.mkdir(parents=True)
            (run_dir / "args.json").write_text(json.dumps({"algorithm": algorithm, **asdict(args)}, indent=2) + "\n")
            break
        except FileExistsError as error:
            if args.run_name or not run_dir.is_dir():
                raise UsageError(f"--run-name {run_dir.name}: {run_dir} exists already; choose another name") from error
            stamp += 1  # another run started in the same second
        except OSError as error:
            raise UsageError(
                f"cannot write to {run_dir}: {error.strerror}; run from a folder that you may write to"
            ) from error
    if args.track:
        wandb.init(
            project=args.wandb_project_name,
            entity=args.wandb_entity,
            name=run_dir.name,
            group=name,
            job_type=algorithm,
            tags=[name, algorithm],
            config={"algorithm": algorithm, **asdict(args)},
            dir=run_dir,
            sync_tensorboard=True,
            save_code=True,
        )
    writer = SummaryWriter(run_dir)
    writer.add_text(
        "hyperparameters", "|param|value|\n|-|-|\n" + "\n".join(f"|{k}|{v}|" for k, v in asdict(args).items())
    )
    return run_dir, writer


@torch.inference_mode()
def evaluate(actor: nn.Module, args: Args, device: torch.device, run_dir: Path) -> np.ndarray:
    """Returns of `args.eval_episodes` episodes of the most probable action, each cut at 10,000 steps."""
    env = make_env(args.env_id, args.capture_video)
    env = record_video(env, run_dir / "videos", "eval") if args.capture_video else env
    rng = np.random.default_rng([args.seed, 1])  # not the run's own generator: an evaluation changes nothing in a run
    returns = np.zeros(args.eval_episodes)
    for episode in range(args.eval_episodes):
        obs, _ = env.reset(seed=int(rng.integers(2**31)))
        for _ in range(10_000):
            action = actor(to_tensor(obs[None], device)).argmax().item()
            obs, reward, terminated, truncated, _ = env.step(action)
            returns[episode] += reward
            if terminated or truncated:
                break
    env.close()
    return returns


def train(args: Args) -> Path:
    """Trains one run and returns its folder. Raises UsageError, with nothing written, if a flag cannot work."""
    rng = np.random.default_rng(args.seed)
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")

    env = make_env(args.env_id, args.capture_video)
    check_args(args, env)
    obs_shape, n = env.observation_space.shape, int(env.action_space.n)
    algorithm = "KLAC" + "-" * (not args.anneal or not args.bias) + "a" * (not args.anneal) + "b" * (not args.bias)

    actor = make_network(obs_shape, n).to(device)
    qf1, qf2 = make_network(obs_shape, n).to(device), make_network(obs_shape, n).to(device)
    qf1_target, qf2_target = make_network(obs_shape, n).to(device), make_network(obs_shape, n).to(device)
    qf1_target.load_state_dict(qf1.state_dict())
    qf2_target.load_state_dict(qf2.state_dict())
    log_q = make_log_q(args, obs_shape, n, device)

    actor_optimizer = torch.optim.Adam(actor.parameters(), lr=args.policy_lr, eps=1e-4, fused=True)
    q_optimizer = torch.optim.Adam([*qf1.parameters(), *qf2.parameters()], lr=args.q_lr, eps=1e-4, fused=True)
    log_alpha = torch.zeros((), requires_grad=True, device=device)
    alpha_optimizer = torch.optim.Adam([log_alpha], lr=args.q_lr, eps=1e-4, fused=True)
    target_entropy = 0.89 * math.log(n)  # SAC's heuristic, in nats
    anneal_timesteps = args.anneal_timesteps or args.total_timesteps
    alpha = log_alpha.detach().exp() if args.autotune else torch.tensor(args.alpha, device=device)
    buffer = ReplayBuffer(args.buffer_size, env.observation_space, device)

    run_dir, writer = start_logging(args, algorithm)
    if args.capture_video:
        env = record_video(env, run_dir / "videos", "train")

    obs, _ = env.reset(seed=int(rng.integers(2**31)))
    episode_return, episode_length, discounted_return, start_value = 0.0, 0, 0.0, None
    recent_returns, start_time = deque(maxlen=20), time.time()
    print_interval = max(1_000, args.total_timesteps // 100)
    steps = tqdm(range(args.total_timesteps), unit="step", dynamic_ncols=True, disable=None)
    for global_step in steps:
        # Act: at random during the warm-up, then from the policy
        if global_step < args.learning_starts:
            action = int(rng.integers(n))
        else:
            with torch.inference_mode():
                x = to_tensor(obs[None], device)
                pi = F.softmax(actor(x), dim=1)  # (1, n)
                action = torch.multinomial(pi, 1).item()
                if episode_length == 0:
                    start_value = (pi * torch.minimum(qf1(x), qf2(x))).sum().item()

        # Step and store: next_obs is the episode's own last observation, whatever ended it
        next_obs, reward, terminated, truncated, _ = env.step(action)
        buffer.add(obs, action, reward, next_obs, terminated)
        obs = next_obs
        discounted_return += args.gamma**episode_length * float(reward)
        episode_return += float(reward)
        episode_length += 1

        if terminated or truncated:
            writer.add_scalar("charts/episodic_return", episode_return, global_step)
            writer.add_scalar("charts/episodic_length", episode_length, global_step)
            if start_value is not None:
                writer.add_scalar("charts/q_minus_return", start_value - discounted_return, global_step)
            recent_returns.append(episode_return)
            obs, _ = env.reset(seed=int(rng.integers(2**31)))
            episode_return, episode_length, discounted_return, start_value = 0.0, 0, 0.0, None

        if global_step > args.learning_starts and global_step % args.update_frequency == 0:
            batch = buffer.sample(args.batch_size, rng)

            # Critics: regress both on the target (Eq. 12)
            with torch.no_grad():
                y = td_target(batch, actor, qf1_target, qf2_target, args.gamma, args.beta if args.bias else 0.0)
            q1 = qf1(batch.obs).gather(1, batch.actions[:, None]).squeeze(1)  # (B,)
            q2 = qf2(batch.obs).gather(1, batch.actions[:, None]).squeeze(1)  # (B,)
            qf1_loss, qf2_loss = F.mse_loss(q1, y), F.mse_loss(q2, y)
            q_optimizer.zero_grad()
            (qf1_loss + qf2_loss).backward()
            q_optimizer.step()

            # Actor: towards q exp(Q / alpha) / Z (Eq. 13)
            with torch.no_grad():
                min_q = torch.minimum(qf1(batch.obs), qf2(batch.obs))  # (B, n)
                log_q_batch = log_q(batch.obs)
            log_pi = F.log_softmax(actor(batch.obs), dim=1)  # (B, n)
            pi_loss = actor_loss(log_pi, log_q_batch, min_q, alpha)
            actor_optimizer.zero_grad()
            pi_loss.backward()
            actor_optimizer.step()

            # Temperature: hold KL(pi || q) at its target, which is log n - H* (Eq. 10)
            if args.anneal:
                p = exploit_probability(global_step, args.p_start, args.p_end, anneal_timesteps)
                target_entropy = exploit_entropy(p, n)
            log_pi = log_pi.detach()
            pi = log_pi.exp()
            relative_entropy = -(pi * (log_pi - log_q_batch)).sum(1).mean()  # log n - KL(pi || q): H if q is uniform
            if args.autotune:
                alpha_loss = temperature_loss(log_alpha, relative_entropy, target_entropy)
                alpha_optimizer.zero_grad()
                alpha_loss.backward()
                alpha_optimizer.step()
                alpha = log_alpha.detach().exp()

            if global_step % args.log_interval < args.update_frequency:
                scalars = {
                    "losses/qf1_values": q1.mean(),
                    "losses/qf2_values": q2.mean(),
                    "losses/qf1_loss": qf1_loss,
                    "losses/qf2_loss": qf2_loss,
                    "losses/qf_loss": (qf1_loss + qf2_loss) / 2,
                    "losses/actor_loss": pi_loss,
                    "losses/alpha": alpha,
                    "policy/entropy": -(pi * log_pi).sum(1).mean(),
                    "policy/kl": math.log(n) - relative_entropy,
                    "policy/exploit_probability": pi.amax(1).mean(),
                    "charts/SPS": global_step / (time.time() - start_time),
                }
                if args.autotune:
                    scalars |= {"losses/alpha_loss": alpha_loss, "policy/target_entropy": target_entropy}
                if args.autotune and args.anneal:
                    scalars["policy/target_exploit_probability"] = p
                for name, value in scalars.items():
                    writer.add_scalar(name, torch.as_tensor(value).item(), global_step)

        # Targets
        if global_step > args.learning_starts and global_step % args.target_network_frequency == 0:
            with torch.no_grad():
                for q, q_target in ((qf1, qf1_target), (qf2, qf2_target)):
                    for parameter, target_parameter in zip(q.parameters(), q_target.parameters(), strict=True):
                        target_parameter.lerp_(parameter, args.tau)

        if global_step % print_interval == 0:
            mean_return = f"{np.mean(recent_returns):.2f}" if recent_returns else "-"
            steps.set_postfix_str(f"return {mean_return}")
            if steps.disable:
                left = (args.total_timesteps - global_step) * (time.time() - start_time) / max(global_step, 1)
                sps = global_step / (time.time() - start_time)
                print(
                    f"step {global_step}/{args.total_timesteps} return {mean_return} SPS {sps:.0f} left {left:.0f} s",
                    flush=True,
                )

    env.close()
    save_actor(run_dir / "actor.pt", actor, args)
    returns = evaluate(actor, args, device, run_dir)
    writer.add_scalar("eval/episodic_return", returns.mean(), args.total_timesteps)
    print(f"{run_dir}: deterministic return {returns.mean():.2f} +- {returns.std():.2f} over {len(returns)} episodes")
    writer.close()
    return run_dir


if __name__ == "__main__":
    try:
        train(tyro.cli(Args))
    except UsageError as error:
        print(f"{os.path.basename(__file__)}: {error}", file=sys.stderr)
        sys.exit(2)
