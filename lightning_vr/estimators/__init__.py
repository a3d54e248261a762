"""Estimators of the diffusion loss: draws, targets and control variates, one file each."""
