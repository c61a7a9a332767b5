"""The losses of distillation beside cross-entropy: one module each, all of them in `table`."""
