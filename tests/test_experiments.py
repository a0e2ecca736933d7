"""What notebooks measure to explain a method, against the method itself."""

import pytest
import torch

from lib.papers.slicegpt import slice_model
from lib.suite.experiments import principal_angles
from tests.conftest import LAYERS, tiny, token_ids


@pytest.mark.usefixtures("exact_norms")
def test_principal_angles_against_the_shortcuts():
    model = tiny("llama")
    angles = principal_angles(model, token_ids(), 0.25)
    sliced = slice_model(model, token_ids(), 0.25, layout="dense", slice_head=True)
    shortcuts = [module.shortcut for module in sliced.modules() if getattr(module, "shortcut", None) is not None]
    assert angles.shape == (2 * LAYERS, 24)
    for found, shortcut in zip(angles, shortcuts, strict=True):
        cosines = torch.linalg.svdvals(shortcut.detach())
        assert torch.allclose(torch.cos(torch.deg2rad(found)), cosines, atol=1e-10)
        assert (found[:16] < 1e-5).all()  # two subspaces of 24 in 32 dimensions share at least 16
