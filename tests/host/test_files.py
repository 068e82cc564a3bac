"""Files are found by the name that a workflow stores, on every system, and never outside of the host's folders."""

import os

import folder_paths
import pytest

from concept_nodes.host import files


@pytest.fixture
def loras(tmp_path, monkeypatch):
    folder = tmp_path / "loras"
    for name in ("size.safetensors", "people/age.safetensors", "people/Smile.safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x" * 10)
    (tmp_path / "secret.safetensors").write_bytes(b"secret")
    extensions = folder_paths.folder_names_and_paths["loras"][1]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(folder)], extensions))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return folder


@pytest.mark.parametrize("name", ["size.safetensors", "people/age.safetensors", "people\\age.safetensors"])
def test_either_slash(loras, name):
    assert files.resolve("loras", name) == loras / name.replace("\\", "/")


def test_names_have_forward_slashes(loras):
    assert sorted(files.names("loras")) == ["people/Smile.safetensors", "people/age.safetensors", "size.safetensors"]


@pytest.mark.parametrize(
    "name, offered",
    [
        ("age.safetensors", "people/age.safetensors"),
        ("old folder/age.safetensors", "people/age.safetensors"),
        ("people/smile.safetensors", "people/Smile.safetensors"),
        ("people/agee.safetensors", "people/age.safetensors"),
        ("C:\\LORAS\\size.safetensors", "size.safetensors"),
    ],
)
def test_near_matches_are_offered(loras, name, offered):
    with pytest.raises(files.MissingFile) as error:
        files.resolve("loras", name)
    assert f"'{name}'" in str(error.value)
    assert f"'{offered}'" in str(error.value)


def test_nothing_is_offered_where_nothing_is_near(loras):
    with pytest.raises(files.MissingFile) as error:
        files.resolve("loras", "zzzzzzzz.bin")
    assert "Did you mean" not in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "people/../../secret.safetensors",
        "/etc/passwd",
        "..\\secret.safetensors",
        "",
        ".",
    ],
)
def test_no_way_out_of_the_folders(loras, name):
    with pytest.raises(files.MissingFile):
        files.resolve("loras", name)


def test_fingerprint_follows_the_content(loras):
    first = files.fingerprint("loras", "size.safetensors")
    assert files.fingerprint("loras", "size.safetensors") == first
    (loras / "size.safetensors").write_bytes(b"y" * 10)
    os.utime(loras / "size.safetensors", (1, 1))
    assert files.fingerprint("loras", "size.safetensors") != first
    (loras / "size.safetensors").unlink()
    folder_paths.filename_list_cache.clear()
    assert "missing" in files.fingerprint("loras", "size.safetensors")
