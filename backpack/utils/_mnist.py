"""The digits of MNIST: from the excerpt in the package, from files on disk, or from a verified download."""

from __future__ import annotations

import ast
import gzip
import math
import shutil
import zipfile
import zlib
from functools import cache
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path("data", "MNIST", "raw")  # where torchvision keeps the same files
MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "http://yann.lecun.com/exdb/mnist/",
)
MD5 = {  # of the gzipped files
    "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
}
TIMEOUT = 20.0  # seconds without a byte after which a mirror is given up


@cache
def shipped_digits() -> tuple[Tensor, Tensor]:
    """The excerpt in the package: images ``[1000, 28, 28]`` and labels ``[1000]``, both uint8.

    Every call returns the same tensors: do not write to them.
    """
    sample = files("backpack").joinpath("data", "mnist_sample.npz")
    with sample.open("rb") as file, zipfile.ZipFile(file) as npz:
        return _parse_npy(npz.read("images.npy")), _parse_npy(npz.read("labels.npy"))


def training_digits() -> tuple[Tensor, Tensor]:
    """The training set: images ``[60000, 28, 28]`` and labels ``[60000]``, both uint8.

    It is downloaded if it is not on disk.

    Raises:
        OSError: No mirror delivered a file.
        ModuleNotFoundError: A download is needed and pooch or tqdm is missing.
        ValueError: A file on disk is damaged.
    """
    images, labels = (_read_idx(_find(name) or _download(name)) for name in MD5)
    if len(images) != len(labels):
        raise ValueError(f"{FOLDER.resolve()} holds {len(images)} images, but {len(labels)} labels.")
    return images, labels


def _parse_npy(raw: bytes) -> Tensor:
    # numpy.load would do, but the package needs nothing beside torch
    end = 10 + int.from_bytes(raw[8:10], "little")
    header = ast.literal_eval(raw[10:end].decode("latin1"))
    if raw[:8] != b"\x93NUMPY\x01\x00" or header["descr"] != "|u1" or header["fortran_order"]:
        raise ValueError("Not a version 1.0 .npy array of uint8 in C order.")
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=end).reshape(header["shape"])


def _read_idx(path: Path) -> Tensor:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            raw = bytearray(file.read())
        start = 4 + 4 * raw[3]
        shape = [int.from_bytes(raw[i : i + 4], "big") for i in range(4, start, 4)]
        if raw[:3] != b"\0\0\x08" or len(raw) != start + math.prod(shape):
            raise ValueError(f"{len(raw)} bytes that are no idx array of unsigned bytes")
    except (ValueError, IndexError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        remedy = "Remove it to have it downloaded anew."
        raise ValueError(f"{path.resolve()} is damaged ({error}). {remedy}") from error
    return torch.frombuffer(raw, dtype=torch.uint8, offset=start).reshape(shape)


def _find(name: str) -> Path | None:
    return next((path for path in (FOLDER / name, FOLDER / f"{name}.gz") if path.is_file()), None)


def _download(name: str) -> Path:
    by_hand = (
        f"To do without, put {' and '.join(MD5)} (gzipped or not) into {FOLDER.resolve()}. "
        f"load_one_batch_mnist needs no download for up to {len(shipped_digits()[0])} digits."
    )
    target = FOLDER / f"{name}.gz"
    part = FOLDER / f"{name}.gz.part"
    failures = []
    for mirror in MIRRORS:
        again = True
        while again:
            resumed = part.exists()
            try:
                return _retrieve(mirror + target.name, f"md5:{MD5[name]}", target, part)
            except ModuleNotFoundError as error:
                how = "Downloading MNIST takes pooch and tqdm: pip install pooch tqdm."
                raise ModuleNotFoundError(f"{how} {by_hand}") from error
            except (OSError, ValueError) as error:  # ValueError: what pooch raises at a wrong checksum
                failures.append(f"  {mirror}{target.name}: {error}")
            # A wrong checksum may be the fault of bytes from another mirror. They are gone now: start afresh.
            again = resumed and not part.exists()
    raise OSError("\n".join([f"No mirror delivered {target.name}. {by_hand}", *failures]))


def _retrieve(url: str, checksum: str, target: Path, part: Path) -> Path:
    """Continue the download in ``part``, and make it ``target``, in one step, if its checksum is right."""
    import requests
    from pooch import retrieve
    from tqdm import tqdm

    def resume(url: str, verified_next: str, _: object) -> None:
        have = part.stat().st_size if part.exists() else 0
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
            if response.status_code != 416:  # 416: nothing is left to download
                response.raise_for_status()
                if not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                    have = 0
                total = have + int(response.headers.get("Content-Length", 0)) or None
                bar = tqdm(None, target.name, total, initial=have, unit="B", unit_scale=True, disable=None)
                with part.open("ab" if have else "wb") as file, bar:
                    for chunk in response.iter_content(1 << 16):
                        file.write(chunk)
                        bar.update(len(chunk))
        # A copy: another process that still writes to the part must not reach what has been verified.
        shutil.copyfile(part, verified_next)
        part.unlink()

    return Path(retrieve(url, checksum, target.name, target.parent, downloader=resume))
