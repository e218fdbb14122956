"""Which pictures of a subject are mirrored against the rest.

Every pair of pictures is compared as it is and with one of the two mirrored. Which of the two fits better
is a vote that both have the same orientation, or opposite ones. One sign for each picture is then sought
that agrees with the votes as well as possible: synchronisation over Z2, here by the leading eigenvectors
of the matrix of votes (Singer 2011, "Angular synchronization by eigenvectors") and greedy flips.

Votes come from three places. Dense: gradient histograms and colours of a 96 x 96 patch around the face, or of
the middle, in 144 cells that may each move by one cell. A head that looks left resembles a mirrored one that
looks right, so cells are weighed by how well they agree with the signs found so far: the pose's cells do not,
a parting's or a scar's do. Free of pose, for faces: what differs between left and right half, without the few
directions in which it changes within the pictures of one person, whoever that is (turned heads, light from a
side; learned from twenty people, `assets/models/README.md`). Sparse: SIFT features (Lowe 2004), which are not the
same mirrored; they decide where rooms, things or writing come again.

Nothing absolute can be known from pictures alone: the larger group is taken for the right one. Confidences are
calibrated on photographs of the same twenty people; `tests/benchmarks/orientation.py` measures them on others.

Axes: N pictures, K cells, G cells along an edge, D features, M poses, H/W pixels, C channels (RGB).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import cv2
import numpy as np
import numpy.typing as npt

from trainer.errors import StopTraining
from trainer.files import REPOSITORY
from trainer.pictures.faces import Face

__all__ = ["FEWEST", "POSES", "Look", "Orientation", "compare", "differences", "look", "solve", "yaw"]

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

FEWEST = 4
"""Below this no majority says anything."""
MOST = 90
"""Pictures that are compared with each other; more are compared with these."""
SUSPECT = 0.75
"""Confidence from which a picture is named."""
TWO_GROUPS = 0.35
"""Share of pictures against the rest above which heads that look the other way are as likely a reason."""
CLEAR = 5.0
"""Standard deviations above what chance would give; below it the set is too symmetric to tell ..."""
EXPLAINED = 0.65
"""... as it is where the signs explain less of the votes: pictures of many things share a light or a horizon."""

PATCH_PX, CELL_PX, BINS = 96, 8, 8
GRID = PATCH_PX // CELL_PX
AROUND_FACE = 0.45
"""Face widths beside the face that still count: hair and its parting."""
MOVE_COST = 0.02

SIFT_EDGE_PX, SIFT_FEATURES = 480, 300
SIFT_PARTNERS = 24
"""Pictures of the core with which each of the others is compared by features."""
MATCHES = 5
"""Fewer features that agree are chance."""

POSES = REPOSITORY / "assets" / "models" / "poses.npy"
"""Directions of differences between left and right that pose and light make; float16, MD."""
TURNED = 4.6
"""How far a head is along the first of them that is turned by about 45 degrees (the 5 % most turned ones)."""
POSE_FREE = 3.0
"""How much these votes weigh against the cells'."""

BIAS, BY_AGREEMENT, BY_VOTES = -3.98, 4.41, 3.96
"""Log odds that a picture's sign is right: bias + a * agreement of the set + b * its own votes."""


@dataclass(frozen=True)
class Look:
    """What is compared of one picture, as it is and mirrored."""

    cells_KD: Floats
    mirrored_KD: Floats
    points: Floats
    """SIFT features: x, y, angle, size."""
    descriptors: Floats
    mirrored_points: Floats
    mirrored_descriptors: Floats
    is_face: bool = False
    """Whether the cells lie around a face."""

    def mirror(self) -> Look:
        """What `look` gives of the mirrored picture."""
        return Look(
            self.mirrored_KD,
            self.cells_KD,
            self.mirrored_points,
            self.mirrored_descriptors,
            self.points,
            self.descriptors,
            self.is_face,
        )


@dataclass(frozen=True)
class Orientation:
    """The answer for a set."""

    signs: tuple[int, ...]
    """1 like most, -1 mirrored against them."""
    confidences: tuple[float, ...]
    """That the sign of each picture is right, 0.5 to 0.99."""
    agreement: float
    """How far beyond chance the votes agree, in standard deviations."""
    explained: float = 0.0
    """How much of the votes the signs explain, 0 to 1."""

    @property
    def is_clear(self) -> bool:
        """Whether anything can be said at all."""
        return self.agreement >= CLEAR and self.explained >= EXPLAINED

    @property
    def in_two_groups(self) -> bool:
        """Whether nearly as many have the one orientation as the other."""
        return sum(sign < 0 for sign in self.signs) > TWO_GROUPS * len(self.signs)

    @property
    def suspects(self) -> list[int]:
        """Indices of the pictures that look mirrored, the surest first; none where nothing can be said."""
        if not self.is_clear or self.in_two_groups:
            return []
        found = [i for i, sign in enumerate(self.signs) if sign < 0 and self.confidences[i] >= SUSPECT]
        return sorted(found, key=lambda index: -self.confidences[index])

    @property
    def reference(self) -> int:
        """The picture whose orientation is surest to be that of most."""
        usual = [i for i, sign in enumerate(self.signs) if sign > 0]
        return max(usual, key=lambda index: self.confidences[index], default=0)

    def words(self) -> str:
        """The verdict in a sentence."""
        if not self.is_clear:
            return (
                "These pictures are too symmetric, or too different from each other, to tell whether one is "
                "mirrored: look at partings, moles, writing and watches yourself."
            )
        if self.in_two_groups:
            return (
                "The pictures fall into two groups of nearly the same size: mirrored, or with the head turned the "
                "other way. Which it is, only you can see."
            )
        count = len(self.suspects)
        if not count:
            return "No picture looks mirrored against the others."
        return f"{count} look{'s' if count == 1 else ''} mirrored against the others."


def look(pixels_HWC: Pixels, face: Face | None) -> Look:
    """Take from an upright picture what is compared.

    Args:
        pixels_HWC: RGB, a few hundred pixels long.
        face: Around which to look; None looks at the middle.
    """
    patch = _patch(pixels_HWC, face)
    mirrored = np.ascontiguousarray(pixels_HWC[:, ::-1])
    return Look(
        _cells(patch),
        _cells(np.ascontiguousarray(patch[:, ::-1])),
        *_sift(pixels_HWC),
        *_sift(mirrored),
        is_face=face is not None,
    )


def _patch(pixels_HWC: Pixels, face: Face | None) -> Pixels:
    height, width = pixels_HWC.shape[:2]
    side, x, y = float(min(height, width)), width / 2, height / 2
    if face is not None:
        wide, tall = (face.right - face.left) * width, (face.bottom - face.top) * height
        side = max(wide, tall) * (1 + 2 * AROUND_FACE)
        x, y = (face.left + face.right) / 2 * width, (face.top + face.bottom) / 2 * height
    scale = PATCH_PX / side
    small = pixels_HWC
    if scale < 0.5:  # warping alone would skip pixels
        size = max(1, round(width * scale * 2)), max(1, round(height * scale * 2))
        small = np.asarray(cv2.resize(pixels_HWC, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)
        x, y, scale = x * size[0] / width, y * size[1] / height, 0.5
    # Pixels lie half a step inside; without that, a mirrored picture would be cut a little elsewhere.
    edge = (PATCH_PX + scale - 1) / 2
    place = np.array([[scale, 0, edge - x * scale], [0, scale, edge - y * scale]])
    cut = cv2.warpAffine(
        small, place, (PATCH_PX, PATCH_PX), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    return np.asarray(cut, dtype=np.uint8)


def _cells(patch_HWC: Pixels) -> Floats:
    """Gradient histograms (Dalal and Triggs 2005, unsigned, linear votes) and mean colours of the cells."""
    lab = np.asarray(cv2.cvtColor(patch_HWC.astype(np.float32) / 255, cv2.COLOR_RGB2LAB), dtype=np.float32)
    light = np.ascontiguousarray(lab[:, :, 0])
    across, down = cv2.Sobel(light, cv2.CV_32F, 1, 0), cv2.Sobel(light, cv2.CV_32F, 0, 1)
    strength = np.hypot(across, down)
    place = (np.arctan2(down, across) % np.pi) / np.pi * BINS
    lower = np.floor(place).astype(np.intp)
    share = place - lower
    votes = np.zeros((PATCH_PX, PATCH_PX, BINS), np.float32)
    rows, columns = np.indices((PATCH_PX, PATCH_PX))
    votes[rows, columns, lower % BINS] += strength * (1 - share)
    votes[rows, columns, (lower + 1) % BINS] += strength * share
    cells = votes.reshape(GRID, CELL_PX, GRID, CELL_PX, BINS).mean(axis=(1, 3))
    norm = np.sqrt(cv2.blur((cells**2).sum(axis=-1), (3, 3))) + 2.0
    shapes = np.sqrt(cells / norm[..., None])
    colours = lab.reshape(GRID, CELL_PX, GRID, CELL_PX, 3).mean(axis=(1, 3))
    colours = (colours - colours.mean(axis=(0, 1))) / np.array([60, 40, 40], np.float32)
    return np.concatenate([shapes, colours], axis=-1).astype(np.float32)


def _sift(pixels_HWC: Pixels) -> tuple[Floats, Floats]:
    grey = cv2.cvtColor(pixels_HWC, cv2.COLOR_RGB2GRAY)
    scale = SIFT_EDGE_PX / max(grey.shape)
    if scale < 1:
        grey = cv2.resize(grey, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    finder = cv2.SIFT_create(SIFT_FEATURES, contrastThreshold=0.03)  # type: ignore[attr-defined]
    points, found = finder.detectAndCompute(grey, None)
    if found is None or len(points) < MATCHES:
        return np.zeros((0, 4), np.float32), np.zeros((0, 128), np.float32)
    # Root SIFT (Arandjelovic and Zisserman 2012): Hellinger's distance instead of Euclid's.
    rooted = np.sqrt(found / (found.sum(axis=1, keepdims=True) + 1e-6)).astype(np.float32)
    places = [(point.pt[0], point.pt[1], point.angle, point.size) for point in points]
    return np.array(places, np.float32), rooted


def _matches(one: tuple[Floats, Floats], other: tuple[Floats, Floats]) -> int:
    """Features of two pictures that agree on one shift, turn and scale."""
    if len(one[0]) < MATCHES or len(other[0]) < MATCHES:
        return 0
    alike = one[1] @ other[1].T
    best = alike.argmax(axis=1)
    first = alike[np.arange(len(best)), best]
    alike[np.arange(len(best)), best] = -1
    second = alike.max(axis=1)
    near = np.maximum(0, 2 - 2 * first) < 0.64 * np.maximum(0, 2 - 2 * second)  # Lowe's ratio of 0.8, squared
    turned = np.abs((one[0][:, 2] - other[0][best, 2] + 180) % 360 - 180)
    larger = one[0][:, 3] / other[0][best, 3]
    near &= (turned < 30) & (larger > 0.5) & (larger < 2)
    if near.sum() < 4:
        return 0
    here, there = one[0][near][:, :2], other[0][best[near]][:, :2]
    _, inside = cv2.estimateAffinePartial2D(
        np.ascontiguousarray(here), np.ascontiguousarray(there), ransacReprojThreshold=8, maxIters=200
    )
    return int(inside.sum()) if inside is not None else 0


# ---- votes ----------------------------------------------------------------------------------------------


def _cell_distances(one_NGGD: Floats, other_NGGD: Floats) -> Floats:
    """Of all pairs, cell by cell: the least over moves by up to one cell. NNK."""
    best: Floats = np.full((len(one_NGGD), len(other_NGGD), GRID, GRID), np.inf, np.float32)
    padded = np.pad(other_NGGD, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    squares = (one_NGGD**2).sum(axis=-1)
    for down in range(3):
        for across in range(3):
            moved = padded[:, down : down + GRID, across : across + GRID]
            both = np.einsum("nghd,mghd->nmgh", one_NGGD, moved, optimize=True)
            apart = (squares[:, None] + (moved**2).sum(axis=-1)[None] - 2 * both).astype(np.float32)
            np.minimum(best, apart + MOVE_COST * ((down - 1) ** 2 + (across - 1) ** 2), out=best)
    return best.reshape(len(one_NGGD), len(other_NGGD), -1)


def _dense_votes(rows: Sequence[Look], columns: Sequence[Look]) -> Floats:
    here, there = np.stack([item.cells_KD for item in rows]), np.stack([item.cells_KD for item in columns])
    mirrored = np.stack([item.mirrored_KD for item in columns])
    return _cell_distances(here, mirrored) - _cell_distances(here, there)


def differences(looks: Sequence[Look]) -> Floats:
    """What differs between the left and the right half, ND: the negative of it mirrored. 0 without a face."""
    found = [(one.cells_KD - one.mirrored_KD)[:, : GRID // 2].ravel() * one.is_face for one in looks]
    return np.stack(found).astype(np.float32)


@cache
def _poses() -> Floats:
    return np.asarray(np.load(POSES, allow_pickle=False), dtype=np.float32)


def _pose_free(looks: Sequence[Look]) -> Floats:
    """`differences` without what turned heads and light make of them."""
    found, poses_MD = differences(looks), _poses()
    return np.asarray(found - (found @ poses_MD.T) @ poses_MD, dtype=np.float32)


def yaw(pixels_HWC: Pixels, face: Face) -> float:
    """Where a face looks: -1 to the viewer's left, 0 straight, 1 to the right.

    By the first of the learned directions, in which turned heads differ from straight ones.

    Args:
        pixels_HWC: RGB, a few hundred pixels long.
        face: In it.
    """
    patch = _patch(pixels_HWC, face)
    difference_GGD = _cells(patch) - _cells(np.ascontiguousarray(patch[:, ::-1]))
    turned = float(difference_GGD[:, : GRID // 2].ravel() @ _poses()[0])
    return min(1.0, max(-1.0, turned / TURNED))


def _sparse_vote(one: Look, other: Look) -> float:
    same = _matches((one.points, one.descriptors), (other.points, other.descriptors))
    mirrored = _matches((one.points, one.descriptors), (other.mirrored_points, other.mirrored_descriptors))
    return math.log((same + 2) / (mirrored + 2)) if max(same, mirrored) >= MATCHES else 0.0


def _balanced(votes_NN: Floats) -> Floats:
    """Every picture's votes made equally strong."""
    size = np.sqrt((votes_NN**2).mean(axis=1)) + 1e-9
    return (votes_NN / np.sqrt(np.outer(size, size))).astype(np.float32)


def _signs(votes_NN: Floats) -> npt.NDArray[np.float64]:
    """Signs that agree with the votes as well as possible."""
    _, vectors = np.linalg.eigh(votes_NN.astype(np.float64))
    best: tuple[float, npt.NDArray[np.float64]] | None = None
    for place in range(1, min(4, len(votes_NN)) + 1):
        signs = np.where(vectors[:, -place] < 0, -1.0, 1.0)
        for _ in range(4 * len(signs)):
            gain = (votes_NN @ signs) * signs
            worst = int(gain.argmin())
            if gain[worst] >= 0:
                break
            signs[worst] = -signs[worst]
        score = float(signs @ votes_NN @ signs)
        if best is None or score > best[0]:
            best = score, signs
    assert best is not None
    return best[1]


def _agree(
    votes_NNK: Floats, sparse_NN: Floats, start: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], Floats, npt.NDArray[np.float64]]:
    """Signs, the votes that they were found on, and the weight of each cell, from first signs on."""
    size_K = np.sqrt((votes_NNK**2).sum(axis=(0, 1))) + 1e-6
    signs = start
    for _ in range(8):
        agreed_K = np.einsum("i,ijk,j->k", signs, votes_NNK, signs, optimize=True) / size_K
        weights_K = np.maximum(agreed_K, 0) ** 2
        weights_K /= weights_K.sum() + 1e-9
        weighted_NN = _balanced((votes_NNK / size_K) @ weights_K) + sparse_NN
        found = _signs(weighted_NN.astype(np.float32))
        if abs(found @ signs) == len(signs):
            break
        signs = found
    return signs, weighted_NN.astype(np.float32), weights_K / size_K


def _score(signs: npt.NDArray[np.float64], votes_NN: Floats) -> float:
    return float(signs @ votes_NN @ signs) / (float(np.linalg.norm(votes_NN)) * math.sqrt(len(signs)) + 1e-9)


def _best(
    votes_NNK: Floats, sparse_NN: Floats, starts: int
) -> tuple[npt.NDArray[np.float64], Floats, npt.NDArray[np.float64]]:
    first = _balanced(votes_NNK.sum(axis=-1)) + sparse_NN
    _, vectors = np.linalg.eigh(first.astype(np.float64))
    tries = [
        _agree(votes_NNK, sparse_NN, np.where(vectors[:, -place] < 0, -1.0, 1.0))
        for place in range(1, min(starts, len(first)) + 1)
    ]
    return max(tries, key=lambda found: _score(found[0], found[1]))


def solve(
    votes_NNK: Floats, sparse_NN: Floats, *, seed: int = 0, draws: int = 12
) -> tuple[Orientation, Floats]:
    """Signs from votes.

    Args:
        votes_NNK: For each pair and cell: above 0 for the same orientation. Symmetric, 0 on the diagonal.
        sparse_NN: The same from features, as log ratios, and free of pose; 0 where there are none.
        seed: Of the draws.
        draws: How often the signs of all votes are drawn anew to see what chance gives.

    Returns:
        The orientation, and the weight of each cell's votes.
    """
    signs, votes_NN, weights_K = _best(votes_NNK, sparse_NN, 4)
    score = _score(signs, votes_NN)
    rng = np.random.default_rng(seed)
    by_chance = []
    for _ in range(draws):
        drawn = np.triu(rng.choice(np.array([-1.0, 1.0], np.float32), sparse_NN.shape), 1)
        drawn += drawn.T
        chance_signs, chance_NN, _ = _best(votes_NNK * drawn[:, :, None], sparse_NN * drawn, 1)
        by_chance.append(_score(chance_signs, chance_NN))
    spread = max(float(np.std(by_chance)), 0.08)
    agreement = (score - float(np.mean(by_chance))) / spread
    if signs.sum() < 0:
        signs = -signs
    most = math.sqrt(len(signs) - 1)
    own = signs * (votes_NN @ signs) / (np.sqrt((votes_NN**2).sum(axis=1)) + 1e-9) / most
    orientation = Orientation(
        tuple(int(sign) for sign in signs),
        tuple(_confidence(score / most, float(value)) for value in own),
        agreement,
        score / most,
    )
    return orientation, weights_K.astype(np.float32)


def _confidence(explained: float, own: float) -> float:
    """Both 0 to 1: of all votes, and of the picture's own."""
    odds = BIAS + BY_AGREEMENT * explained + BY_VOTES * own
    return min(0.99, max(0.5, 1 / (1 + math.exp(-odds))))


def compare(
    looks: Sequence[Look],
    *,
    advance: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Orientation:
    """Find the pictures that are mirrored against the rest.

    Args:
        looks: One for each picture; the order does not matter.
        advance: Called with pictures compared and in all.
        stop: Asked between pictures.

    Raises:
        StopTraining: ``stop`` said so.
    """
    count = len(looks)
    if count < FEWEST:
        return Orientation((1,) * count, (0.5,) * count, 0.0)
    order = np.random.default_rng(0).permutation(count)
    core, rest = order[:MOST], order[MOST:]
    chosen = [looks[index] for index in core]
    votes_NNK = _dense_votes(chosen, chosen)
    votes_NNK = ((votes_NNK + votes_NNK.transpose(1, 0, 2)) / 2).astype(np.float32)
    votes_NNK[np.arange(len(core)), np.arange(len(core))] = 0
    sparse_NN = np.zeros((len(core), len(core)), np.float32)
    for place, one in enumerate(chosen):
        if stop():
            raise StopTraining
        for other in range(place):
            sparse_NN[place, other] = sparse_NN[other, place] = _sparse_vote(one, chosen[other])
        if advance is not None:
            advance(place + 1, count)
    differences_ND = _pose_free(chosen)
    free_NN = differences_ND @ differences_ND.T
    np.fill_diagonal(free_NN, 0)
    found, weights_K = solve(votes_NNK, sparse_NN + POSE_FREE * _balanced(free_NN))
    signs, confidences = np.zeros(count, int), np.zeros(count)
    signs[core], confidences[core] = found.signs, found.confidences
    core_signs = np.array(found.signs)
    for place, index in enumerate(rest):
        if stop():
            raise StopTraining
        one = looks[int(index)]
        votes_N = _dense_votes([one], chosen)[0] @ weights_K
        votes_N = (votes_N / (np.sqrt((votes_N**2).mean()) + 1e-9)).astype(np.float32)
        free_N = differences_ND @ _pose_free([one])[0]
        votes_N += POSE_FREE * free_N / (np.sqrt((free_N**2).mean()) + 1e-9)
        partners = np.random.default_rng(int(index)).choice(
            len(core), min(SIFT_PARTNERS, len(core)), replace=False
        )
        for partner in partners.tolist():
            votes_N[partner] += _sparse_vote(one, chosen[partner])
        own = float(votes_N @ core_signs) / (float(np.linalg.norm(votes_N)) + 1e-9) / math.sqrt(len(core))
        signs[index] = 1 if own >= 0 else -1
        confidences[index] = _confidence(found.explained, abs(own))
        if advance is not None:
            advance(len(core) + place + 1, count)
    return replace(
        found, signs=tuple(int(sign) for sign in signs), confidences=tuple(float(one) for one in confidences)
    )
