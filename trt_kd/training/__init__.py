"""Training: the objective, ModelOpt's trainer under it, checkpoints that survive a kill."""
