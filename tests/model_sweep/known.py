"""Classes whose result is neither equal nor eager's own, each with its reason. A class that leaves its line here fails the
sweep's test, and so does one that joins without one."""

# class name -> (status, a part of the reason that the sweep gives, why it stands)
KNOWN: dict[str, tuple[str, str, str]] = {}
