"""KLAC (Kullback-Leibler Actor-Critic) for discrete actions, in one file.

SAC pays its critic for the policy's entropy, which can make staying random and alive worth more than the task's reward.
KLAC keeps that regulariser in the actor alone. Equation and line numbers are the paper's:

    critic        y = r + beta + gamma (1 - terminated) E_{a' ~ pi}[min_i Q_i'(s', a')]          Eq. 12, line 10
    actor         E_{a ~ pi}[alpha (log pi - log q) - min_i Q_i]                                 Eq. 13, line 13
    temperature   alpha (H - H*), which holds KL(pi || q) = log n - H at log n - H*              Eq. 10, -(line 22)
    schedule      H*(p), with p, the probability of the best action, annealed linearly           section 5.4, line 17

`--no-bias` sets beta to 0 (KLAC-b), `--no-anneal` holds H* at SAC's 0.89 log n (KLAC-a), both together are KLAC-ab.
The README explains the flags and the metrics; docs/algorithms.md lists where the paper is silent or misprinted.
"""

import colorsys
import copy
import difflib
import json
import math
import os
import random
import signal
import sys
import time
from collections import deque, namedtuple
from dataclasses import asdict, dataclass, replace
from pathlib import Path

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
    exp_name: str = Path(__file__).stem
    """name of this experiment, part of the run's name"""
    run_name: str | None = None
    """folder of this run under runs/ (default: {env_id}__{exp_name}__{seed}__{timestamp})"""
    resume: bool = False
    """go on from the last checkpoint, if there is one (without --run-name: of the latest run of this task and seed)"""
    checkpoint_interval: int = 100_000
    """steps between two checkpoints, each written at the end of an episode"""
    evaluate: str | None = None
    """train nothing, but play --eval-episodes episodes of this run (its folder), deterministic and stochastic"""
    seed: int = 1
    """seed of the weights, the actions, the replay samples and every episode"""
    torch_deterministic: bool = True
    """make cuDNN deterministic (the CPU always is)"""
    cuda: bool = True
    """use a GPU where there is one"""
    compile: bool = False
    """compile target and losses (CUDA graphs on a GPU, a C++ compiler on a CPU); the first updates take a minute"""
    track: bool = False
    """send the run to Weights & Biases as well (WANDB_MODE=offline needs no login)"""
    wandb_project_name: str = "klac"
    """W&B project"""
    wandb_entity: str | None = None
    """W&B team or user"""
    capture_video: bool = False
    """record clips of 300 frames, from training and evaluation, into the run's folder"""
    log_interval: int = 1_000
    """steps between two logged values of the losses and of the policy (episodes are logged as they end)"""
    eval_episodes: int = 10
    """episodes of the deterministic policy (argmax) played after training"""
    env_id: str = "Breakout-v1"
    """a MinAtar game (Asterix-v1, Breakout-v1, ...) or any Gymnasium id with discrete actions (CartPole-v1, ...)"""
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
    beta: float = 0.1
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
    """reference policy q: an earlier run, its folder or actor.pt, of a task with the same spaces (default: uniform)"""


class UsageError(ValueError):
    """A flag that cannot work; the message names the flag, its value and what would be valid."""


class MinAtarFixes(gym.Wrapper):
    """Makes a MinAtar game's episodes independent of each other, and its frames fit for a video."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}  # noqa: RUF012

    def reset(self, **kwargs):
        self.unwrapped.game.last_action = 0  # a sticky first action would repeat the previous episode's last one
        return super().reset(**kwargs)

    def render(self):
        """Each cell in the hue of its last channel: MinAtar's own palette leaves the player nearly black."""
        state = self.unwrapped.game.state()  # (10, 10, C)
        channels = np.arange(1, state.shape[2] + 1)
        palette = np.array([(0, 0, 0), *(colorsys.hsv_to_rgb(c / len(channels), 0.7, 1) for c in channels)])
        frame = (255 * palette[(state * channels).max(axis=2)]).astype(np.uint8)
        return frame.repeat(32, axis=0).repeat(32, axis=1)


def make_env(env_id: str, render: bool = False) -> gym.Env:
    """One plain environment. `Seaquest-v1` stands for `MinAtar/Seaquest-v1`. Raises UsageError if it cannot be made."""
    if "MinAtar/Breakout-v1" not in gym.registry:
        minatar.gym.register_envs()
    full_id = f"MinAtar/{env_id}" if f"MinAtar/{env_id}" in gym.registry else env_id
    gym.logger.min_level = gym.logger.ERROR
    try:
        env = gym.make(full_id, disable_env_checker=True, **({"render_mode": "rgb_array"} if render else {}))
        env = MinAtarFixes(env) if full_id.startswith("MinAtar/") else env
        if env.spec.max_episode_steps is None:  # a policy that stays alive would be neither logged nor saved
            env = gym.wrappers.TimeLimit(env, 10_000)
        if render:
            env.reset(seed=0)
            env.render()  # fails now rather than in the run
        return env
    except Exception as error:  # of Gymnasium, of an imported module, or of the environment itself
        flags = f"--env-id {env_id}" + " --capture-video" * render
        prefix = "MinAtar/" if env_id.startswith("MinAtar/") else ""
        known = [name for name in gym.registry if full_id not in gym.registry and name.startswith(prefix)]
        known = [name.removeprefix("MinAtar/") for name in known]
        nearest = ", ".join(difflib.get_close_matches(env_id.removeprefix(prefix), known, cutoff=0))
        raise UsageError(f"{flags}: {error} {'Nearest ids: ' * bool(nearest)}{nearest}") from error


def check_args(args: Args, env: gym.Env) -> None:
    """Raises UsageError on the first flag that cannot work, before anything is written."""
    obs_space, action_space = env.observation_space, env.action_space
    if not isinstance(action_space, gym.spaces.Discrete) or action_space.n < 2 or action_space.start != 0:
        valid = "Discrete(n) from 0 with n >= 2 (klac_continuous.py is the script for continuous ones)"
        raise UsageError(f"--env-id {args.env_id}: actions must be {valid}, not {action_space}")
    shape = obs_space.shape if isinstance(obs_space, gym.spaces.Box) else ()
    is_image = len(shape) == 3 and min(shape[:2]) >= 3 and not shape[0] < shape[1] == shape[2]
    if not is_image and not (len(shape) == 1 and shape[0] > 0):
        valid = "images (H x W x channels, at least 3 x 3) or flat (one dimension)"
        raise UsageError(f"--env-id {args.env_id}: observations must be {valid}, not {obs_space}")
    n, total = action_space.n, args.total_timesteps
    positive = "total_timesteps buffer_size batch_size update_frequency target_network_frequency "
    positive += "policy_lr q_lr log_interval checkpoint_interval eval_episodes"
    rules = [(x, 0 < getattr(args, x) < 2**62, "positive and below 2**62") for x in positive.split()]
    rules += [
        ("seed", 0 <= args.seed < 2**32, "in [0, 2**32)"),
        ("gamma", 0 <= args.gamma < 1, "in [0, 1)"),
        ("tau", 0 < args.tau <= 1, "in (0, 1]"),
        ("alpha", 0 <= args.alpha < math.inf, "at least 0 and finite"),
        ("alpha", not args.autotune or args.alpha == Args.alpha, "given with --no-autotune: otherwise it is learned"),
        ("batch_size", args.batch_size <= args.buffer_size, f"at most --buffer-size {args.buffer_size}"),
        ("learning_starts", 0 <= args.learning_starts < total, f"at least 0 and below --total-timesteps {total}"),
        ("beta", math.isfinite(args.beta), "finite"),
        ("anneal_timesteps", args.anneal_timesteps is None or args.anneal_timesteps > 0, "positive"),
        *((x, not args.anneal or 1 / n <= getattr(args, x) < 1, f"in [1/{n}, 1)") for x in ("p_start", "p_end")),
        ("exp_name", args.exp_name == Path(args.exp_name).resolve().name, "a plain folder name"),
        ("run_name", args.run_name in (None, Path(str(args.run_name)).resolve().name), "a plain folder name"),
    ]
    for name, valid, expected in rules:
        if not valid:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be {expected}")


def preprocess(obs: torch.Tensor) -> torch.Tensor:
    """Observations (B, *obs) as the networks take them: float32, images as (B, C, H, W), bytes scaled to [0, 1]."""
    x = obs.permute(0, 3, 1, 2) if obs.ndim == 4 else obs
    x = x.to(torch.float32, memory_format=torch.contiguous_format)
    return x / 255 if obs.dtype == torch.uint8 else x


cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
use_onednn = "AuthenticAMD" in cpu and "cpu family\t: 26" in cpu and torch.backends.mkldnn.is_available()


class Linear(nn.Linear):
    """nn.Linear, but on AMD's Zen 5 (family 26) by oneDNN: there it is twice as fast as the BLAS, elsewhere slower."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if use_onednn and x.is_cpu and len(x) > 1 and not torch.compiler.is_compiling():
            return super().forward(x.to_mkldnn()).to_dense()
        return super().forward(x)


def make_network(obs_shape: tuple[int, ...], n: int) -> nn.Sequential:
    """Maps (B, *obs) to (B, n): the logits of the actor, or a critic's value of each action."""
    if len(obs_shape) == 3:
        height, width, channels = obs_shape
        encoder = [nn.Conv2d(channels, 16, 3), nn.ReLU(inplace=True), nn.Flatten()]
        encoder += [Linear(16 * (height - 2) * (width - 2), 128)]
    else:
        encoder = [nn.Linear(obs_shape[0], 128), nn.ReLU(inplace=True), Linear(128, 128)]
    network = nn.Sequential(*encoder, nn.ReLU(inplace=True), nn.Linear(128, n))
    for parameter in network.parameters():
        nn.init.kaiming_normal_(parameter) if parameter.ndim > 1 else nn.init.zeros_(parameter)  # weights, biases
    return network


Batch = namedtuple("Batch", "obs actions rewards next_obs terminations")


class ReplayBuffer:
    """The last `capacity` transitions, observations in the environment's own dtype (float64 as float32)."""

    def __init__(self, capacity: int, obs_space: gym.Space, action_space: gym.Space, device: torch.device):
        obs, actions, next_obs = (
            np.zeros((capacity, *space.shape), np.float32 if space.dtype == np.float64 else space.dtype)
            for space in (obs_space, action_space, obs_space)
        )
        self.columns = Batch(obs, actions, np.zeros(capacity, np.float32), next_obs, np.zeros(capacity, np.float32))
        self.capacity, self.device, self.added = capacity, device, 0

    def add(self, *transition) -> None:
        """Stores (obs, action, reward, next_obs, terminated): terminated is False at a time limit."""
        for column, value in zip(self.columns, transition, strict=True):
            column[self.added % self.capacity] = value
        self.added += 1

    def sample(self, batch_size: int, rng: np.random.Generator) -> Batch:
        """Draws transitions uniformly: obs and next_obs preprocessed, (B, *obs); the other columns (B, ...)."""
        i = rng.integers(min(self.added, self.capacity), size=batch_size)
        batch = Batch(*(torch.as_tensor(column[i], device=self.device) for column in self.columns))
        return batch._replace(obs=preprocess(batch.obs), next_obs=preprocess(batch.next_obs))

    def state_dict(self) -> dict:
        """The transitions held, by column, and the number added so far: what a checkpoint stores."""
        filled = min(self.added, self.capacity)
        return {"added": self.added, "columns": [torch.from_numpy(column[:filled]) for column in self.columns]}

    def load_state_dict(self, state: dict) -> None:
        """Takes over what `state_dict` of a buffer of the same capacity returned."""
        self.added = state["added"]
        for column, saved in zip(self.columns, state["columns"], strict=True):
            column[: len(saved)] = saved.numpy()


def exploit_entropy(p: float, n: int) -> float:
    """H*(p, n) in nats: the entropy of p on one action and (1 - p) / (n - 1) on each other; 1/n <= p < 1 (line 17)."""
    return -p * math.log(p) - (1 - p) * math.log((1 - p) / (n - 1))


def make_log_q(args: Args, obs_shape: tuple[int, ...], n: int, device: torch.device):
    """The reference policy: a function from observations (B, *obs) to log q(a|s), (B, n) or broadcast to it. Replace
    this function to use another reference. Raises UsageError if args.reference is no actor for this task."""
    if args.reference is None:
        return lambda obs: -math.log(n)
    path = Path(args.reference, "actor.pt") if Path(args.reference).is_dir() else args.reference
    network = make_network(obs_shape, n).to(device)
    try:
        network.load_state_dict(torch.load(path, map_location=device, weights_only=True)["actor"])
        if not all(weights.isfinite().all() for weights in network.parameters()):
            raise ValueError("weights that are not finite")
    except Exception as error:  # missing, not a checkpoint, another shape: torch raises a different error for each
        valid = f"an earlier run's folder or actor.pt, for observations {obs_shape} and {n} actions, and finite"
        raise UsageError(f"--reference {args.reference}: must be {valid}") from error
    return lambda obs: F.log_softmax(network(obs), dim=1)


def td_target(batch: Batch, actor: nn.Module, target_critics, gamma: float, beta: float) -> torch.Tensor:
    """y = r + beta + gamma (1 - terminated) E_{a' ~ pi}[min_i Q_i'(s', a')], (B,): no entropy (Eq. 12, line 10)."""
    log_pi = F.log_softmax(actor(batch.next_obs), dim=1)  # (B, n)
    min_q = torch.minimum(*(q(batch.next_obs) for q in target_critics))  # (B, n)
    next_v = (log_pi.exp() * min_q).sum(1)  # (B,)
    return batch.rewards + beta + gamma * (1 - batch.terminations) * next_v


def critic_loss(batch: Batch, critics: nn.ModuleList, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Each critic's mean squared error, and its Q(s, a), (B,), for the log."""
    q1, q2 = (q(batch.obs).gather(1, batch.actions[:, None]).squeeze(1) for q in critics)
    return F.mse_loss(q1, y), F.mse_loss(q2, y), q1, q2


def actor_loss(batch: Batch, actor: nn.Module, critics: nn.ModuleList, log_q, alpha: torch.Tensor):
    """alpha KL(pi || q exp(Q / alpha) / Z) up to a constant, E_{a ~ pi}[alpha (log pi - log nq) - min_i Q_i], with its
    log pi, (B, n), and log nq, which is q's relative to the uniform policy: 0 if q is that policy."""
    with torch.no_grad():
        min_q = torch.minimum(*(q(batch.obs) for q in critics))  # (B, n)
        log_nq = log_q(batch.obs) + math.log(min_q.shape[1])
    log_pi = F.log_softmax(actor(batch.obs), dim=1)
    loss = (log_pi.exp() * (alpha * (log_pi - log_nq) - min_q)).sum(1).mean()
    return loss, log_pi.detach(), log_nq


def temperature_loss(log_alpha: torch.Tensor, entropy: torch.Tensor, target_entropy: float) -> torch.Tensor:
    """alpha (H - H*): alpha falls while the policy is more random than its target."""
    return log_alpha.exp() * (entropy - target_entropy).detach()


def check_finite(name: str, loss: torch.Tensor, step: int, saved_step: int) -> None:
    """Raises FloatingPointError if the loss is not finite."""
    if not math.isfinite(loss.item()):
        last = f"the last checkpoint is of step {saved_step}" if saved_step else "there is no checkpoint yet"
        raise FloatingPointError(f"{name} is {loss.item()} at step {step}; {last}")


def save(state: dict, path: Path) -> None:
    """Writes `state` to `path`, whole or not at all: then, on a full disk for instance, it raises OSError."""
    partial = path.with_name("partial")
    try:
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"{path}: not written: {error}") from error


def load(run_dir: Path) -> dict | None:
    """What `save` last wrote of a run: its actor if it is finished, else its checkpoint; None before the first. A file
    from a stranger can run no code. Raises UsageError if the file is damaged."""
    for path in (run_dir / "actor.pt", run_dir / "checkpoint.pt"):
        if path.exists():
            try:
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                _ = state["args"]["env_id"], state["actor"]  # what every saved run has
                return state
            except Exception as error:  # torch raises a different error for each damage
                raise UsageError(f"{path}: damaged; without it the run starts afresh: {error!s:.150}") from error
    return None


def find_run(args: Args) -> tuple[Path, dict | None]:
    """The run's folder and, with --resume, what was saved there. Raises UsageError if other flags began it."""
    name = f"{args.env_id.split('/')[-1].split(':')[-1]}__{args.exp_name}__{args.seed}__"
    earlier = sorted(path.name for path in Path("runs").glob("*") if path.name.rpartition("__")[0] + "__" == name)
    latest = earlier[-1] if args.resume and earlier else f"{name}{time.time_ns() // 1000}"
    run_dir = Path("runs", args.run_name or latest)
    state = load(run_dir) if args.resume else None
    try:
        began = state["args"] if state else json.loads((run_dir / "args.json").read_text()) if args.resume else {}
    except (OSError, ValueError):  # there is no such run, or it was killed before it had begun
        began = {}
    may_change = "run_name resume checkpoint_interval eval_episodes capture_video track wandb_project_name wandb_entity"
    for name, value in asdict(args).items() if began else ():
        before = began.get(name)
        if value != before and name not in may_change.split() and not (name == "total_timesteps" and value > before):
            raise UsageError(f"--resume: {run_dir} was started with --{name.replace('_', '-')} {before}, not {value}")
    if state and "step" not in state and args.total_timesteps > state["args"]["total_timesteps"]:
        raise UsageError(f"--total-timesteps {args.total_timesteps}: {run_dir} is finished, and its checkpoint is gone")
    return run_dir, state


def start_logging(args: Args, algorithm: str, run_dir: Path, first_step: int) -> SummaryWriter:
    """Makes the run's folder, writes args.json, and opens TensorBoard and, with --track, W&B; what was logged from
    `first_step` on, before the run was resumed, is taken back."""
    task = args.env_id.split("/")[-1].split(":")[-1]
    config = json.dumps({"algorithm": algorithm, **asdict(args)}, indent=2)
    try:
        run_dir.mkdir(parents=True, exist_ok=args.resume)
    except OSError as error:
        raise UsageError(f"--run-name {run_dir.name}: must be a new, writable folder: {error}") from error
    if args.track:
        try:
            import wandb

            if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False, verify=False):
                raise UsageError("no login; run `wandb login`, or set WANDB_API_KEY or WANDB_MODE=offline")
            labels = {"name": run_dir.name, "group": task, "job_type": algorithm, "tags": [task, algorithm]}
            project = {"project": args.wandb_project_name, "entity": args.wandb_entity, "config": json.loads(config)}
            labels |= {"id": run_dir.name, "resume": "allow" if args.resume else "never"}
            wandb.init(**project, **labels, sync_tensorboard=True, save_code=True, reinit="finish_previous")
        except Exception as error:
            if not any(run_dir.iterdir()):
                run_dir.rmdir()
            raise UsageError(f"--track: W&B: {error}") from error
    (run_dir / "args.json").write_text(config + "\n")
    writer = SummaryWriter(run_dir, purge_step=first_step if args.resume else None)
    if first_step == 0:
        writer.add_text("hyperparameters", f"```\n{config}\n```")
    return writer


@torch.inference_mode()
def evaluate(actor: nn.Module, args: Args, video: Path, deterministic: bool = True) -> np.ndarray:
    """Returns of `args.eval_episodes` episodes of the best action, or of sampled ones."""
    env = make_env(args.env_id, args.capture_video)
    if args.capture_video:
        env = gym.wrappers.RecordVideo(env, str(video), video_length=300, gc_trigger=None)
    rng = np.random.default_rng([args.seed, 1])  # not the run's own generator: an evaluation changes nothing in a run
    returns, device = np.zeros(args.eval_episodes), next(actor.parameters()).device
    for episode in range(args.eval_episodes):
        (obs, _), done = env.reset(seed=int(rng.integers(2**31))), False
        while not done:
            logits = actor(preprocess(torch.as_tensor(obs[None], device=device)))
            action = (logits.argmax() if deterministic else torch.multinomial(F.softmax(logits, dim=1), 1)).item()
            obs, reward, terminated, truncated, _ = env.step(action)
            returns[episode] += reward
            done = terminated or truncated
    env.close()
    return returns


def evaluate_run(args: Args) -> None:
    """Prints the returns of a saved run's policy, deterministic and stochastic, each with its 95% normal interval."""
    run_dir = Path(args.evaluate)
    state = load(run_dir)
    if state is None:
        raise UsageError(f"--evaluate {run_dir}: must be the folder of a run that has saved a checkpoint or its actor")
    own = {"seed": args.seed, "eval_episodes": args.eval_episodes, "capture_video": args.capture_video}
    args = replace(args, **{name: value for name, value in state["args"].items() if name in asdict(args)} | own)
    env = make_env(args.env_id, args.capture_video)
    check_args(args, env)
    actor = make_network(env.observation_space.shape, int(env.action_space.n))
    actor.load_state_dict(state["actor"])
    for name in ("deterministic", "stochastic"):
        torch.manual_seed(args.seed)
        video = run_dir / "videos" / f"evaluate-{name}"
        returns = evaluate(actor, args, video, name == "deterministic")
        margin = 1.96 * returns.std(ddof=1) / math.sqrt(len(returns)) if len(returns) > 1 else math.nan
        print(f"{run_dir}: {name} return {returns.mean():.2f} +- {margin:.2f} over {len(returns)} episodes")


def train(args: Args) -> Path:
    """Trains one run and returns its folder. Raises UsageError, with nothing written, if a flag cannot work, and
    FloatingPointError if a loss is not finite."""
    env = make_env(args.env_id, args.capture_video)
    check_args(args, env)
    if args.anneal and args.anneal_timesteps is None:
        args = replace(args, anneal_timesteps=args.total_timesteps)
    run_dir, state = find_run(args)
    if state and "step" not in state:
        print(f"{run_dir}: finished already, after {args.total_timesteps} steps")
        (run_dir / "checkpoint.pt").unlink(missing_ok=True)  # if it was killed right here, the last time
        return run_dir
    rng = np.random.default_rng(args.seed)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    obs_shape, n = env.observation_space.shape, int(env.action_space.n)
    algorithm = "KLAC" + "-" * (not args.anneal or not args.bias) + "a" * (not args.anneal) + "b" * (not args.bias)

    actor = make_network(obs_shape, n).to(device)
    critics = nn.ModuleList([make_network(obs_shape, n), make_network(obs_shape, n)]).to(device)
    target_critics = copy.deepcopy(critics).requires_grad_(False)
    log_q = make_log_q(args, obs_shape, n, device)
    actor_optimizer = torch.optim.Adam(actor.parameters(), lr=args.policy_lr, eps=1e-4, fused=True)
    q_optimizer = torch.optim.Adam(critics.parameters(), lr=args.q_lr, eps=1e-4, fused=True)
    log_alpha = torch.zeros((), requires_grad=True, device=device)
    alpha_optimizer = torch.optim.Adam([log_alpha], lr=args.q_lr, eps=1e-4, fused=True)
    target_entropy = 0.89 * math.log(n)  # SAC's heuristic, in nats
    try:
        buffer = ReplayBuffer(args.buffer_size, env.observation_space, env.action_space, device)
    except (MemoryError, ValueError) as error:
        raise UsageError(f"--buffer-size {args.buffer_size}: must fit into memory: {error}") from error

    losses = td_target, critic_loss, actor_loss
    if args.compile:
        losses = (torch.compile(loss, mode="reduce-overhead") for loss in losses)
    compute_td_target, compute_critic_loss, compute_actor_loss = losses

    # All that a checkpoint holds besides the counters and the random generators
    parts = {"actor": actor, "critics": critics, "target_critics": target_critics, "buffer": buffer}
    parts |= {"actor_optimizer": actor_optimizer, "q_optimizer": q_optimizer, "alpha_optimizer": alpha_optimizer}
    first_step, episode_seed, recent_returns = 0, int(rng.integers(2**31)), deque(maxlen=20)
    if state:
        for name, part in parts.items():
            part.load_state_dict(state[name] if part is buffer else copy.deepcopy(state[name]))  # nothing maps the file
        log_alpha.data.copy_(state["log_alpha"])
        first_step, episode_seed = state["step"], state["episode_seed"]
        recent_returns.extend(state["recent_returns"])
        rng.bit_generator.state = state["rng"]
        torch.set_rng_state(state["torch_rng"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], device)
        del state
    alpha = log_alpha.detach().exp() if args.autotune else torch.tensor(args.alpha, device=device)

    writer = start_logging(args, algorithm, run_dir, first_step)
    print(f"{run_dir}: {algorithm} on {args.env_id} ({device}), from step {first_step}", flush=True)
    if args.capture_video:
        clips = {"name_prefix": f"from-step-{first_step}", "video_length": 300, "gc_trigger": None}
        env = gym.wrappers.RecordVideo(env, str(run_dir / "videos" / "train"), **clips)
    obs, _ = env.reset(seed=episode_seed)
    episode_rewards, start_value = [], None
    saved_step, next_checkpoint = first_step, first_step + args.checkpoint_interval
    timed_step, start_time = max(first_step, args.learning_starts), time.time()
    steps = range(first_step, args.total_timesteps)
    steps = tqdm(steps, initial=first_step, total=args.total_timesteps, unit="step", dynamic_ncols=True, disable=None)
    for global_step in steps:
        # Act: at random during the warm-up, then from the policy
        if global_step < args.learning_starts:
            action, start_time = int(rng.integers(n)), time.time()  # the speed is that of the steps after the warm-up
        else:
            with torch.inference_mode():
                x = preprocess(torch.as_tensor(obs[None], device=device))
                pi = F.softmax(actor(x), dim=1)  # (1, n)
                action = (pi / torch.empty_like(pi).exponential_()).argmax().item()  # a draw from pi, as multinomial's
                if not episode_rewards:
                    start_value = (pi * torch.minimum(*(q(x) for q in critics))).sum().item()

        # Step and store: next_obs is the episode's own last observation, whatever ended it
        next_obs, reward, terminated, truncated, _ = env.step(action)
        buffer.add(obs, action, reward, next_obs, terminated)
        obs = next_obs
        episode_rewards.append(float(reward))

        if terminated or truncated:
            writer.add_scalar("charts/episodic_return", sum(episode_rewards), global_step)
            writer.add_scalar("charts/episodic_length", len(episode_rewards), global_step)
            if start_value is not None:
                discounted_return = sum(args.gamma**t * r for t, r in enumerate(episode_rewards))
                writer.add_scalar("charts/q_minus_return", start_value - discounted_return, global_step)
            recent_returns.append(sum(episode_rewards))
            episode_seed = int(rng.integers(2**31))
            obs, _ = env.reset(seed=episode_seed)
            episode_rewards, start_value = [], None

        if global_step > args.learning_starts and global_step % args.update_frequency == 0:
            batch = buffer.sample(args.batch_size, rng)
            if args.compile:
                torch.compiler.cudagraph_mark_step_begin()

            # Critics: regress both on the target
            with torch.no_grad():
                y = compute_td_target(batch, actor, target_critics, args.gamma, args.beta if args.bias else 0.0)
            qf1_loss, qf2_loss, q1, q2 = compute_critic_loss(batch, critics, y)
            q_optimizer.zero_grad()
            (qf1_loss + qf2_loss).backward()
            q_optimizer.step()
            check_finite("qf_loss", qf1_loss + qf2_loss, global_step, saved_step)

            # Actor: towards the Boltzmann policy of the critics
            pi_loss, log_pi, log_nq = compute_actor_loss(batch, actor, critics, log_q, alpha)
            actor_optimizer.zero_grad()
            pi_loss.backward()
            actor_optimizer.step()
            check_finite("actor_loss", pi_loss, global_step, saved_step)

            # Temperature: hold KL(pi || q) at its target, log n - H*
            if args.anneal:
                progress = min(1.0, global_step / args.anneal_timesteps)
                p = args.p_start + (args.p_end - args.p_start) * progress  # line 15
                target_entropy = exploit_entropy(p, n)
            pi = log_pi.exp()
            relative_entropy = -(pi * (log_pi - log_nq)).sum(1).mean()  # log n - KL(pi || q): H if q is uniform
            if args.autotune:
                alpha_loss = temperature_loss(log_alpha, relative_entropy, target_entropy)
                alpha_optimizer.zero_grad()
                alpha_loss.backward()
                alpha_optimizer.step()
                alpha = log_alpha.detach().exp()

            if global_step % args.log_interval < args.update_frequency:
                sps = (global_step + 1 - timed_step) / (time.time() - start_time)
                scalars = {"charts/SPS": sps, "losses/qf1_values": q1.mean(), "losses/qf2_values": q2.mean()}
                scalars |= {"losses/qf1_loss": qf1_loss, "losses/qf2_loss": qf2_loss}
                scalars |= {"losses/qf_loss": (qf1_loss + qf2_loss) / 2, "losses/actor_loss": pi_loss}
                scalars |= {"losses/alpha": alpha, "policy/exploit_probability": pi.amax(1).mean()}
                scalars |= {"policy/entropy": -(pi * log_pi).sum(1).mean(), "policy/kl": math.log(n) - relative_entropy}
                if args.autotune:
                    scalars |= {"losses/alpha_loss": alpha_loss, "policy/target_entropy": target_entropy}
                    scalars |= {"policy/target_kl": math.log(n) - target_entropy}
                    scalars |= {"policy/target_exploit_probability": p} if args.anneal else {}
                for name, value in scalars.items():
                    writer.add_scalar(name, value, global_step)
                status = f"return {np.mean(recent_returns):.2f}" if recent_returns else "no episode yet"
                steps.set_postfix_str(status)
                if steps.disable and global_step % (10 * args.log_interval) < args.update_frequency:
                    left = (args.total_timesteps - global_step) / sps
                    print(f"step {global_step}: {status}, {sps:.0f} steps/s, {left:.0f} s left", flush=True)

        if global_step > args.learning_starts and global_step % args.target_network_frequency == 0:
            for parameter, target in zip(critics.parameters(), target_critics.parameters(), strict=True):
                target.lerp_(parameter.detach(), args.tau)

        # Checkpoint: between two episodes, so that the next one's seed stands for the environment's state
        if (terminated or truncated) and (stop_signals or global_step + 1 >= next_checkpoint):
            next_checkpoint = global_step + 1 + args.checkpoint_interval
            state = {name: part.state_dict() for name, part in parts.items()} | {"log_alpha": log_alpha.detach()}
            state |= {"rng": rng.bit_generator.state, "torch_rng": torch.get_rng_state()}
            state |= {"cuda_rng": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
            state |= {"args": asdict(args), "step": global_step + 1, "episode_seed": episode_seed}
            state |= {"recent_returns": list(recent_returns)}
            writer.flush()
            try:
                save(state, run_dir / "checkpoint.pt")
                saved_step = global_step + 1
            except OSError as error:  # the one before is still there
                print(f"step {global_step}: {error}", file=sys.stderr, flush=True)
            if stop_signals:
                writer.close()
                print(f"{run_dir}: stopped; the same command with --resume goes on from step {saved_step}", flush=True)
                sys.exit(128 + stop_signals[0])

    env.close()
    returns = evaluate(actor, args, run_dir / "videos" / "eval")
    writer.add_scalar("eval/episodic_return", returns.mean(), args.total_timesteps)
    print(f"{run_dir}: deterministic return {returns.mean():.2f} +- {returns.std():.2f} over {len(returns)} episodes")
    writer.close()
    save({"args": asdict(args), "actor": actor.state_dict(), "critics": critics.state_dict()}, run_dir / "actor.pt")
    (run_dir / "checkpoint.pt").unlink(missing_ok=True)
    return run_dir


stop_signals = []


def stop(number: int, _) -> None:
    """Handles SIGINT and SIGTERM: the run saves itself at the end of the episode. A second signal ends it at once."""
    stop_signals.append(number)
    for either in (signal.SIGINT, signal.SIGTERM):
        signal.signal(either, signal.SIG_DFL)
    print("stopping at the end of this episode; once more to stop now", file=sys.stderr, flush=True)


if __name__ == "__main__":
    args = tyro.cli(Args)
    for number in (signal.SIGINT, signal.SIGTERM) if args.evaluate is None else ():
        signal.signal(number, stop)
    try:
        train(args) if args.evaluate is None else evaluate_run(args)
    except (UsageError, FloatingPointError, OSError) as error:
        print(" ".join(f"{Path(__file__).name}: {error}".split()), file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
