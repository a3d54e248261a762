"""Preparing candidates, so that they are measured as they would be in the middle of training.

Targets get their references, encoded once. Proposals see batches until they have learned: one that
has seen nothing is the base density. ``resamples="auto"`` gets the K that its own pilot chooses
here, as it would in training. Control variates are fitted by pilots on separate batches.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

from lightning.pytorch import Trainer

from lightning_vr.auditing.candidates import Candidate
from lightning_vr.core.types import Clean
from lightning_vr.estimators.carv import CARV
from lightning_vr.estimators.draws import Draws
from lightning_vr.estimators.proposals import LearnedProposal
from lightning_vr.estimators.stf import STF
from lightning_vr.estimators.targets import Target
from lightning_vr.estimators.taylor.control_variate import TaylorCV
from lightning_vr.lifecycle.run_context import RunContext
from lightning_vr.lifecycle.training_set import check_equal_chances
from lightning_vr.posterior.sharded_references import Bank
from lightning_vr.training.control_measurement import ControlMeasurement
from lightning_vr.training.control_pilot import describe_gate
from lightning_vr.training.estimator_module import EstimatorModule
from lightning_vr.training.module import DiffusionModule
from lightning_vr.training.noisy_losses import DrawnLoss
from lightning_vr.training.reference_bank import (
    compare_by_reading_again,
    map_references,
    read_references,
    set_references,
)
from lightning_vr.training.training_checks import check_derivatives
from lightning_vr.variance.gradient_measurement import Source

Kind: TypeAlias = tuple[bool, str]
"""Whether a bank is sharded, and its dtype."""

_LEAST_SEEN = 16
"""Draws that each bin of a learned proposal must have had: twice as many as make it leave p."""

_PILOTS = 6
"""Pilots that fit a control variate: in training their memory is about as long."""

_LEAST_BATCHES = 8
_MOST_BATCHES = 100
"""Batches after which a proposal with the default memory of 100 steps changes little."""

_PATIENCE = 512
"""Batches after which bins without draws are given up."""


def with_own_state(candidates: list[Candidate]) -> list[Candidate]:
    """Return copies that may learn, so that the caller's candidates stay as they are."""
    return [
        replace(
            c,
            draws=copy.deepcopy(c.draws),
            control_variate=copy.deepcopy(c.control_variate),
        )
        for c in candidates
    ]


def own_copies(module: EstimatorModule) -> Candidate:
    """Return copies of those of a module's slots that learn: its own must not learn in an audit."""
    learning = {"draws", "control_variate"} & set(module.estimator_slots)
    return Candidate("own", **{name: copy.deepcopy(getattr(module, name)) for name in learning})


def fill_targets(
    trainer: Trainer, module: DiffusionModule, candidates: list[Candidate]
) -> dict[str, str]:
    """Give targets their references, encoded once.

    Returns:
        Names of candidates that cannot have any, and why.
    """
    needs = [c for c in candidates if c.target is not None and c.target.bank_size != 0]
    try:
        check_equal_chances(trainer)
    except ValueError:
        return {c.name: "training samples do not come equally often" for c in needs}

    skipped: dict[str, str] = {}
    data: dict[Kind, Clean | None] = {}
    banks: dict[Kind, Bank] = {}
    for candidate in sorted(needs, key=lambda c: c.target is not None and c.target.sharded):
        assert candidate.target is not None
        if isinstance(candidate.target, STF) and candidate.target.storage == "data":
            map_references(module, trainer, candidate.target)
            continue
        kind = _kind(candidate.target)
        if kind not in data:
            data[kind] = read_references(module, trainer, target=candidate.target)
        reason = _fill(candidate.target, data[kind], banks)
        is_unindexed = reason is None and getattr(data[kind], "index", None) is None
        if is_unindexed and isinstance(candidate.target, STF):
            compare_by_reading_again(module, trainer, candidate.target)
        if reason is not None:
            skipped[candidate.name] = reason
    return skipped


def _kind(target: Target) -> Kind:
    """Return what targets with the same bank have in common."""
    return target.sharded, target.dtype if isinstance(target, STF) else "float32"


def _fill(target: Target, data: Clean | None, banks: dict[Kind, Bank]) -> str | None:
    """Give a target its references, prepared once for all STFs; return why it cannot have any."""
    if data is None:
        return "samples have a condition beyond class labels"
    if data.index is None and getattr(target, "references", None) == "all":
        return "batches carry no sample indices"
    if isinstance(target, STF) and _kind(target) in banks:
        target.set_bank(banks[_kind(target)], indexed=data.index is not None)
        return None
    set_references(target, data)
    if isinstance(target, STF) and target.bank is not None:
        banks[_kind(target)] = target.bank
    return None


def refused(module: EstimatorModule, candidates: list[Candidate]) -> dict[str, str]:
    """Return names of candidates that do not fit the module, and why."""
    reasons = {}
    for candidate in candidates:
        try:
            with candidate.in_place(module):
                module.check_slots()
        except ValueError as error:
            reasons[candidate.name] = str(error).rstrip(".")
    return reasons


def learn(
    loss: DrawnLoss,
    candidates: list[Candidate],
    batches: Iterator[Clean],
    source: Source,
    goes_on: Callable[[], bool],
) -> dict[str, str]:
    """Let draws learn from forward passes, as they would in training; all ranks must call it.

    The module's own draws learn only if their proposal has not seen enough yet.

    Args:
        loss: The module's loss.
        candidates: Those of the audit; one without draws has the module's own.
        batches: An endless stream of encoded batches.
        source: Gives generators by key.
        goes_on: Asked before each further batch once all proposals have seen enough.

    Returns:
        Names of candidates whose proposal could not see enough, and why.
    """
    module = loss.module
    own = [c for c in candidates if c.draws is None][:1] if not _has_learned(module.draws) else []
    learners = own + [c for c in candidates if c.draws is not None and _learns(c.draws)]
    number = 0
    while learners:
        cold = [c for c in learners if not _has_learned(c.draws or module.draws)]
        is_done = number >= _LEAST_BATCHES and not (cold or goes_on())
        if is_done or number >= (_PATIENCE if cold else _MOST_BATCHES):
            reason = f"its proposal saw too little in {number} batches"
            return {c.name: reason for c in cold if c.draws is not None}
        clean = next(batches)
        for candidate in learners:
            with candidate.in_place(module):
                loss.observe(clean, source("learn", number))
                module.draws.advance()
        number += 1
    return {}


def choose_resamples(
    trainer: Trainer, module: EstimatorModule, candidates: list[Candidate], batches: Iterator[Any]
) -> dict[str, str]:
    """Let the pilots of ``resamples="auto"`` choose K if they have not yet; all ranks must call it.

    Args:
        trainer: A trainer that is about to train.
        module: Its module.
        candidates: Those of the audit, the current estimator first.
        batches: An endless stream of batches.

    Returns:
        Names of candidates whose pilot found no K, and why.
    """
    # what a pilot finds here is not of the run that loggers show
    run = replace(RunContext.of(trainer), log=lambda *_: None)
    reasons = {}
    for candidate in candidates:
        with candidate.in_place(module):
            pilot = module.make_resamples_pilot(run)
            while pilot is not None and pilot.draws.pilot is None and not pilot.failures:
                with trainer.precision_plugin.forward_context():
                    pilot.before_step(next(batches))
        if pilot is not None and pilot.failures and candidate.draws is not None:
            reasons[candidate.name] = "gradients are not finite"
    return reasons


def fit_control_variates(
    module: DiffusionModule,
    run: RunContext,
    candidates: list[Candidate],
    batches: Iterator[Any],
    encode: Callable[[Any], Clean],
    source: Source,
) -> dict[str, str]:
    """Fit control variates that training has not fitted yet; all ranks must call it.

    Args:
        module: The module.
        run: The run of a trainer that is about to train.
        candidates: Those of the audit; one without a control variate has the module's own.
        batches: An endless stream of batches.
        encode: Turns a batch into samples.
        source: Gives generators by key.

    Returns:
        Names of candidates that cannot run or whose gate stays closed, and why.
    """
    reasons = {}
    for candidate in candidates:
        with candidate.in_place(module):
            control = module.control_variate
            if not isinstance(control, TaylorCV):
                continue
            try:
                check_derivatives(module, run, encode(next(batches)))
            except ValueError as error:
                reasons[candidate.name] = str(error).rstrip(".")
                continue
            if not control.is_fixed and not (control.pilot and control.pilot["count"]):
                _fit(ControlMeasurement(module, control, run), batches, encode, source)
            if candidate.control_variate is not None and control.is_closed:
                reasons[candidate.name] = describe_gate(module, control).rstrip(".")
    return reasons


def _fit(
    measurement: ControlMeasurement,
    batches: Iterator[Any],
    encode: Callable[[Any], Clean],
    source: Source,
) -> None:
    control, batch = measurement.control, next(batches)
    if control.gate == "auto":
        times = partial(source, "control variate", "timing")
        control.fit.cost, *_ = measurement.cost(encode(batch), lambda: encode(batch), times)
    for number in range(_PILOTS):
        found = measurement.measure(
            encode(next(batches)), partial(source, "control variate", number)
        )
        control.fit.add(found)


def least_draws(draws: Draws) -> int:
    """Return how many draws of a sample come together: 2 in antithetic pairs."""
    return draws.least_resamples if isinstance(draws, CARV) else 1


def _learns(draws: Draws) -> bool:
    return any(isinstance(part, LearnedProposal) for part in draws.modules())


def _has_learned(draws: Draws) -> bool:
    tables = [p.table for p in draws.modules() if isinstance(p, LearnedProposal)]
    return all(float(table[2].min()) >= _LEAST_SEEN for table in tables)
