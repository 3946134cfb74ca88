"""What a run stands on: device, processes, folder, checkpoints, signals and the faults of the machine."""
