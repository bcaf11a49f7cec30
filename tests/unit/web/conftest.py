"""One server for the tests of HTTP that leave it as it was."""

import pytest

from web import running, speaking_folder, text_base


@pytest.fixture(scope="session")
def talkers(tmp_path_factory):
    """(base, adapters folder, adapters by name)."""
    base, folder = text_base(), tmp_path_factory.mktemp("talkers")
    return base, folder, speaking_folder(folder, base)


@pytest.fixture(scope="module")
def site(talkers):
    base, folder, _ = talkers
    with running(base, folder) as one:
        yield one
