from nemo_fixtures import files, finetuning, host  # noqa: F401
