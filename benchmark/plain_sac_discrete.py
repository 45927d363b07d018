"""Discrete SAC as one would first write it, without logging: the peer of sac_discrete.py in throughput.py."""

import copy
import math
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from minatar.gym import register_envs


@dataclass
class Args:
    env_id: str = "Seaquest-v1"
    total_timesteps: int = 3_000_000
    learning_starts: int = 5_000
    seed: int = 1


class Network(nn.Module):
    def __init__(self, channels: int, n: int):
        super().__init__()
        self.convolution = nn.Conv2d(channels, 16, 3)
        self.hidden = nn.Linear(1024, 128)
        self.head = nn.Linear(128, n)

    def forward(self, x):
        x = F.relu(self.convolution(x.float().permute(0, 3, 1, 2)))
        return self.head(F.relu(self.hidden(x.flatten(1))))


class Buffer:
    def __init__(self, capacity: int, shape: tuple[int, ...]):
        self.obs, self.next_obs = np.zeros((capacity, *shape), bool), np.zeros((capacity, *shape), bool)
        self.actions, self.rewards, self.dones = (np.zeros(capacity, t) for t in (np.int64, np.float32, np.float32))
        self.capacity, self.added, self.rng = capacity, 0, np.random.default_rng(0)

    def add(self, obs, action, reward, next_obs, done):
        i = self.added % self.capacity
        self.obs[i], self.actions[i], self.rewards[i], self.next_obs[i], self.dones[i] = (
            obs,
            action,
            reward,
            next_obs,
            done,
        )
        self.added += 1

    def sample(self, batch_size: int):
        i = self.rng.integers(min(self.added, self.capacity), size=batch_size)
        columns = (self.obs, self.actions, self.rewards, self.next_obs, self.dones)
        return (torch.as_tensor(column[i]) for column in columns)


def make_env(env_id: str) -> gym.Env:
    register_envs()
    return gym.make(f"MinAtar/{env_id}")


def train(args: Args) -> None:
    env = make_env(args.env_id)
    torch.manual_seed(args.seed)
    n, shape = env.action_space.n, env.observation_space.shape
    actor, q1, q2 = (Network(shape[2], n) for _ in range(3))
    target_q1, target_q2 = copy.deepcopy(q1), copy.deepcopy(q2)
    actor_optimizer = torch.optim.Adam(actor.parameters(), lr=3e-4, eps=1e-4)
    q_optimizer = torch.optim.Adam([*q1.parameters(), *q2.parameters()], lr=3e-4, eps=1e-4)
    log_alpha = torch.zeros(1, requires_grad=True)
    alpha_optimizer = torch.optim.Adam([log_alpha], lr=3e-4, eps=1e-4)
    target_entropy, buffer = 0.89 * math.log(n), Buffer(100_000, shape)
    obs, _ = env.reset(seed=args.seed)
    for step in range(args.total_timesteps):
        if step < args.learning_starts:
            action = env.action_space.sample()
        else:
            with torch.no_grad():
                logits = actor(torch.as_tensor(obs).unsqueeze(0))
                action = torch.distributions.Categorical(logits=logits).sample().item()
        next_obs, reward, terminated, truncated, _ = env.step(action)
        buffer.add(obs, action, reward, next_obs, terminated)
        obs = env.reset()[0] if terminated or truncated else next_obs

        if step > args.learning_starts and step % 4 == 0:
            b_obs, b_actions, b_rewards, b_next_obs, b_dones = buffer.sample(64)
            alpha = log_alpha.exp().detach()
            with torch.no_grad():
                next_log_pi = F.log_softmax(actor(b_next_obs), dim=1)
                next_q = torch.min(target_q1(b_next_obs), target_q2(b_next_obs))
                next_v = (next_log_pi.exp() * (next_q - alpha * next_log_pi)).sum(1)
                y = b_rewards + 0.99 * (1 - b_dones) * next_v
            q1_value = q1(b_obs).gather(1, b_actions.unsqueeze(1)).squeeze(1)
            q2_value = q2(b_obs).gather(1, b_actions.unsqueeze(1)).squeeze(1)
            q_loss = F.mse_loss(q1_value, y) + F.mse_loss(q2_value, y)
            q_optimizer.zero_grad()
            q_loss.backward()
            q_optimizer.step()

            log_pi = F.log_softmax(actor(b_obs), dim=1)
            pi = log_pi.exp()
            with torch.no_grad():
                min_q = torch.min(q1(b_obs), q2(b_obs))
            actor_loss = (pi * (alpha * log_pi - min_q)).sum(1).mean()
            actor_optimizer.zero_grad()
            actor_loss.backward()
            actor_optimizer.step()

            entropy = -(pi * log_pi).sum(1).mean().detach()
            alpha_loss = (log_alpha.exp() * (entropy - target_entropy)).mean()
            alpha_optimizer.zero_grad()
            alpha_loss.backward()
            alpha_optimizer.step()
        if step % 8_000 == 0:
            target_q1.load_state_dict(q1.state_dict())
            target_q2.load_state_dict(q2.state_dict())
