"""`backpack.utils.examples`: the digits, where they come from, and the reference diagonal."""

import gzip
import hashlib
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call
from torch.testing import assert_close

from backpack.utils import _mnist
from backpack.utils.examples import (
    autograd_diag_ggn_exact,
    get_mnist_dataloader,
    load_mnist_dataset,
    load_one_batch_mnist,
)

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
COUNT = 1200  # more than are shipped


def idx_file(array: np.ndarray) -> bytes:
    shape = b"".join(n.to_bytes(4, "big") for n in array.shape)
    return bytes([0, 0, 8, array.ndim]) + shape + array.tobytes()


@pytest.fixture(scope="module")
def digits():
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(COUNT, 28, 28), dtype=np.uint8)
    return {IMAGES: images, LABELS: rng.integers(10, size=COUNT, dtype=np.uint8)}


@pytest.fixture(scope="module")
def archives(digits):
    return {name: gzip.compress(idx_file(array), 1, mtime=0) for name, array in digits.items()}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the files belong, below a fresh working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data" / "MNIST" / "raw"


def normalized(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(((images / 255 - 0.1307) / 0.3081).astype(np.float32)).unsqueeze(1)


def assert_holds(dataset, digits):
    X, y = dataset[:]
    assert_close(X, normalized(digits[IMAGES]))
    assert_close(y, torch.from_numpy(digits[LABELS]).long())


# the shipped digits


@pytest.fixture(scope="module")
def shipped():
    with np.load(str(files("backpack") / "data" / "mnist_sample.npz")) as npz:
        return npz["images"], npz["labels"]


def test_every_class_is_shipped_a_hundred_times_and_its_notice_with_it(shipped):
    _, y = load_one_batch_mnist(1000)
    assert y.bincount().tolist() == [100] * 10
    assert "ShareAlike" in (files("backpack") / "data" / "NOTICE.md").read_text()


def test_an_unshuffled_batch_is_the_first_shipped_digits_normalized(shipped):
    images, labels = shipped
    X, y = load_one_batch_mnist(17, shuffle=False)
    assert (X.shape, X.dtype, y.dtype) == ((17, 1, 28, 28), torch.float32, torch.int64)
    assert_close(X, normalized(images[:17]))
    assert y.tolist() == labels[:17].tolist()


def test_a_flat_batch_holds_the_same_digits_as_rows():
    X, y = load_one_batch_mnist(5, shuffle=False)
    X_flat, y_flat = load_one_batch_mnist(5, shuffle=False, flat=True)
    assert torch.equal(X_flat, X.reshape(5, 784)) and torch.equal(y_flat, y)


def test_shuffling_follows_the_global_generator():
    def batch(seed):
        torch.manual_seed(seed)
        return load_one_batch_mnist(64)

    (X, y), (X_again, y_again), (X_other, _) = batch(0), batch(0), batch(1)
    assert torch.equal(X, X_again) and torch.equal(y, y_again) and not torch.equal(X, X_other)


def test_a_shuffled_batch_repeats_no_digit_and_keeps_its_label(shipped):
    label_of = dict(zip(map(bytes, shipped[0]), shipped[1], strict=True))
    X, y = load_one_batch_mnist(1000)
    pixels = ((X * 0.3081 + 0.1307) * 255).round().to(torch.uint8)
    assert len(label_of) == len({bytes(x.numpy()) for x in pixels}) == 1000
    assert all(label_of[bytes(x.numpy())] == label for x, label in zip(pixels, y, strict=True))


def test_writing_to_a_batch_leaves_the_next_one_alone():
    X, y = load_one_batch_mnist(3, shuffle=False)
    expected = X.clone(), y.clone()
    X.zero_(), y.zero_()
    assert_close(load_one_batch_mnist(3, shuffle=False), expected)


def test_reading_the_shipped_digits_takes_neither_numpy_nor_the_download_extra(monkeypatch):
    for name in ("numpy", "pooch", "tqdm", "requests"):
        monkeypatch.setitem(sys.modules, name, None)
    _mnist.shipped_digits.cache_clear()
    assert load_one_batch_mnist(2)[1].shape == (2,)


@pytest.mark.parametrize("batch_size", [0, -1, COUNT + 1])
def test_a_batch_size_that_cannot_be_served_is_refused(batch_size, folder, archives):
    put(folder, archives)
    with pytest.raises(ValueError, match=f"batch_size.*got {batch_size}"):
        load_one_batch_mnist(batch_size)


# files on disk


def put(folder: Path, archives: dict[str, bytes], gzipped: bool = True) -> None:
    folder.mkdir(parents=True)
    for name, archive in archives.items():
        if gzipped:
            (folder / f"{name}.gz").write_bytes(archive)
        else:
            (folder / name).write_bytes(gzip.decompress(archive))


@pytest.mark.parametrize("gzipped", [True, False])
def test_files_on_disk_are_read_gzipped_or_not(gzipped, folder, archives, digits, monkeypatch):
    monkeypatch.setattr(_mnist, "MIRRORS", ())
    put(folder, archives, gzipped)
    dataset = load_mnist_dataset()
    assert len(dataset) == COUNT
    assert_holds(dataset, digits)


def test_a_data_loader_walks_through_all_digits(folder, archives, digits):
    put(folder, archives)
    batches = list(get_mnist_dataloader(batch_size=500, shuffle=False))
    assert [len(y) for _, y in batches] == [500, 500, 200]
    assert torch.cat([y for _, y in batches]).tolist() == digits[LABELS].tolist()
    shuffled = torch.cat([y for _, y in get_mnist_dataloader(batch_size=500)])
    assert shuffled.bincount().tolist() == np.bincount(digits[LABELS]).tolist()
    assert shuffled.tolist() != digits[LABELS].tolist()


def test_more_digits_than_are_shipped_come_from_the_full_set(folder, archives, digits):
    put(folder, archives)
    X, y = load_one_batch_mnist(1001, shuffle=False, flat=True)
    assert_close(X, normalized(digits[IMAGES])[:1001].flatten(1))
    assert y.tolist() == digits[LABELS][:1001].tolist()


@pytest.mark.parametrize("gzipped", [True, False])
@pytest.mark.parametrize("kept", [slice(-9), slice(200), slice(9, None), slice(0)])
def test_a_damaged_file_is_named_and_left_alone(kept, gzipped, folder, archives):
    put(folder, archives, gzipped)
    path = folder / (f"{IMAGES}.gz" if gzipped else IMAGES)
    path.write_bytes(damaged := path.read_bytes()[kept])
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} is damaged .*Remove it"):
        load_mnist_dataset()
    assert path.read_bytes() == damaged


def test_images_and_labels_of_different_number_are_refused(folder, archives):
    put(folder, {**archives, LABELS: gzip.compress(idx_file(np.zeros(3, np.uint8)))})
    with pytest.raises(ValueError, match="1200 images, but 3 labels"):
        load_mnist_dataset()


# download


class Mirrors(ThreadingHTTPServer):
    """Mirrors of the archives, each in a folder that says how it behaves.

    fails, stalls, truncates, corrupts: as they say. whole: sends all there is, whatever part is asked for.
    ranges: sends what is asked for.
    """

    def __init__(self, archives: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), MirrorsHandler)
        self.archives = archives
        self.requests: list[tuple[str, str, str | None]] = []
        self.closing = threading.Event()

    def urls(self, *behaviours: str) -> tuple[str, ...]:
        return tuple(f"http://127.0.0.1:{self.server_port}/{behaviour}/" for behaviour in behaviours)


class MirrorsHandler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        _, behaviour, name = self.path.split("/")
        wanted = self.headers["Range"]
        self.server.requests.append((behaviour, name.removesuffix(".gz"), wanted))
        body = self.server.archives[name.removesuffix(".gz")]
        if behaviour == "fails":
            return self.send_error(500)
        if behaviour == "corrupts":
            body = body[:-1] + bytes([body[-1] ^ 1])
        start = 0
        if wanted and behaviour == "ranges":
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        if start >= len(body):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        incomplete = behaviour in ("stalls", "truncates")
        self.wfile.write(body[start : len(body) // 2] if incomplete else body[start:])
        if behaviour == "stalls":
            self.server.closing.wait(5)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def server(archives, folder, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(_mnist, "TIMEOUT", 0.5)
    monkeypatch.setattr(_mnist, "MD5", {name: hashlib.md5(gz).hexdigest() for name, gz in archives.items()})
    with Mirrors(archives) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.closing.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def mirrors(server, monkeypatch):
    return lambda *behaviours: monkeypatch.setattr(_mnist, "MIRRORS", server.urls(*behaviours))


def in_folder(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("bad", ["", "fails", "stalls", "truncates", "corrupts", "fails truncates corrupts"])
@pytest.mark.parametrize("good", ["whole", "ranges"])
def test_the_first_mirror_that_delivers_is_enough(bad, good, mirrors, folder, archives, digits):
    mirrors(*bad.split(), good)
    assert_holds(load_mnist_dataset(), digits)
    assert in_folder(folder) == {f"{IMAGES}.gz", f"{LABELS}.gz"}
    assert (folder / f"{IMAGES}.gz").read_bytes() == archives[IMAGES]


def test_what_has_been_downloaded_is_not_asked_for_again(server, mirrors, digits):
    mirrors("whole")
    load_mnist_dataset()
    assert_holds(load_mnist_dataset(), digits)
    assert [name for _, name, _ in server.requests] == [IMAGES, LABELS]


@pytest.mark.parametrize("bad", ["fails", "stalls", "truncates", "corrupts"])
def test_without_a_good_mirror_the_error_says_what_to_do_and_no_file_is_left(bad, server, mirrors, folder):
    mirrors(bad, "fails")
    with pytest.raises(OSError) as error:
        load_mnist_dataset()
    for word in (str(folder), IMAGES, LABELS, *server.urls(bad, "fails"), "load_one_batch_mnist"):
        assert word in str(error.value)
    assert in_folder(folder) <= {f"{IMAGES}.gz.part"}


def test_an_interrupted_download_goes_on_where_it_stopped(server, mirrors, folder, archives, digits):
    mirrors("truncates")
    with pytest.raises(OSError):
        load_mnist_dataset()
    have = (folder / f"{IMAGES}.gz.part").stat().st_size
    assert 0 < have < len(archives[IMAGES])
    mirrors("ranges")
    assert_holds(load_mnist_dataset(), digits)
    assert server.requests == [
        ("truncates", IMAGES, None),
        ("ranges", IMAGES, f"bytes={have}-"),
        ("ranges", LABELS, None),
    ]


def test_bytes_of_a_bad_mirror_do_not_spoil_a_good_one(server, mirrors, folder, digits):
    folder.mkdir(parents=True)
    (folder / f"{IMAGES}.gz.part").write_bytes(b"not a digit")
    mirrors("ranges")
    assert_holds(load_mnist_dataset(), digits)
    assert [wanted for _, name, wanted in server.requests if name == IMAGES] == ["bytes=11-", None]


def test_a_download_that_lacked_only_its_last_step_is_finished(server, mirrors, folder, archives, digits):
    folder.mkdir(parents=True)
    (folder / f"{IMAGES}.gz.part").write_bytes(archives[IMAGES])
    mirrors("ranges")
    assert_holds(load_mnist_dataset(), digits)
    assert [name for _, name, _ in server.requests] == [IMAGES, LABELS]


def test_a_stalled_download_is_given_up_once_a_mirror(server, mirrors):
    mirrors("stalls", "stalls")
    with pytest.raises(OSError):
        load_mnist_dataset()
    assert len(server.requests) == 2


@pytest.mark.parametrize("terminal", [True, False])
def test_a_progress_bar_is_shown_on_a_terminal_and_nowhere_else(terminal, mirrors, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    mirrors("whole")
    load_mnist_dataset()
    assert (f"{IMAGES}.gz: 100%" in capsys.readouterr().err) == terminal


@pytest.mark.parametrize("missing", ["pooch", "tqdm"])
def test_a_download_without_its_packages_names_them_and_the_folder(missing, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModuleNotFoundError) as error:
        get_mnist_dataloader()
    assert "pip install pooch tqdm" in str(error.value) and str(folder) in str(error.value)


# the reference diagonal


def dense_ggn_diagonal(X, y, model, loss_function):
    params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def output(*values):
        return functional_call(model, dict(zip(params, values, strict=True)), X)

    f = output(*params.values())
    J = torch.cat([j.flatten(f.dim()).flatten(0, -2) for j in jacobian(output, tuple(params.values()))], 1)
    H = hessian(lambda f: loss_function(f, y), f.detach()).reshape(f.numel(), f.numel())
    return (J.T @ H @ J).diagonal()


def mlp():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def frozen():
    model = mlp()
    model[0].bias.requires_grad_(False)
    return model


def with_unused():
    model = mlp()
    model.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    return model


@pytest.mark.parametrize("make_model", [mlp, frozen, with_unused])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("make_loss", [nn.CrossEntropyLoss, nn.MSELoss, nn.L1Loss])
def test_the_reference_is_the_diagonal_of_the_dense_matrix(make_model, make_loss, reduction):
    torch.manual_seed(0)
    model, X, loss = make_model(), torch.randn(5, 3, dtype=torch.float64), make_loss(reduction=reduction)
    y = torch.randn(5, 2, dtype=torch.float64)
    if make_loss is nn.CrossEntropyLoss:
        y = y.argmax(1)
    expected = dense_ggn_diagonal(X, y, model, loss)
    assert_close(autograd_diag_ggn_exact(X, y, model, loss), expected)
    assert_close(autograd_diag_ggn_exact(X, y, model, loss, idx=[6, 0, 6]), expected[[6, 0, 6]])


def test_the_reference_sees_every_position_of_a_convolution():
    torch.manual_seed(0)
    model = nn.Conv1d(1, 2, 2).double()
    X, y = torch.randn(3, 1, 4, dtype=torch.float64), torch.randint(2, (3, 3))
    diagonal = autograd_diag_ggn_exact(X, y, model, nn.CrossEntropyLoss())
    assert_close(diagonal, dense_ggn_diagonal(X, y, model, nn.CrossEntropyLoss()))
    assert not diagonal.requires_grad
