"""Confidence intervals of scipy: BCa, of a mean, of the difference of paired means, and of a ratio
of sums, with the resamples that scipy drew.

    pip install scipy==1.17.1
    python tests/golden/make_bootstrap.py    # writes bootstrap.json
"""

import json
from pathlib import Path

import numpy as np
from scipy.stats import bootstrap

RESAMPLES = 199


def interval(data, statistic, seed):
    result = bootstrap(data, statistic, paired=True, vectorized=False, n_resamples=RESAMPLES, method="BCa",
                       confidence_level=0.95, rng=np.random.default_rng(seed))
    return [float(result.confidence_interval.low), float(result.confidence_interval.high)]


def main():
    random = np.random.default_rng(22)
    cases = []
    for seed, (units, shape) in enumerate([(5, 1.0), (12, 0.5), (16, 4.0), (30, 2.0)]):
        x = random.gamma(shape, size=units).round(6)
        y = (x + random.normal(scale=0.3, size=units) + 0.1).round(6) + 2.0
        # What scipy draws for paired samples: indices of units, all resamples at once.
        resamples = np.random.default_rng(seed).integers(0, units, (RESAMPLES, units))
        seen = []

        def mean(i):
            seen.append(i)
            return x[i].mean()

        indices = np.arange(units)
        cases.append({
            "x": x.tolist(),
            "y": y.tolist(),
            "resamples": resamples.tolist(),
            "mean": interval((indices,), mean, seed),
            "difference": interval((indices,), lambda i: x[i].mean() - y[i].mean(), seed),
            "ratio": interval((indices,), lambda i: x[i].sum() / y[i].sum(), seed),
        })
        drawn = [tuple(i) for i in seen if len(i) == units]
        assert all(tuple(row) in drawn for row in resamples), "scipy draws otherwise"
    path = Path(__file__).parent / "bootstrap.json"
    path.write_text(json.dumps({"cases": cases}, separators=(",", ":")) + "\n")


main()
