"""What holds for every test: exactness is tested, speed is not, so no property test has a deadline."""

from hypothesis import settings

settings.register_profile("onebase")
settings.load_profile("onebase")
