"""Small random models with the bases made of them."""

import pytest
import saved_models

from nemo_tiedlora.huggingface.taken_over import take_over


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """``bases(name)`` → the folder and the base of a model of ``saved_models``, made once."""
    made = {}

    def base(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("model")
            saved_models.save(folder / "saved", name)
            take_over(folder / "saved", folder / "base.nemo")
            made[name] = folder / "saved", folder / "base.nemo"
        return made[name]

    return base
