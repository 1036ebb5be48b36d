"""A save that fails leaves the old file and nothing else."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sparsecnn.storage import load, save, save_load


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def models() -> tuple[nn.Module, nn.Module]:
    return nn.Linear(4, 4), nn.Linear(300, 300)


@pytest.mark.parametrize("step", ["save_file", "_sync", "os.replace", "os.chmod"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("existing", [True, False])
def test_failure_at_every_step(
    path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException, existing: bool
) -> None:
    old, new = models()
    if existing:
        save(old, path)
    before = path.read_bytes() if existing else b""
    real = save_load.save_file

    def fail(*args: object, **kwargs: object) -> None:
        if step == "save_file":  # half of the file is on the disk
            real(*args, **kwargs)  # type: ignore[arg-type]
            os.truncate(args[1], 1000)  # type: ignore[arg-type]
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(f"sparsecnn.storage.save_load.{step}", fail)
        with pytest.raises(type(error)):
            save(new, path)
    assert [p.name for p in path.parent.iterdir()] == ([path.name] if existing else [])
    if existing:
        assert path.read_bytes() == before
    save(new, path)
    assert torch.equal(load(path).weight, new.weight)


def test_a_full_disk(path: Path) -> None:
    """The real writer against a limit on the size of files."""
    old, _ = models()
    save(old, path)
    before = path.read_bytes()
    code = (
        "import resource, signal, sys; from torch import nn; from sparsecnn.storage import save\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000))\n"
        "try: save(nn.Linear(300, 300), sys.argv[1])\n"
        "except OSError as e: print('refused', e)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.startswith("refused save: could not write"), done
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert path.read_bytes() == before


def test_a_model_that_cannot_be_stored_leaves_the_old_file(path: Path) -> None:
    save(nn.Linear(4, 4), path)
    before = path.read_bytes()
    with pytest.raises(ValueError):
        save(nn.Linear(4, 4, dtype=torch.complex64), path)
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1


def test_where_a_file_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="existing folder"):
        save(nn.Linear(2, 2), tmp_path / "none" / "x")
    with pytest.raises(IsADirectoryError):
        save(nn.Linear(2, 2), tmp_path)
    with pytest.raises(TypeError):
        save(nn.Linear(2, 2), None)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_links_and_permissions(path: Path) -> None:
    """A link stays a link; permissions are those of the file replaced, else the umask's."""
    old = os.umask(0o027)
    try:
        save(nn.Linear(2, 2), path)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    path.chmod(0o604)
    link = path.with_name("link")
    link.symlink_to(path.name)
    model = nn.Linear(3, 3)
    save(model, str(link))
    assert link.is_symlink() and stat.S_IMODE(path.stat().st_mode) == 0o604
    assert torch.equal(load(path).weight, model.weight)


def test_saving_over_the_file_a_model_came_from(path: Path) -> None:
    save(nn.Linear(3, 3), path)
    model = load(path)
    for _ in range(3):
        save(model, path)
        model = load(path, model)
    assert len(list(path.parent.iterdir())) == 1


def test_saving_is_reproducible(path: Path) -> None:
    model = models()[1]
    save(model, path)
    first = path.read_bytes()
    save(model, path)
    assert path.read_bytes() == first
