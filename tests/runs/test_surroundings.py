"""The state of git is told where there is one, and its absence is no fault."""

import subprocess

import pytest

from qwen_vl_lora.runs.surroundings import git_state


@pytest.fixture
def repository(tmp_path):
    def git(*arguments):
        who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    git("init")
    (tmp_path / "tracked").write_text("one")
    git("add", ".")
    git("commit", "-m", "first")
    git("remote", "add", "origin", "https://user:hunter2@example.org/a.git")
    return tmp_path


def test_a_clean_tree_is_told_by_its_commit_and_no_token_of_the_remote(repository):
    state = git_state(repository)
    assert len(state["commit"]) == 40
    assert state["dirty"] is False
    assert state["remote"] == "https://***@example.org/a.git"


@pytest.mark.parametrize("name", ["tracked", "new"])
def test_a_changed_or_a_new_file_makes_the_tree_dirty(repository, name):
    (repository / name).write_text("two")
    assert git_state(repository)["dirty"] is True


def test_without_a_repository_or_without_git_nothing_is_told(tmp_path, monkeypatch):
    assert git_state(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(tmp_path) is None


def test_a_repository_without_a_commit_tells_nothing(tmp_path):
    subprocess.run(["git", "init", str(tmp_path)], check=True, capture_output=True)
    assert git_state(tmp_path) is None
