"""Settings of every test: hypothesis judges results, not how long a busy machine took; waiting threads do not spin."""

import os

from hypothesis import settings

# Read by OpenMP when torch is imported. Spinning threads make tests ten times slower where something else runs too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
