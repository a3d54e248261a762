"""Taylor control variates: terms of the polynomial, coefficients, forward-mode derivatives."""

from lightning_vr.estimators.taylor.control_variate import TaylorCV

__all__ = ["TaylorCV"]
