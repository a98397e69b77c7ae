"""What runs: fine-tuning, generation, calibration, a workbench of many jobs, pre-training of the built-in base."""
