"""A vehicle that must hold a narrow lane at speed, a small task of precise control: --env-id lane:NarrowLane-v0.

The lane is a ring. The vehicle is a kinematic bicycle, (x, y) its rear axle, psi its heading and v its speed:

    x' = v cos psi    y' = v sin psi    psi' = v tan(steering angle) / WHEELBASE    v' = acceleration

An action is held for DT. Its path is then an arc of radius WHEELBASE / tan(steering angle), so that a step is exact.
How precise the steering must be grows with the square of the speed: in one step an error of the angle moves the vehicle
sideways by v^2 DT^2 / (2 WHEELBASE) times that error.
"""

import gymnasium as gym
import numpy as np

RADIUS = 50.0  # of the lane's centre line, m
MARGIN = 0.5  # from the centre line to where the vehicle leaves the lane, m
WHEELBASE = 2.5  # m
STEERING = 0.5  # largest angle of the front wheels, rad
ACCELERATION = 4.0  # largest one, and braking, m / s^2
SPEED = 20.0  # largest one, m / s
DT = 0.1  # s


class NarrowLane(gym.Env):
    """Actions, (2,): the steering angle (left, which is inwards, is positive) and the acceleration, as fractions of
    the largest. Observations, (3,): distance from the centre line (m, outwards), heading relative to the lane's (rad,
    inwards) and v / SPEED. The reward is the speed along the lane / SPEED. Leaving the lane, by where the rear axle is
    at the end of a step, ends the episode and costs what would have been earned; an acceleration that would take v
    out of [0, SPEED] is cut to the one that takes it there."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": round(1 / DT)}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None):
        self.render_mode = render_mode
        high = np.array([MARGIN + SPEED * DT, np.pi, 1.0], np.float32)
        self.observation_space = gym.spaces.Box(high * np.array([-1, -1, 0], np.float32), high)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def observe(self) -> tuple[float, float, float]:
        heading = self.psi - np.arctan2(self.y, self.x) - np.pi / 2
        wrapped = (heading + np.pi) % (2 * np.pi) - np.pi
        return np.hypot(self.x, self.y) - RADIUS, wrapped, self.v / SPEED

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        offset, heading = self.np_random.uniform([-0.2, -0.02], [0.2, 0.02])
        self.x, self.y, self.psi, self.v = RADIUS + offset, 0.0, np.pi / 2 + heading, SPEED / 2
        return np.array(self.observe(), np.float32), {}

    def step(self, action):
        steering, throttle = np.clip(np.asarray(action, float), -1, 1)
        before, self.v = self.v, np.clip(self.v + throttle * ACCELERATION * DT, 0, SPEED)
        distance = (before + self.v) / 2 * DT
        turn = distance * np.tan(steering * STEERING) / WHEELBASE
        chord = distance * np.sinc(turn / 2 / np.pi)  # of the arc; NumPy's sinc has a pi in it
        self.x += chord * np.cos(self.psi + turn / 2)
        self.y += chord * np.sin(self.psi + turn / 2)
        self.psi += turn
        offset, heading, speed = self.observe()
        obs = np.array([offset, heading, speed], np.float32)
        return obs, float(speed * np.cos(heading)), bool(abs(offset) > MARGIN), False, {}

    def render(self) -> np.ndarray:
        """The 25.6 m around the vehicle from above, with the lane as wide as its 1.8 m and the margins need: (256, 256,
        3), of uint8."""
        across, up = np.meshgrid(np.arange(-128, 128) / 10, np.arange(128, -128, -1) / 10)  # m from the vehicle
        offset = np.hypot(self.x + across, self.y + up) - RADIUS
        along = RADIUS * np.arctan2(self.y + up, self.x + across)
        ahead = across * np.cos(self.psi) + up * np.sin(self.psi)
        aside = up * np.cos(self.psi) - across * np.sin(self.psi)
        picture = np.full((256, 256, 3), (88, 130, 80), np.uint8)
        picture[abs(offset) < MARGIN + 0.9] = (90, 90, 95)
        picture[(abs(offset) < 0.08) & (along % 4 < 2)] = (235, 235, 235)
        picture[(abs(ahead - 1.25) < 2.25) & (abs(aside) < 0.9)] = (200, 50, 40)
        return picture


gym.register("NarrowLane-v0", NarrowLane, max_episode_steps=200)
