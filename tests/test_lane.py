"""The vehicle in its lane, against an integration of the continuous equations, closed forms and numbers by hand."""

from pathlib import Path

import gymnasium as gym
import imageio.v3
import numpy as np
import pytest
import scipy.integrate
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

from lane import NarrowLane

HOLD = np.arctan(2.5 / 50) / 0.5  # the steering whose circle is the lane's centre line: tan(angle) = wheelbase / radius


def vehicle(offset=0.0, heading=0.0, v=10.0):
    """The environment with its vehicle on the x axis, so far off the centre line and turned so far inwards."""
    env = NarrowLane()
    env.reset(seed=0)
    env.x, env.y, env.psi, env.v = 50 + offset, 0.0, np.pi / 2 + heading, v
    return env


@given(st.floats(-1, 1), st.floats(-1, 1), st.floats(0, 20), st.floats(-0.5, 0.5), st.floats(-1, 1))
@settings(max_examples=100, deadline=None)
def test_a_step_is_the_continuous_bicycle_integrated(steering, throttle, v, offset, heading):
    env = vehicle(offset, heading, v)
    acceleration = np.clip(v + 0.4 * throttle, 0, 20) - v  # of a tenth of a second, at 4 m/s^2

    def derivative(_, state):
        _, _, psi, speed = state
        turning = speed * np.tan(0.5 * steering) / 2.5
        return speed * np.cos(psi), speed * np.sin(psi), turning, acceleration / 0.1

    begin = [env.x, env.y, env.psi, v]
    end = scipy.integrate.solve_ivp(derivative, (0, 0.1), begin, rtol=1e-10, atol=1e-10, max_step=0.005).y[:, -1]
    obs, reward, terminated, truncated, _ = env.step([steering, throttle])
    np.testing.assert_allclose([env.x, env.y, env.psi, env.v], end, atol=1e-8)
    distance = np.linalg.norm(end[:2])
    along = np.array([-end[1], end[0]]) / distance  # the lane's direction there
    velocity = end[3] * np.array([np.cos(end[2]), np.sin(end[2])])
    assert obs[0] == pytest.approx(distance - 50, abs=1e-5)
    assert obs[2] == pytest.approx(end[3] / 20, abs=1e-6)
    assert end[3] * np.cos(obs[1]) == pytest.approx(velocity @ along, abs=1e-4)
    assert end[3] * np.sin(obs[1]) == pytest.approx(velocity @ -end[:2] / distance, abs=1e-4)  # inwards
    assert reward == pytest.approx(velocity @ along / 20, abs=1e-6)
    assert (terminated, truncated) == (abs(distance - 50) > 0.5, False)
    assert env.observation_space.contains(obs)


def test_constant_steering_is_a_circle_and_the_right_one_holds_the_lane_for_ever():
    env = vehicle()
    radius = 2.5 / np.tan(0.5 * 0.6)
    for _ in range(100):
        env.step([0.6, 1.0])
        assert np.hypot(env.x - (50 - radius), env.y) == pytest.approx(radius)
    env = gym.make("lane:NarrowLane-v0")
    env.reset(seed=0)
    env.unwrapped.x, env.unwrapped.psi = 50.0, np.pi / 2
    rewards, truncated = [], False
    while not truncated:
        obs, reward, terminated, truncated, _ = env.step(np.array([HOLD, 1.0], np.float32))
        assert not terminated
        assert abs(obs[0]) < 1e-3
        rewards.append(reward)
    assert len(rewards) == 200
    # from 10 m/s by 0.4 a step: 25 steps whose speeds sum up to 380 m/s, and 175 at 20 m/s
    assert sum(rewards) == pytest.approx(380 / 20 + 175, abs=1e-3)


def test_straight_on_leaves_the_lane_when_the_tangent_does():
    env = vehicle()
    for metres in range(1, 9):
        obs, reward, terminated, _, _ = env.step([0.0, 0.0])
        assert reward == pytest.approx(0.5 * 50 / np.hypot(50, metres))
        assert obs[0] == pytest.approx(np.hypot(50, metres) - 50, abs=1e-6)
        assert terminated == (metres == 8)  # 7 m on, it is 0.49 m off the centre line, and 0.64 m at 8 m


def test_what_is_harmless_at_a_third_of_the_speed_is_an_accident_at_full_speed():
    """A controller by hand, each action with noise of 0.1."""
    share = {}
    for target in (1 / 3, 1.0):
        rng, steps = np.random.default_rng(0), []
        for seed in range(20):
            env = gym.make("lane:NarrowLane-v0")
            (obs, _), done = env.reset(seed=seed), False
            while not done:
                offset, heading, v = obs
                pace = 20 * max(v, 0.1)
                curvature = 1 / 50 + 6 * offset / pace**2 - 3 * heading / pace
                action = np.array([np.arctan(2.5 * curvature) / 0.5, 5 * (target - v)]) + rng.normal(0, 0.1, 2)
                obs, _, terminated, truncated, _ = env.step(action.astype(np.float32))
                done = terminated or truncated
            steps.append(env.get_wrapper_attr("_elapsed_steps"))
        share[target] = np.mean(steps) / 200
    assert share[1 / 3] > 0.95
    assert share[1.0] < 0.25


def test_it_is_an_environment_of_gymnasium_seen_from_above():
    env = gym.make("lane:NarrowLane-v0", render_mode="rgb_array").unwrapped
    check_env(env)
    env.reset(seed=0)
    env.x, env.y, env.psi = 50.0, 0.0, np.pi / 2  # upwards, the ring's centre to the left
    first = env.render()
    assert (first.shape, first.dtype) == ((256, 256, 3), np.uint8)
    red = (first == (200, 50, 40)).all(axis=2)
    rows, columns = np.nonzero(red)
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (pytest.approx(45, abs=1), pytest.approx(18, abs=1))  # 0.1 m each
    assert rows.mean() < 128  # its rear axle is at the middle
    road = ~(first == (88, 130, 80)).all(axis=2)
    assert road[128].sum() == pytest.approx(28, abs=1)  # 1.4 m to each side
    assert road[:, 128 - 20].any()  # the lane bends to the left
    assert not road[:, 128 + 20].any()
    env.step([HOLD, 0.0])
    assert (env.render() != first).any()


def test_a_script_trains_on_it_and_films_it(run_script):
    flags = ["--env-id", "lane:NarrowLane-v0", "--total-timesteps", 150, "--learning-starts", 100, "--eval-episodes", 1]
    code, _, err = run_script("sac_continuous", *flags, "--no-compile", "--capture-video", "--run-name", "lane")
    assert code == 0, err
    frames = imageio.v3.imread(next(Path("runs/lane/videos/eval").glob("*-episode-0.mp4")))
    assert frames.shape[1:] == (256, 256, 3)
    assert len(frames) > 2
    red, green = frames[0, 116, 128, :2].astype(int)  # the vehicle is in the middle
    assert red > green + 50
