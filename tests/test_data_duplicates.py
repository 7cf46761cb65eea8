"Near duplicates through crops, turns and flips: each piece on planted truth, and a check that the truth can be missed."
import io

import numpy as np
import pytest
from PIL import Image

from cvops_wb.data import duplicates
from cvops_wb.data.duplicates import match_thumbs
from cvops_wb.data.near import candidates as search
from cvops_wb.data.near import checks, views
from cvops_wb.data.near.candidates import find_candidates, find_views, join_groups, match_hashes
from cvops_wb.data.near.checks import NEAR, measure_pairs
from cvops_wb.data.near.thumbs import draw_thumb, draw_thumbs, read_jpeg_size
from cvops_wb.data.near.views import hash_views, list_views, place_view

TRANSPOSES = [None, *Image.Transpose]
STRONG = {
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "upside down": lambda image: image.transpose(Image.Transpose.ROTATE_180),
    "lying": lambda image: image.transpose(Image.Transpose.ROTATE_90),
    "turned by 5 degrees": lambda image: image.rotate(5, Image.Resampling.BICUBIC),
    "corner cut": lambda image: image.crop((0, 0, round(.9*image.width), round(.9*image.height))),
    "stamped": lambda image: _stamp(image),
}


def _stamp(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.paste((200, 30, 60), (10, 10, 10 + image.width//8, 10 + image.height//8))
    return image


def save(image: Image.Image, quality: int = 85) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return out.getvalue()


@pytest.fixture(scope="module")
def photographs(grocery) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in sorted((grocery/"train").rglob("*.jpg"))[::50][:48]]


@pytest.mark.parametrize("transpose", TRANSPOSES)
def test_all_eight_orientations_have_one_hash(transpose, photographs):
    thumbs = [np.asarray(image.resize((32, 32))) for image in photographs]
    turned = [np.asarray(Image.fromarray(t) if transpose is None else Image.fromarray(t).transpose(transpose)) for t in thumbs]
    one, other = (np.unpackbits(hash_views(np.stack(pictures), 1)[0][:, 0], axis=1) for pictures in (thumbs, turned))
    assert (one != other).sum(1).max() <= 2     # a wave of nothing has no sign


@pytest.mark.parametrize("change, least", [*zip(STRONG, (1, 1, 1, .85, .7, .75), strict=True)])
def test_strong_changes_are_found(change, least, photographs):
    files = [save(image) for image in photographs] + [save(STRONG[change](image)) for image in photographs]
    pairs, half = match_thumbs(draw_thumbs(len(files), files.__getitem__), likeness=NEAR), len(photographs)
    right = (pairs.b - pairs.a) == half
    assert right.sum() >= least*half and (~right).sum() == 0


def test_one_hash_of_the_whole_would_miss_crops(photographs, monkeypatch):
    "Without the views most corners are lost: the test above does not pass by chance."
    monkeypatch.setattr(views, "list_views", lambda: np.array([(0, 0, 1, 0)], dtype=np.float32))
    files = [save(image) for image in photographs] + [save(image.crop((0, 0, image.width*3//4, image.height*3//4))) for image in photographs]
    views._waves.cache_clear()
    alone = len(match_thumbs(draw_thumbs(len(files), files.__getitem__), likeness=.8))
    monkeypatch.undo()
    views._waves.cache_clear()
    assert alone < len(match_thumbs(draw_thumbs(len(files), files.__getitem__), likeness=.8))


@pytest.mark.parametrize("bits, least", [(0, 1), (2, .99), (4, .9)])
def test_buckets_find_what_is_planted(bits, least):
    rng = np.random.default_rng(bits)
    hashes = rng.integers(0, 2**64, 30_000, dtype=np.uint64)
    for k in range(300): hashes[-1 - k] = hashes[k] ^ np.uint64(sum(1 << int(b) for b in rng.choice(64, bits, replace=False)))
    found = find_candidates([f"{h:016x}" for h in hashes], 8)
    got = {(a, b) for a, b, _ in found.tolist()}
    assert sum((k, len(hashes) - 1 - k) in got for k in range(300)) >= least*300
    exact = np.bitwise_count(hashes[found[:, 0]] ^ hashes[found[:, 1]])
    assert (exact == found[:, 2]).all() and (found[:, 2] <= 8).all() and (found[:, 0] < found[:, 1]).all()


def test_many_equal_pictures_make_one_group_and_few_pairs():
    hashes = np.zeros((5000, 8), dtype=np.uint8)
    matches = match_hashes(hashes, hashes, 4)
    assert len(matches) <= 5000*32*12 and (join_groups(5000, matches[:, :2].tolist()) == 0).all()


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_to_compare(count):
    assert match_thumbs(draw_thumbs(count, lambda place: b"no image")).empty


@pytest.fixture(scope="module")
def digits():
    "Handwriting on plain paper, and each of the first sixty saved again, smaller: files and labels."
    from sklearn.datasets import load_digits
    known = load_digits()
    pictures = [Image.fromarray((d*15.9).astype(np.uint8)).resize((96, 96), Image.Resampling.BICUBIC).convert("RGB") for d in known.images[:300]]
    again = [picture.resize((72, 72), Image.Resampling.BICUBIC) for picture in pictures[:60]]
    files = [save(picture, 90) for picture in pictures] + [save(picture, 60) for picture in again]
    return draw_thumbs(len(files), files.__getitem__), np.concatenate([known.target[:300], known.target[:60]])


def test_what_is_alike_by_nature_is_no_duplicate(digits):
    "Two sevens are two sevens; a seven that was saved again is found."
    thumbs, labels = digits
    pairs = match_thumbs(thumbs)
    found = {(a, b) for a, b in zip(pairs.a, pairs.b, strict=True)}
    assert len({(k, 300 + k) for k in range(60)} & found) >= 57
    assert len(found) <= 66 and (labels[pairs.a] == labels[pairs.b]).all()


def test_without_a_look_at_chance_it_would_be(digits, monkeypatch):
    monkeypatch.setattr(duplicates, "find_chance", lambda thumbs: -1.)
    pairs = match_thumbs(digits[0])
    assert (digits[1][pairs.a] != digits[1][pairs.b]).sum() > 20


@pytest.fixture(scope="module")
def candidates(photographs):
    "Pictures, and pairs of them in all views and turns, like or not."
    thumbs, rng = np.stack([np.asarray(image.resize((32, 32))) for image in photographs]), np.random.default_rng(0)
    return thumbs, np.stack([rng.integers(0, most, 300) for most in (len(thumbs), len(list_views()), 8, len(thumbs), 8, 13)], axis=1)


def lay_over(
    thumbs: np.ndarray,     # uint8 (N, 32, 32, 3)
    pairs: np.ndarray,      # (K, 6) from `find_views`
) -> tuple[np.ndarray, np.ndarray]:
    "The view of a and the picture b, both upright, each colour with mean zero, length one: float32 (K, S, S, 3)."
    one, other = thumbs[pairs[:, 0]].astype(np.float32), thumbs[pairs[:, 3]].astype(np.float32)
    for view in np.unique(pairs[:, 1]):
        here = np.flatnonzero(pairs[:, 1] == view)
        if view: one[here] = _draw_view(one[here], int(view))
    return _normalise(checks._upright(one, pairs[:, 2])), _normalise(checks._upright(other, pairs[:, 4]))


def _draw_view(pictures: np.ndarray, view: int) -> np.ndarray:
    places, weights = place_view(list_views()[view], pictures.shape[1])
    flat = pictures.reshape(len(pictures), -1, 3)
    return sum(flat[:, place]*weight[:, None] for place, weight in zip(places, weights, strict=True)).reshape(pictures.shape)


def _normalise(pictures: np.ndarray) -> np.ndarray:
    pictures = pictures - pictures.mean((1, 2), keepdims=True)     # of each colour: two piles of orange things are not alike
    return pictures/np.maximum(np.sqrt(np.einsum("kijc,kijc->k", pictures, pictures)), 1e-6)[:, None, None, None]


def explain(
    one: np.ndarray,        # (K, S, S, 3) with mean zero and length one
    other: np.ndarray,
) -> np.ndarray:
    "How much of the other picture this one explains when it is moved a little, -1…1: float32 (K,)."
    down, right = np.gradient(one, axis=(1, 2))
    side = one.shape[1]
    across = ((np.arange(side, dtype=np.float32) - (side - 1)/2)/(side/2))[:, None]
    along = across[:, :, None]
    parts = np.stack([one, right, down, right*across, down*along, right*along, down*across], axis=1).reshape(len(one), 7, -1)
    aim = other.reshape(len(one), -1, 1)
    gram = parts@parts.transpose(0, 2, 1) + np.diag([0, *[1e-4]*6]).astype(np.float32) + 1e-9*np.eye(7, dtype=np.float32)
    moved = np.linalg.solve(gram, parts@aim).transpose(0, 2, 1)@parts
    return (moved@aim)[:, 0, 0]/np.maximum(np.linalg.norm(moved, axis=2)[:, 0], 1e-6)


def explain_both(thumbs: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    one, other = lay_over(thumbs, pairs)
    return np.maximum(explain(one, other), explain(other, one))


def in_numpy(kernel: str, thumbs: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    "What the compiled kernels compute, said step by step."
    if kernel == "correlate": return np.einsum("kijc,kijc->k", *lay_over(thumbs, pairs))
    whole = np.where(np.arange(6) == 1, 0, pairs)
    return np.maximum(explain_both(thumbs, pairs), explain_both(thumbs, whole))


@pytest.mark.parametrize("kernel", ["correlate", "look_closer"])
@pytest.mark.parametrize("side", [16, 32])
def test_compiled_kernels_agree_with_numpy(kernel, side, candidates):
    thumbs, pairs = candidates
    small = thumbs.reshape(-1, side, 32//side, side, 32//side, 3).mean((2, 4), dtype=np.float32)
    got, want = measure_pairs(kernel, thumbs, pairs, side), in_numpy(kernel, small, pairs)
    assert abs(got - want).max() < 1e-4 and np.ptp(want) > .5
    planted = np.roll(pairs, 1, axis=0)     # another pair's answer is not near
    assert abs(got - in_numpy(kernel, small, planted)).max() > .1


def test_buckets_leave_out_what_a_hash_finds_of_itself():
    hashes = np.random.default_rng(0).integers(0, 4, (200, 8), dtype=np.uint8)
    every, strangers = (match_hashes(hashes, hashes.copy(), 6, own=own) for own in (0, 1))
    assert (strangers[:, 0] != strangers[:, 1]).all() and len(every) == len(strangers) + len(hashes)


def test_all_of_a_large_group_of_equal_hashes_are_joined():
    pairs = find_candidates(["f0f0f0f0f0f0f0f0"]*(search.ALL_PAIRS + 1))
    assert (join_groups(search.ALL_PAIRS + 1, pairs[:, :2].tolist()) == 0).all()


@pytest.mark.parametrize("size, turn", [((348, 300), 1), ((1000, 700), 6), ((90, 80), 1), ((2000, 1500), 8)])
def test_the_fast_decoder_sees_what_pillow_sees(size, turn, photographs):
    image, exif, out = photographs[0].resize(size), Image.Exif(), io.BytesIO()
    exif[0x112] = turn
    image.save(out, "JPEG", quality=90, exif=exif)
    assert read_jpeg_size(out.getvalue()) == size
    want = np.asarray(image.resize((32, 32), Image.Resampling.BOX)).astype(float)
    assert abs(draw_thumb(out.getvalue()) - want).mean() < 4
    assert read_jpeg_size(out.getvalue()[:30]) == read_jpeg_size(b"no image") == (0, 0)


def test_a_handful_of_ordinary_pictures_is_no_place_where_all_is_alike(grocery):
    "Small batches out of ordinary ones, of photographs and of boards: hardly any passes for a fixed camera, and a fixed camera does."
    from cvops_wb.data.near.checks import NEAR, find_chance
    rng, moved = np.random.default_rng(0), []
    for paths in (sorted((grocery/"train").rglob("*.jpg"))[::20], sorted((grocery.parent/"deeppcb"/"images").glob("*"))[::10]):
        thumbs = draw_thumbs(len(paths), lambda k, paths=paths: paths[k].read_bytes())
        wrong = [find_chance(thumbs[rng.permutation(len(thumbs))[:count]]) > NEAR for count in (4, 5, 6, 8, 12) for _ in range(20)]
        assert np.mean(wrong) <= .05, np.mean(wrong)
    for _ in range(40):
        picture, (y, x) = thumbs[0].copy(), rng.integers(0, 26, 2)
        picture[y:y + 6, x:x + 6] = rng.integers(0, 255, 3)
        moved.append(picture)
    assert all(find_chance(np.stack(moved)[rng.permutation(40)[:count]]) > NEAR for count in (12, 20, 40))


def test_a_doubtful_turn_is_tried_both_ways():
    "A picture whose lowest waves are nearly nothing turns over when it is made lighter: it is asked for in all four ways."
    rng, rows = np.random.default_rng(0), []
    cosines = np.cos(np.pi/32*np.arange(8)[:, None]*(np.arange(32) + .5))
    for _ in range(24):
        waves = rng.normal(size=(8, 8))
        waves[0, 0], waves[0, 1], waves[1, 0] = 0, 0, 4
        picture, slope = cosines.T@waves@cosines, 2*np.outer(cosines[0], cosines[1])
        rows += [120 + picture*30/picture.std() + slope, 120 + picture*30/picture.std() - slope]
    thumbs = np.repeat(np.stack(rows).clip(0, 255).astype(np.uint8)[..., None], 3, 3)
    pairs = {tuple(sorted(pair)) for pair in find_views(thumbs)[:, [0, 3]].tolist()}
    assert sum((2*k, 2*k + 1) in pairs for k in range(24)) == 24
