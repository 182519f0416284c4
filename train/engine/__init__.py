"""What all training commands share: loop, run folder, checkpoints, logs, devices."""
