"""Small environments that the tests train on, registered under plain ids by importing this module."""

import os
import time
from pathlib import Path
from typing import ClassVar

import gymnasium as gym
import numpy as np
import torch


class Catch(gym.Env):
    """A ball falls down a 7 x 7 image; +1 for being under it at the end. A random policy mostly fails. `turned` keeps
    the channels first in memory, as a wrapper does that turns the images of another environment."""

    size = 7

    def __init__(self, turned=False):
        self.turned = turned
        self.observation_space = gym.spaces.Box(0, 1, (self.size, self.size, 2), bool)
        self.action_space = gym.spaces.Discrete(3)

    def _observe(self):
        image = np.zeros(self.observation_space.shape, bool)
        image[self.row, self.ball, 0] = True
        image[-1, self.paddle, 1] = True
        return np.moveaxis(np.moveaxis(image, -1, 0).copy(), 0, -1) if self.turned else image

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.row, self.ball, self.paddle = 0, int(self.np_random.integers(self.size)), self.size // 2
        return self._observe(), {}

    def step(self, action):
        self.row += 1
        self.paddle = int(np.clip(self.paddle + action - 1, 0, self.size - 1))
        done = self.row == self.size - 1
        return self._observe(), float(done and self.paddle == self.ball), done, False, {}


class OneStep(gym.Env):
    """Every episode is one step with reward 1; it ends by `ending`: "termination" or "truncation"."""

    observation_space = gym.spaces.Box(-1, 1, (2,), np.float64)

    def __init__(self, ending="termination", continuous=False):
        self.ending = ending
        self.action_space = gym.spaces.Box(-1, 1, (1,), np.float32) if continuous else gym.spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.array([1.0, 0.0]), {}

    def step(self, action):
        return np.array([1.0, 0.5]), 1.0, self.ending == "termination", self.ending == "truncation", {}


class Bandit(gym.Env):
    """One step an episode: +1 for the arm that the observation shows, 0 for each of the other three."""

    observation_space = gym.spaces.Box(0, 1, (4,), np.float32)
    action_space = gym.spaces.Discrete(4)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.arm = int(self.np_random.integers(4))
        return np.eye(4, dtype=np.float32)[self.arm], {}

    def step(self, action):
        return np.zeros(4, np.float32), float(action == self.arm), True, False, {}


class Walk(gym.Env):
    """A walk on 0..4 that terminates at either end and is truncated by the time limit that `register` gives it."""

    observation_space = gym.spaces.Box(0, 4, (3,), np.float64)
    action_space = gym.spaces.Discrete(3)

    def _observe(self):
        return np.array([self.x, self.x % 2, self.noise])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.noise = 2, self.np_random.random()
        return self._observe(), {}

    def step(self, action):
        self.x += int(action) - 1
        self.noise = self.np_random.random()
        return self._observe(), float(self.x), self.x in (0, 4), False, {}


class Frames(Walk):
    """Renders what RecordVideo cannot write."""

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(self, kind, render_mode=None):
        self.kind = kind
        if kind != "modeless":
            self.render_mode = render_mode

    def render(self):
        frame = np.zeros((64, 64, 3), np.uint8)
        kinds = {"none": None, "grey": frame[..., 0], "rows": frame.tolist(), "modeless": frame}
        return kinds[self.kind] if self.kind in kinds else np.zeros((64 + 16 * self.x, 64, 3), np.uint8)


class StayOrExit(gym.Env):
    """Table 1 of the paper: of n actions one exits with reward 1, the others stay for nothing; a clock cuts it."""

    observation_space = gym.spaces.Box(0, 1, (1,), np.float32)

    def __init__(self, n=10):
        self.action_space = gym.spaces.Discrete(n)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.ones(1, np.float32), {}

    def step(self, action):
        return np.ones(1, np.float32), float(action == 0), bool(action == 0), False, {}


class Point(gym.Env):
    """A point on a plane is moved by at most 1 a step, from anywhere in [-4, 4]^2; the reward is minus its distance."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-4, 4, 2)
        return self.x.copy(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.x = self.x + action
        return self.x.copy(), -float(np.linalg.norm(self.x)), False, False, {}


class Drift(gym.Env):
    """A continuous walk that terminates beyond |x| = 2 and is truncated by its time limit; actions in [-1, 3]."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gym.spaces.Box(-1, 3, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = 0.0
        return np.array([self.x, 1.0, self.np_random.random()]), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.x += float(action[0]) - 1
        return np.array([self.x, 1.0, self.np_random.random()]), self.x, abs(self.x) > 2, False, {}


class Endless(OneStep):
    """One episode without an end."""

    def __init__(self):
        super().__init__(ending=None)


class Strange(gym.Env):
    """Spaces that no script accepts."""

    def __init__(self, obs=None, action=None):
        self.observation_space = obs or gym.spaces.Box(-1, 1, (2,))
        self.action_space = action or gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}


class Observes(Strange):
    """Samples of its observation space, whatever is done, with a reward of 1."""

    def step(self, action):
        return self.observation_space.sample(), 1.0, False, False, {}


class Odd(gym.Env):
    """A point on [-2, 2] that is moved left, not at all or right, and is paid minus its distance from 0; `oddity` says
    what this environment does that others do not."""

    def __init__(self, oddity="plain", continuous=False, dtype=None, start=0):
        self.oddity, self.state, self.seen = oddity, np.zeros(2, np.float32), []
        self.observation_space = gym.spaces.Box(-10, 10, (2,), np.float32)
        if oddity in ("bytes", "wide"):
            self.observation_space = gym.spaces.Box(0, 255, (2,), np.uint8)
        if oddity == "least":
            self.observation_space = gym.spaces.Box(-128, 127, (2,), np.int8)
        if continuous:
            self.action_space = gym.spaces.Box(-1, 1, (1,), dtype or np.float32)
        else:
            self.action_space = gym.spaces.Discrete(3, start=start, dtype=dtype or np.int64)
        if oddity == "long":
            self.observation_space = gym.spaces.Box(-10, 10, (2,), np.longdouble)

    def _observe(self):
        if self.oddity == "alias":
            return self.state  # the array that the next step overwrites
        copies = {"row": self.state[None].copy(), "list": self.state.tolist(), "view": self.state[::-1].copy()[::-1]}
        copies |= {"ragged": [[1, 2], 3], "gradient": torch.ones(2, requires_grad=True)}
        copies |= {"wide": np.array([300, -1]), "least": np.array([-128, 127], np.int8)}
        return copies.get(self.oddity, self.state.copy())

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        self.state[:] = self.np_random.uniform(-1, 1), 0
        return self._observe(), {}

    def step(self, action):
        self.steps += 1
        self.seen.append(action)
        if self.oddity == "strict":
            assert self.action_space.contains(action), repr(action)
        move = float(action[0]) if isinstance(self.action_space, gym.spaces.Box) else int(action) - 1
        self.state[0] = np.clip(self.state[0] + 0.1 * move, -2, 2)
        self.state[1] += 0.05
        reward = -abs(float(self.state[0]))
        if self.np_random.random() < 0.003:
            if self.oddity == "nan":
                self.state[1] = np.nan
            elif self.oddity == "infinite reward":
                reward = np.inf
            elif self.oddity == "huge":  # beyond float32, in which observations and rewards are kept
                return self.state.astype(np.float64) * 1e39, reward, False, False, {}
            elif self.oddity == "huge reward":
                reward = 1e39
            elif self.oddity == "own check":  # as NumPy's after seterr(all="raise")
                raise FloatingPointError("underflow encountered in multiply")
            elif self.oddity == "broken pipe":
                raise ConnectionResetError(104, "Connection reset by peer")
        if self.oddity == "two rewards":
            reward = np.array([reward, 0.0])
        if self.oddity == "ragged reward":
            reward = [[1, 2], 3]
        return self._observe(), reward, False, False, {}


class Grey(gym.Env):
    """Which of two shades is the image? Its frames are floats in [0, 1], whatever its space says."""

    action_space = gym.spaces.Discrete(2)

    def __init__(self, shape=(12, 12, 3), declared=np.uint8):
        self.observation_space = gym.spaces.Box(0, 255 if declared == np.uint8 else 1, shape, declared)

    def _observe(self):
        return np.full(self.observation_space.shape, (0.3, 0.7)[self.side], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.side, self.steps = int(self.np_random.integers(2)), 0
        return self._observe(), {}

    def step(self, action):
        reward, self.side, self.steps = float(action == self.side), int(self.np_random.integers(2)), self.steps + 1
        return self._observe(), reward, self.steps >= 5, False, {}


class Refuses(gym.Env):
    """Its own __init__ fails, by itself or for want of another environment."""

    def __init__(self, inner=None):
        if inner is not None:
            gym.make(inner)
        assert "map" == "found"


class Forks(Walk):
    """Has a worker, forked at the first reset, that outlives the process."""

    workers = 0

    def reset(self, **kwargs):
        Forks.workers += 1
        if Forks.workers == 2:  # the first reset is that of the check, before the run has a folder
            worker = os.fork()
            if worker == 0:
                time.sleep(60)
                os._exit(0)
            Path("worker").write_text(str(worker))
        return super().reset(**kwargs)


def register() -> None:
    """Registers the environments once; safe to call again."""
    if "Catch-v0" in gym.registry:
        return
    gym.register("Catch-v0", Catch)
    gym.register("CatchTurned-v0", Catch, kwargs={"turned": True})
    gym.register("Bandit-v0", Bandit)
    gym.register("Frames-v0", Frames, max_episode_steps=8)
    gym.register("OneStepTermination-v0", OneStep, kwargs={"ending": "termination"})
    gym.register("OneStepTruncation-v0", OneStep, kwargs={"ending": "truncation"})
    for ending in ("termination", "truncation"):
        kwargs = {"ending": ending, "continuous": True}
        gym.register(f"ContinuousOneStep{ending.title()}-v0", OneStep, kwargs=kwargs)
    gym.register("StayOrExitOf10-v0", StayOrExit, max_episode_steps=200)
    gym.register("Point-v0", Point, max_episode_steps=20)
    gym.register("Drift-v0", Drift, max_episode_steps=8)
    gym.register("Walk-v0", Walk, max_episode_steps=8)
    kinds = ["plain", "alias", "row", "list", "view", "bytes", "wide", "least", "two rewards"]
    kinds += ["ragged", "gradient", "ragged reward", "long"]
    kinds += ["nan", "infinite reward", "huge", "huge reward", "broken pipe", "own check"]
    for kind in kinds:
        for prefix, continuous in (("Odd", False), ("ContinuousOdd", True)):
            name = f"{prefix}{kind.title().replace(' ', '')}-v0"
            kwargs = {"oddity": kind, "continuous": continuous}
            gym.register(name, Odd, max_episode_steps=20, kwargs=kwargs)
    for width in (np.float16, np.float32, np.float64):
        kwargs = {"oddity": "strict", "continuous": True, "dtype": width}
        gym.register(f"ContinuousOddStrict{width.__name__.title()}-v0", Odd, max_episode_steps=20, kwargs=kwargs)
    for width in (np.int16, np.int32, np.uint8, np.uint64):
        kwargs = {"oddity": "plain", "dtype": width}
        gym.register(f"Odd{width.__name__.title()}-v0", Odd, max_episode_steps=20, kwargs=kwargs)
    gym.register("OddInt8-v0", Odd, max_episode_steps=20, kwargs={"dtype": np.int8})
    gym.register("OddStart-v0", Odd, max_episode_steps=20, kwargs={"start": 2})
    gym.register("GreyBytes-v0", Grey)
    gym.register("GreyFloats-v0", Grey, kwargs={"declared": np.float32})
    gym.register("GreyFirst-v0", Grey, kwargs={"shape": (3, 24, 32), "declared": np.float32})
    gym.register("GreyStack-v0", Grey, kwargs={"shape": (4, 210, 160), "declared": np.float32})
    gym.register("Refuses-v0", Refuses)
    gym.register("Needs-v0", Refuses, kwargs={"inner": "NoSuchInner-v0"})
    gym.register("Forks-v0", Forks, max_episode_steps=8)
    gym.register("Endless-v0", Endless, max_episode_steps=10**9)
    gym.register("Unlimited-v0", Endless)
    gym.register("ContinuousUnlimited-v0", OneStep, kwargs={"ending": None, "continuous": True})
    gym.register("TwoDimensional-v0", Strange, kwargs={"obs": gym.spaces.Box(-1, 1, (2, 2))})
    gym.register("TinyImage-v0", Strange, kwargs={"obs": gym.spaces.Box(0, 255, (2, 2, 3), np.uint8)})
    gym.register("ChannelsFirst-v0", Strange, kwargs={"obs": gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)})
    gym.register("Empty-v0", Strange, kwargs={"obs": gym.spaces.Box(0, 1, (0,))})
    gym.register("SequenceObs-v0", Strange, kwargs={"obs": gym.spaces.Sequence(gym.spaces.Discrete(2))})
    parts = {"place": gym.spaces.Discrete(3, start=-1), "speed": gym.spaces.Box(-2, 2, (2,), np.float64)}
    observed = {"Dict": gym.spaces.Dict(parts), "Tuple": gym.spaces.Tuple(parts.values()), "Place": parts["place"]}
    for kind, space in observed.items():
        gym.register(f"{kind}Obs-v0", Observes, max_episode_steps=20, kwargs={"obs": space})
        kwargs = {"obs": space, "action": gym.spaces.Box(-1, 1, (1,))}
        gym.register(f"Continuous{kind}Obs-v0", Observes, max_episode_steps=20, kwargs=kwargs)
    gym.register("OneAction-v0", Strange, kwargs={"action": gym.spaces.Discrete(1)})
    gym.register("ShiftedActions-v0", Strange, kwargs={"action": gym.spaces.Discrete(3, start=1)})
    gym.register("UnboundedBox-v0", Strange, kwargs={"action": gym.spaces.Box(-np.inf, np.inf, (1,))})
    gym.register("HalfBoundedBox-v0", Strange, kwargs={"action": gym.spaces.Box(np.float32([0]), np.float32([np.inf]))})
    gym.register("FlatBox-v0", Strange, kwargs={"action": gym.spaces.Box(np.float32([0.5]), np.float32([0.5]))})
    gym.register("ByteBox-v0", Strange, kwargs={"action": gym.spaces.Box(0, 9, (2,), np.uint8)})
    gym.register("MatrixBox-v0", Strange, kwargs={"action": gym.spaces.Box(-1, 1, (2, 2))})
    box = gym.spaces.Box(-1, 1, (1,))
    image = gym.spaces.Box(0, 255, (8, 8, 3), np.uint8)
    gym.register("ContinuousImage-v0", Strange, kwargs={"obs": image, "action": box})
    gym.register("MultiDiscrete-v0", Strange, kwargs={"action": gym.spaces.MultiDiscrete([2, 2])})


register()  # so that `--env-id tests.envs:Walk-v0` finds them
