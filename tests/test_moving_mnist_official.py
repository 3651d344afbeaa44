"""The official file: split, checks and download, on small stand-ins and a server on this machine."""

import hashlib
import io
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest

from fastjepa.moving_mnist.official import MNIST_TEST_SEQ, DownloadError, SequenceFile, download, load_official

SEQUENCES = np.random.default_rng(0).integers(0, 256, (6, 10, 8, 8), np.uint8)  # (T, N, H, W)


def npy_bytes(array: np.ndarray, allow_pickle: bool = False) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=allow_pickle)
    return file.getvalue()


CONTENT = npy_bytes(SEQUENCES)
STAND_IN = SequenceFile(
    url="http://127.0.0.1:9/folder/mnist_test_seq.npy",
    md5=hashlib.md5(CONTENT).hexdigest(),
    n_frames=6,
    n_sequences=10,
    size=8,
    n_validation=3,
)


@contextmanager
def served(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[SequenceFile]:
    """STAND_IN at the address of a local server that answers a GET with `answer`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield replace(STAND_IN, url=f"http://127.0.0.1:{server.server_port}/mnist_test_seq.npy")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def sends(content: bytes, announced: int | None = None, status: int = 200) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        if announced is not None:
            handler.send_header("Content-Length", str(announced))
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def test_the_published_file_is_described_as_published() -> None:
    assert MNIST_TEST_SEQ.shape == (20, 10_000, 64, 64)
    assert MNIST_TEST_SEQ.name == "mnist_test_seq.npy"
    assert MNIST_TEST_SEQ.md5 == "be083ec986bfe91a449d63653c411eb2"


def test_split_is_the_original_one(tmp_path: Path) -> None:
    path = tmp_path / "any name"
    path.write_bytes(CONTENT)
    train, validation = load_official(path, tmp_path / "unused", STAND_IN)
    # As the original does it: shuffle whole sequences, cut, then halve each by a reshape.
    shuffled = np.random.RandomState(2025).permutation(SEQUENCES.swapaxes(0, 1))
    np.testing.assert_array_equal(validation, shuffled[:3].reshape(6, 3, 8, 8))
    np.testing.assert_array_equal(train, shuffled[3:].reshape(14, 3, 8, 8))
    np.testing.assert_array_equal(train[1], shuffled[3, 3:])  # the second half follows the first
    assert train.dtype == validation.dtype == np.uint8
    assert not (tmp_path / "unused").exists()


def test_missing_path_is_an_error_and_not_a_download(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data_path: there is no file .*mnist_test_seq\.npy, from http"):
        load_official(tmp_path / "missing.npy", tmp_path, STAND_IN)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a complete .npy file"),
        (CONTENT[:60], "not a complete .npy file"),
        (CONTENT[:-1], "not a complete .npy file"),
        (CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]), "its md5 is"),
        (CONTENT + b"x", "its md5 is"),
        (npy_bytes(SEQUENCES.astype(np.float32)), r"it holds float32 \(6, 10, 8, 8\), expected uint8"),
        (npy_bytes(SEQUENCES.swapaxes(0, 1)), r"it holds uint8 \(10, 6, 8, 8\), expected uint8 \(6, 10, 8, 8\)"),
        (npy_bytes(np.array([{}]), allow_pickle=True), "not a complete .npy file of plain numbers"),
    ],
)
@pytest.mark.parametrize("cached", [True, False])
def test_another_file_is_refused_and_kept(tmp_path: Path, content: bytes, message: str, cached: bool) -> None:
    path = tmp_path / "mnist_test_seq.npy"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_official(None if cached else path, tmp_path, STAND_IN)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == content


def test_a_stand_in_has_no_md5(tmp_path: Path) -> None:
    path = tmp_path / "other.npy"
    path.write_bytes(npy_bytes(255 - SEQUENCES))
    train, _ = load_official(path, tmp_path, replace(STAND_IN, md5=None))
    assert train.shape == (14, 3, 8, 8)


@pytest.mark.packages("tqdm")
@pytest.mark.parametrize("announced", [len(CONTENT), None])
def test_download_once_with_progress(tmp_path: Path, announced: int | None, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "folder"
    with served(sends(CONTENT, announced)) as file:
        first = load_official(None, folder, file)
    assert "mnist_test_seq.npy" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["mnist_test_seq.npy"]
    assert (folder / "mnist_test_seq.npy").read_bytes() == CONTENT
    second = load_official(None, folder, file)  # the server is gone
    np.testing.assert_array_equal(first[0], second[0])


def test_download_without_a_progress_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with served(sends(CONTENT, len(CONTENT))) as file:
        download(file, tmp_path / "file.npy")
    assert (tmp_path / "file.npy").read_bytes() == CONTENT
    assert capsys.readouterr().err == ""


def test_download_from_a_file_address(tmp_path: Path) -> None:
    source = tmp_path / "mnist_test_seq.npy"
    source.write_bytes(CONTENT)
    download(replace(STAND_IN, url=source.as_uri()), tmp_path / "copy.npy")
    assert (tmp_path / "copy.npy").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (sends(CONTENT[:-1] + b"?", len(CONTENT)), "gave a file with md5 [0-9a-f]{32}, expected"),
        (sends(CONTENT[:100], len(CONTENT)), "could not download"),  # announced more than it sent
        (sends(CONTENT[:100]), "gave a file with md5"),  # closed early, length not announced
        (sends(CONTENT + bytes(1000), len(CONTENT) + 1000), "longer than the file"),
        (sends(b"not here", 8, status=404), "HTTP Error 404"),
        (lambda handler: handler.wfile.write(b"no http at all\r\n"), "could not download"),
        (lambda handler: None, "could not download"),
    ],
)
def test_failed_download_says_what_to_do_and_leaves_nothing(
    tmp_path: Path, answer: Callable[[BaseHTTPRequestHandler], None], message: str
) -> None:
    with served(answer) as file, pytest.raises(DownloadError, match=message) as caught:
        load_official(None, tmp_path, file)
    text = str(caught.value)
    for part in (file.url, f"md5 {STAND_IN.md5}", f"put it at {tmp_path / 'mnist_test_seq.npy'}", "--data_path"):
        assert part in text
    assert not list(tmp_path.iterdir())


def test_no_server_says_what_to_do(tmp_path: Path) -> None:
    with socket.socket() as taken:  # bound and not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        file = replace(STAND_IN, url=f"http://127.0.0.1:{taken.getsockname()[1]}/mnist_test_seq.npy")
        with pytest.raises(
            DownloadError, match=r"(?s)could not download .*Download mnist_test_seq\.npy from .* put it at"
        ):
            load_official(None, tmp_path, file)
    assert not list(tmp_path.iterdir())


def test_interrupted_download_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tqdm.tqdm.update", interrupt)
    with served(sends(CONTENT, len(CONTENT))) as file, pytest.raises(KeyboardInterrupt):
        load_official(None, tmp_path, file)
    assert not list(tmp_path.iterdir())


def test_unusable_cache_folder_names_the_option(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="--cache_dir"):
        load_official(None, tmp_path / "file" / "below", STAND_IN)
