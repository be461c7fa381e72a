"""save() and load(): checkpoint files that are whole, or an error that says so."""

import fcntl
import os
import re
import stat
import zipfile
from collections import OrderedDict

import pytest
import torch
from pair import make_params

import sgdr_fused
from sgdr_fused import FusedSGDR, load, save
from sgdr_fused.saving import remove_unfinished


@pytest.fixture
def path(tmp_path):
    """Where a checkpoint is, or is to be."""
    return tmp_path / "checkpoint.pt"


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_saved_checkpoint_loads(path):
    params = make_params([5, (2, 3)])
    optimizer = FusedSGDR(params, lr=0.1, momentum=0.9, T_0=3, ema_decay=0.9)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    state = {
        "optimizer": optimizer.state_dict(),
        "other": [1, 2.5, "text", None, True, (3, torch.float16), OrderedDict(a=torch.ones(2))],
    }
    save(state, path)
    loaded = load(path)
    assert loaded["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]
    for index, of_param in state["optimizer"]["state"].items():
        for name, value in of_param.items():
            assert torch.equal(loaded["optimizer"]["state"][index][name], value)
    assert torch.equal(loaded["other"].pop()["a"], torch.ones(2))
    assert loaded["other"] == state["other"][:-1]


def test_torch_load_and_unzip_read_the_file_too(path):
    save({"a": torch.arange(1000)}, path)
    for options in ({}, {"mmap": True}, {"weights_only": False}):
        assert torch.equal(torch.load(path, **options)["a"], torch.arange(1000))
    with path.open("rb") as file:
        assert torch.equal(torch.load(file)["a"], torch.arange(1000))
    assert zipfile.ZipFile(path).testzip() is None


def test_file_of_torch_save_loads(path):
    """It has no checksum."""
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        torch.save({"a": torch.arange(3)}, path, **options)
        assert torch.equal(load(path)["a"], torch.arange(3))


def test_tensors_load_to_another_device(path):
    save({"a": torch.ones(3)}, str(path))
    assert load(str(path), map_location="meta")["a"].is_meta


# ------------------------------------------------------------------------------------------ damage


def assert_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load(path)


def test_any_flipped_bit_is_noticed(path):
    """torch.load() reads other numbers from such a file, without a word."""
    save({"a": torch.randn(50)}, path)
    whole = path.read_bytes()
    for i in range(0, len(whole), 3):
        assert_refused(path, whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :])


def test_file_that_was_cut_is_noticed(path):
    save({"a": torch.randn(50)}, path)
    whole = path.read_bytes()
    for length in (*range(0, len(whole), 50), *range(len(whole) - 100, len(whole))):
        assert_refused(path, whole[:length])
    assert_refused(path, whole + b"\0")


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"\x80\x02K\x01.", b"\0" * 1000, b"PK\3\4" + b"x" * 100, bytes(range(256)) * 9],
    ids=["empty", "text", "pickle", "zeros", "half_a_zip", "noise"],
)
def test_foreign_file_is_an_error_that_names_it(path, content):
    assert_refused(path, content)


def test_file_that_does_not_exist_is_named(path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
        load(path)


class RunsCode:
    """An object whose unpickling makes a folder."""

    def __init__(self, made):
        self.made = made

    def __reduce__(self):
        return os.mkdir, (self.made,)


def test_code_in_a_file_is_never_run(path, tmp_path):
    torch.save({"a": RunsCode(str(tmp_path / "made"))}, path)
    with pytest.raises(
        ValueError, match=r"GLOBAL posix.mkdir whose module posix is blocked"
    ) as refusal:
        load(path)
    assert "set to `False`" not in str(refusal.value)
    assert not (tmp_path / "made").exists()


def test_what_load_would_refuse_is_refused_by_save(path):
    """Otherwise the training runs for days, and its checkpoint cannot be loaded."""
    save({"a": 1}, path)
    with pytest.raises(TypeError, match=r"cannot save to .*checkpoint.pt.*GLOBAL posix.mkdir"):
        save({"a": RunsCode(path.name)}, path)
    assert load(path) == {"a": 1}
    assert names_in(path.parent) == ["checkpoint.pt"]


# ------------------------------------------------------------------------------------------ writing


def test_file_is_on_the_disk_before_it_gets_its_name(path, monkeypatch):
    """And the folder's list of names after that: otherwise a power cut loses both versions."""
    calls = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor):
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        calls.append("fsync of the folder" if is_folder else "fsync of the file")
        fsync(descriptor)

    def note_replace(old, new):
        calls.append("rename")
        assert load(old) == {"a": 1}
        replace(old, new)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    save({"a": 1}, path)
    assert calls == ["fsync of the file", "rename", "fsync of the folder"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_failed_save_keeps_the_previous_file(path, monkeypatch, failing):
    save({"a": 1}, path)

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="no space left"):
        save({"a": 2}, path)
    assert load(path) == {"a": 1}
    assert names_in(path.parent) == ["checkpoint.pt"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_mode_of_the_file_follows_the_umask(path, umask, mode):
    """A file that nobody else can read is of no use to the group that shares the folder."""
    before = os.umask(umask)
    try:
        save({"a": 1}, path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_link_stays_a_link(path, tmp_path):
    (tmp_path / "latest.pt").symlink_to(path)
    save({"a": 1}, tmp_path / "latest.pt")
    assert (tmp_path / "latest.pt").is_symlink()
    assert load(path) == {"a": 1}


def test_save_removes_what_a_killed_save_of_the_file_has_left(path, tmp_path):
    for name in (".writing-checkpoint.pt-0123abcd", ".writing-other.pt-0123abcd", "notes"):
        (tmp_path / name).touch()
    save({"a": 1}, path)
    assert names_in(tmp_path) == [".writing-other.pt-0123abcd", "checkpoint.pt", "notes"]


def test_file_that_a_living_process_writes_is_not_removed(tmp_path):
    unfinished = tmp_path / ".writing-checkpoint.pt-0123abcd"
    with unfinished.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        remove_unfinished(tmp_path)
        assert unfinished.exists()
    remove_unfinished(tmp_path)
    assert not unfinished.exists()


def test_new_file_that_another_process_took_for_a_left_one_is_written_anew(path, monkeypatch):
    """It came between the making of the file and its lock."""
    flock, removed = fcntl.flock, []

    def flock_too_late(file, how):
        if not removed:
            removed.append(file.name)
            os.unlink(file.name)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", flock_too_late)
    save({"a": 1}, path)
    assert removed
    assert load(path) == {"a": 1}


def test_file_system_without_locks_is_no_error(path, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    (tmp_path / ".writing-checkpoint.pt-0123abcd").touch()
    save({"a": 1}, path)
    assert load(path) == {"a": 1}
    assert (tmp_path / ".writing-checkpoint.pt-0123abcd").exists()


def test_save_and_load_are_of_the_package():
    assert {"load", "save"} <= set(sgdr_fused.__all__)
