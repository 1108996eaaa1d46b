"""Training helpers that need no Trainer: ranges, batch norm, distillation, oscillation, compilation, checkpoints."""
