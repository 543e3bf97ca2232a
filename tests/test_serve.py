"""The server of the page on serving, as it stands there, asked by a client over HTTP."""

import http.client
import os
import re
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparseflax

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "serve.md"
SERVER, = re.findall(r'^```python title="server.py"\n(.*?)^```$', PAGE.read_text(), re.MULTILINE | re.DOTALL)


def network(x):
    return sparseflax.sparse_conv(x, KERNEL, activation="relu").mean((1, 2))


WEIGHTS = jax.random.normal(jax.random.key(0), (3, 3, 64, 8))
KERNEL = sparseflax.pack(jnp.where(jnp.abs(WEIGHTS) > 1.5, WEIGHTS, 0.0))


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    """Where the server listens."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "server.py").write_text(SERVER)
    (folder / "net.program").write_bytes(sparseflax.export(network, jnp.ones((1, 28, 28, 64)), any_batch=True))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", "uvicorn", "server:app", "--port", str(port), "--log-level", "warning"],
                              cwd=folder, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None, "the server ended"
            time.sleep(0.2)
        yield port
    finally:
        server.terminate()
        server.wait(timeout=30)


def ask(port, body):
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request("POST", "/predict", body)
        response = connection.getresponse()
        return response.status, response.read()


def test_it_is_short():
    assert len(SERVER.splitlines()) <= 40


def test_answers_are_right_whoever_else_asks(port):
    def one(n):
        x = np.random.default_rng(n).standard_normal((1 + n % 16, 28, 28, 64), np.float32)
        status, answer = ask(port, x.tobytes())
        return status, np.frombuffer(answer, "<f4").reshape(len(x), 8), x

    with ThreadPoolExecutor(8) as pool:
        for status, answer, x in pool.map(one, range(24)):
            assert status == 200
            np.testing.assert_allclose(answer, jax.jit(network)(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("size, status", [(0, 400), (3, 400), (4 * 28 * 28 * 64 * 17, 413)])
def test_bad_requests(port, size, status):
    assert ask(port, bytes(size))[0] == status
