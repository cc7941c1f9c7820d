"""Warnings of libraries are kept in the run's folder, off the console."""

import logging
import warnings

import datasets  # noqa: F401
import pytest
import torch  # noqa: F401
import transformers  # noqa: F401

from lowrank_cli.runs import Run
from lowrank_cli.runs.library_warnings import FILE, library_warnings


@pytest.fixture
def run(tmp_path):
    return Run.create(tmp_path / "outputs", stage="train", config={}, choices={}, overrides=[], command="lrk train")


@pytest.fixture
def shown():
    """Warnings are shown, as outside of tests, where they are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        yield


@pytest.mark.parametrize("name", ["a.library", "transformers", "datasets", "torch", "torch._dynamo"])
def test_what_is_logged_goes_into_the_folder_once(run, name, capfd):
    logger = logging.getLogger(name)
    with library_warnings(run):
        for _ in range(2):
            logger.warning("this name is old")
        logger.info("not a warning")
    assert (run.path / FILE).read_text().count("this name is old") == 1
    assert "not a warning" not in (run.path / FILE).read_text()
    assert capfd.readouterr().err == ""


def test_pythons_warnings_go_there_too(run, shown, capfd):
    with library_warnings(run):
        warnings.warn("that argument is going away", FutureWarning, stacklevel=1)
    assert "that argument is going away" in (run.path / FILE).read_text()
    assert capfd.readouterr().err == ""


def test_without_warnings_there_is_no_file(run):
    with library_warnings(run):
        pass
    assert not (run.path / FILE).exists()


def test_afterwards_everything_is_as_before(run):
    before, shows = logging.getLogger("transformers").handlers, warnings.showwarning
    with pytest.raises(ValueError, match="stop"), library_warnings(run):
        raise ValueError("stop")
    assert logging.getLogger("transformers").handlers is before and warnings.showwarning is shows
    logging.getLogger("a.library").warning("seen")
    assert not (run.path / FILE).exists()


def test_only_the_process_that_writes_the_folder_writes_the_file(run):
    with library_warnings(Run.open(run.path, writes=False)):
        logging.getLogger("a.library").warning("this name is old")
    assert not (run.path / FILE).exists()
