"""Rates from races: nanoseconds of each term such that predicted times are near measured ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import log

import numpy as np
from scipy.optimize import least_squares

from cnnlstm_fast.planning import costs

#: Gives the seconds since some moment.
Clock = Callable[[], float]
#: Weight of the prior: a term that few races have stays near it.
_PRIOR = 0.05
#: Nanoseconds of a term that nothing is known of.
_NOTHING = 1e-9
#: Share of the races that pay less for a term that only some of them pay.
_PAID = 0.75
#: Logarithm of predicted over measured beyond which a race counts less: somebody disturbed it.
_SURPRISE = 0.2


def fit(
    rows: Iterable[tuple[Mapping[str, float], float]],
    prior: Mapping[str, float],
) -> dict[str, float]:
    """Rates such that counts times rates are near measured nanoseconds.

    Args:
        rows: counts by term, and nanoseconds.
        prior: rates to begin at, also for terms that no row has.
    """
    rows = list(rows)
    if not rows:
        return dict(prior)
    terms = sorted({term for counts, _ in rows for term in counts} | set(prior))
    counted = np.array([[counts.get(term, 0.0) for term in terms] for counts, _ in rows])
    measured = np.array([ns for _, ns in rows])
    share = counted / measured[:, None]
    start = np.empty(len(terms))
    for i, term in enumerate(terms):
        present = share[:, i][share[:, i] > 0]
        alone = 1 / (6 * np.quantile(present, 0.9)) if len(present) else _NOTHING
        start[i] = log(prior.get(term) or alone)

    def residuals(logs: np.ndarray) -> np.ndarray:
        return np.concatenate([np.log(counted @ np.exp(logs) / measured), _PRIOR * (logs - start)])

    def jacobian(logs: np.ndarray) -> np.ndarray:
        parts = counted * np.exp(logs)
        return np.concatenate([parts / parts.sum(1, keepdims=True), _PRIOR * np.eye(len(terms))])

    found = least_squares(residuals, start, jacobian, loss="soft_l1", f_scale=_SURPRISE, max_nfev=200)
    rates = dict(zip(terms, np.exp(found.x), strict=True))
    for term in costs.FEARED:
        paid = [ns / counts[term] for counts, ns in rows if counts.get(term)]
        if paid:
            rates[term] = max(rates[term], np.quantile(paid, _PAID))
    return {term: float(f"{rate:.4g}") for term, rate in rates.items()}
