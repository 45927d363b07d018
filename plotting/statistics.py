"""The statistics of the figures, by SciPy: aggregates over tasks, stratified bootstrap intervals, performance profiles.

Everywhere, `samples` is one array a task with a score a run, (n,) each; n may differ between tasks. The bootstrap
resamples runs within each task and is seeded, so that a figure is the same twice. As in Agarwal et al. (2021), "Deep
Reinforcement Learning at the Edge of the Statistical Precipice".
"""

from collections.abc import Callable, Sequence

import numpy as np
import scipy.stats

RESAMPLES = 2000


def aggregate_mean(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
    """The mean over tasks of each task's mean over runs."""
    return np.mean([x.mean(axis=axis) for x in samples], axis=0)


def aggregate_median(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
    """The median over tasks of each task's mean over runs."""
    return np.median([x.mean(axis=axis) for x in samples], axis=0)


def aggregate_iqm(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
    """The mean of the middle half of all runs of all tasks, which weigh alike however many runs they have: with as many
    each it is the 25% trimmed mean."""
    weights = np.concatenate([np.full(x.shape[axis], 1 / (len(samples) * x.shape[axis])) for x in samples])
    runs = np.moveaxis(np.concatenate(samples, axis=axis), axis, -1)
    order = runs.argsort(axis=-1)
    runs, weights = np.take_along_axis(runs, order, -1), weights[order]
    cut = runs.shape[-1] // 4 / runs.shape[-1]
    ends = weights.cumsum(axis=-1)
    weights = ends.clip(cut, 1 - cut) - (ends - weights).clip(cut, 1 - cut)
    return (weights * runs).sum(axis=-1) / weights.sum(axis=-1)


AGGREGATES = {"mean": aggregate_mean, "IQM": aggregate_iqm, "median": aggregate_median}


def interval(samples: Sequence[np.ndarray], statistic: Callable) -> tuple[np.ndarray, np.ndarray]:
    """The 95% stratified percentile bootstrap interval of `statistic(*samples, axis)` along the last axis: low, high,
    of the shape of the other axes. NaN where a task has a single run, or one without a score."""
    if any(x.shape[-1] < 2 or np.isnan(x).any() for x in samples):
        return (np.full(samples[0].shape[:-1], np.nan),) * 2
    rng = np.random.default_rng(0)
    options = {"method": "percentile", "n_resamples": RESAMPLES, "vectorized": True, "axis": -1, "rng": rng}
    result = scipy.stats.bootstrap(tuple(samples), statistic, **options, batch=200)
    return result.confidence_interval.low, result.confidence_interval.high


def performance_profile(samples: Sequence[np.ndarray], thresholds: np.ndarray) -> np.ndarray:
    """For each threshold, (T,), the share of runs above it, averaged over tasks."""
    return aggregate_mean(*(x > thresholds[:, None] for x in samples))


def profile_interval(samples: Sequence[np.ndarray], thresholds: np.ndarray):
    """The pointwise 95% intervals of `performance_profile`, (T,) each."""
    return interval([(x > thresholds[:, None]).astype(float) for x in samples], aggregate_mean)


def normalise(summary) -> tuple[dict[str, dict[str, np.ndarray]], list[str]]:
    """{algorithm: {task: normalised scores (n,)}}, and the tasks left out, where SAC has no run or none above random.
    A score is (score - random) / (SAC's mean score - random), per task; random is the mean of all runs' warm-up
    episodes. Both are taken as known: the intervals leave out their own uncertainty."""
    scores, left_out = {}, []
    for task, rows in summary.groupby("task"):
        sac = rows.loc[rows["algorithm"] == "SAC", "score"]
        random = rows["random"].mean()
        if not sac.mean() > random:  # nor if there is none, or no warm-up
            left_out.append(task)
            continue
        for algorithm, group in rows.groupby("algorithm"):
            values = (group["score"].to_numpy() - random) / (sac.mean() - random)
            scores.setdefault(algorithm, {})[task] = values
    return scores, left_out
