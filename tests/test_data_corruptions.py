"Corruptions: graded, repeatable, of the same kind; and they leave what they are given alone."
import numpy as np
import pytest

from cvops_wb.core.errors import UnknownName, WrongUsage
from cvops_wb.data import corrupt, list_corruptions

NAMES = ["blur", "bright", "cast", "dark", "dirt", "fog", "jpeg", "motion", "noise", "occlusion"]


@pytest.fixture(scope="module", params=[(48, 48), (97, 64), (350, 480)], ids=str)
def picture(request):
    "A photograph's stand-in: large shapes, edges and fine texture."
    (height, width), rng = request.param, np.random.default_rng(3)
    y, x = np.mgrid[:1:1j*height, :1:1j*width]
    waves = np.stack([np.sin(7*x + 3*y), np.cos(5*y), np.sin(40*x*y)], -1)*70 + 120
    return (waves + rng.normal(0, 9, waves.shape) + 40*((x - .5)**2 + (y - .5)**2 < .08)[..., None]).clip(0, 255).astype(np.uint8)


def change(picture, name, seed=0): return [np.abs(corrupt(picture, name, s, seed).astype(int) - picture).mean() for s in range(1, 6)]


def test_the_names_are_these(): assert list_corruptions() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_corruption_is_graded_and_repeatable(picture, name):
    before = picture.copy()
    spoiled = [corrupt(picture, name, s, seed=5) for s in range(1, 6)]
    assert all(s.shape == picture.shape and s.dtype == np.uint8 and s.flags.c_contiguous for s in spoiled)
    assert (picture == before).all()
    assert all((corrupt(picture, name, s, seed=5) == spoiled[s - 1]).all() for s in (1, 5))
    for seed in range(3):
        steps = change(picture, name, seed)
        assert steps[0] > 0 and all(b > a for a, b in zip(steps, steps[1:], strict=False)), steps


@pytest.mark.parametrize("name", ["cast", "dirt", "fog", "motion", "noise", "occlusion"])
def test_another_seed_is_another_accident(picture, name):
    assert (corrupt(picture, name, 3, seed=1) != corrupt(picture, name, 3, seed=2)).any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0, 255])
def test_flat_images_stay_in_range(name, value):
    assert corrupt(np.full((32, 40, 3), value, np.uint8), name, 5).shape == (32, 40, 3)


@pytest.mark.parametrize("name, severity, image, error", [
    ("fogg", 1, np.zeros((8, 8, 3), np.uint8), UnknownName), ("fog", 0, np.zeros((8, 8, 3), np.uint8), WrongUsage),
    ("fog", 6, np.zeros((8, 8, 3), np.uint8), WrongUsage), ("fog", 1, np.zeros((8, 8), np.uint8), WrongUsage),
    ("fog", 1, np.zeros((8, 8, 3), np.float32), WrongUsage), ("fog", 1, np.zeros((8, 8, 4), np.uint8), WrongUsage)])
def test_what_cannot_be_spoiled_is_refused(name, severity, image, error):
    with pytest.raises(error): corrupt(image, name, severity)
