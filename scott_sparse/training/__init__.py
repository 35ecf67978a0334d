"""Recipe, optimizer, checkpoints, log and monitor of a pretraining run."""
