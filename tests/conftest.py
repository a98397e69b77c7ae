"""The same surroundings for every test, whoever starts it where: in a batch job, under a launcher, on any screen."""

import os

#: Schedulers and launchers: a trainer would take its place in their job.
JOBS = ("SLURM_", "PMI_", "PMIX_", "OMPI_", "LSB_", "TORCHELASTIC_")
PROCESS = {"RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"}
PROCESS |= {"MASTER_ADDR", "MASTER_PORT"}
#: How wide a screen is, whether it has colours, and how much it is to be told.
SCREEN = {"COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "CLICOLOR_FORCE", "PY_COLORS", "GITHUB_ACTIONS"}
SCREEN |= {"HYDRA_FULL_ERROR", "PYTHONWARNINGS"}

for name in list(os.environ):
    if name.startswith(JOBS) or name in PROCESS | SCREEN:
        del os.environ[name]
# Before torch is imported. Toys' operators are too small for threads: with any other load on the machine they cost ten
# times the time.
os.environ["OMP_NUM_THREADS"] = "1"
