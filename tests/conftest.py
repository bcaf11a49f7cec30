"""What holds for every test: exactness is tested, speed is not, so no property test has a deadline."""

from hypothesis import settings

settings.register_profile("onebase", deadline=None)


def pytest_configure() -> None:
    """Later than the plugins, one of which loads a profile of its own."""
    settings.load_profile("onebase")
