"""Where the faces are.

Built in: the Haar cascades that come with OpenCV (frontal and profile; Viola and Jones 2001). They find
upright faces in photographs, miss turned, covered and drawn ones, and now and then see one in a texture.
YuNet (Wu et al. 2023) finds far more and gives the eyes, nose and corners of the mouth; its file is 230 KB
and is used where it lies in the folder for models.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

__all__ = ["YUNET", "YUNET_URL", "Detector", "Face"]

Pixels = npt.NDArray[np.uint8]

YUNET = "face_detection_yunet_2023mar.onnx"
YUNET_URL = "https://github.com/opencv/opencv_zoo/raw/main/models/face_detection_yunet/face_detection_yunet_2023mar.onnx"

HAAR_EDGE_PX = 224
"""Longest edge that the cascade of faces seen from the front looks at: one of an eighth of the height is found."""
PROFILE_EDGE_PX = 128
"""The same for faces seen from the side, which is asked where there is none from the front, and asked twice."""
YUNET_EDGE_PX = 640
OVERLAP = 0.3
"""Two boxes with more of this in common are one face (intersection over union)."""


@dataclass(frozen=True)
class Face:
    """One face, in fractions of the picture's width and height."""

    left: float
    top: float
    right: float
    bottom: float
    score: float
    """YuNet's 0 to 1; for the cascades how many windows agreed, which only ranks."""
    yaw: float | None = None
    """Where it looks: -1 to the viewer's left, 0 straight, 1 to the right; None where the detector does not say."""

    @property
    def width(self) -> float:
        """Share of the picture's width."""
        return self.right - self.left


class Detector:
    """Finds faces; may be used from many threads.

    Args:
        models: Folder in which YuNet's file may lie.
    """

    def __init__(self, models: Path | None = None) -> None:
        file = models / YUNET if models is not None else None
        self._file = file if file is not None and file.is_file() else None
        self._own = threading.local()

    @property
    def name(self) -> str:
        """YuNet or Haar cascades: part of the key of what is remembered."""
        return "YuNet" if self._file else "Haar"

    def find(self, pixels_HWC: Pixels) -> list[Face]:
        """Faces in an upright RGB picture, the largest first."""
        found = self._yunet(pixels_HWC) if self._file else self._haar(pixels_HWC)
        kept: list[Face] = []
        for face in sorted(found, key=lambda face: -face.score):
            if all(_overlap(face, other) < OVERLAP for other in kept):
                kept.append(face)
        return sorted(kept, key=lambda face: -face.width)

    def _yunet(self, pixels_HWC: Pixels) -> list[Face]:
        image = _shrunk(pixels_HWC, YUNET_EDGE_PX)[:, :, ::-1]
        height, width = image.shape[:2]
        model = getattr(self._own, "yunet", None)
        if model is None:
            model = cv2.FaceDetectorYN.create(str(self._file), "", (width, height), 0.7, 0.3, 100)
            self._own.yunet = model
        model.setInputSize((width, height))
        _, rows = model.detect(np.ascontiguousarray(image))
        faces = []
        for row in rows if rows is not None else []:
            left, top, box_width, box_height = (float(value) for value in row[:4])
            eyes, nose = (row[4] + row[6]) / 2, row[8]
            span = max(abs(float(row[6] - row[4])), box_width / 8)
            yaw = float(np.clip((nose - eyes) / span * 2, -1, 1))
            faces.append(
                Face(
                    max(0.0, left / width),
                    max(0.0, top / height),
                    min(1.0, (left + box_width) / width),
                    min(1.0, (top + box_height) / height),
                    float(row[14]),
                    yaw,
                )
            )
        return faces

    def _haar(self, pixels_HWC: Pixels) -> list[Face]:
        grey = _evened(pixels_HWC, HAAR_EDGE_PX)
        frontal, profile = self._cascades()
        faces = [_face(grey, box, weight, None) for box, weight in _found(frontal, grey, 4, 1.25)]
        if not faces:  # the profile cascade is slower and surer of itself than it should be
            grey = _evened(pixels_HWC, PROFILE_EDGE_PX)
            mirrored = np.ascontiguousarray(grey[:, ::-1])
            width = grey.shape[1]
            faces = [_face(grey, box, weight, -1.0) for box, weight in _found(profile, grey, 6, 1.25)]
            for (left, top, box_width, box_height), weight in _found(profile, mirrored, 6, 1.25):
                box = (width - left - box_width, top, box_width, box_height)
                faces.append(_face(grey, box, weight, 1.0))
        return faces

    def _cascades(self) -> tuple[Any, Any]:
        found = getattr(self._own, "cascades", None)
        if found is None:
            found = tuple(cv2.CascadeClassifier(path) for path in _cascade_files())
            self._own.cascades = found
        return found[0], found[1]


@cache
def _cascade_files() -> tuple[str, str]:
    folder = Path(cv2.__file__).parent / "data"
    return str(folder / "haarcascade_frontalface_alt2.xml"), str(folder / "haarcascade_profileface.xml")


def _found(
    cascade: Any, grey: Pixels, neighbours: int, step: float
) -> list[tuple[tuple[int, int, int, int], float]]:
    smallest = max(20, min(grey.shape) // 9)  # the cascades' own window has 20
    boxes, _, weights = cascade.detectMultiScale3(
        grey, step, neighbours, minSize=(smallest, smallest), outputRejectLevels=True
    )
    return [
        ((int(box[0]), int(box[1]), int(box[2]), int(box[3])), float(weight))
        for box, weight in zip(boxes, weights, strict=True)
    ]


def _evened(pixels_HWC: Pixels, edge: int) -> Pixels:
    """Small, grey, with all brightnesses equally frequent."""
    small = cv2.cvtColor(_shrunk(pixels_HWC, edge), cv2.COLOR_RGB2GRAY)
    return np.asarray(cv2.equalizeHist(small), dtype=np.uint8)


def _face(grey: Pixels, box: tuple[int, int, int, int], score: float, yaw: float | None) -> Face:
    height, width = grey.shape
    left, top, box_width, box_height = box
    return Face(
        left / width, top / height, (left + box_width) / width, (top + box_height) / height, score, yaw
    )


def _shrunk(pixels_HWC: Pixels, edge: int) -> Pixels:
    height, width = pixels_HWC.shape[:2]
    scale = edge / max(height, width)
    if scale >= 1:
        return pixels_HWC
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(cv2.resize(pixels_HWC, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)


def _overlap(one: Face, other: Face) -> float:
    width = min(one.right, other.right) - max(one.left, other.left)
    height = min(one.bottom, other.bottom) - max(one.top, other.top)
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    areas = [(face.right - face.left) * (face.bottom - face.top) for face in (one, other)]
    return both / (sum(areas) - both)
