"""Input validation: what users pass is checked here, once, and becomes a ``Problem``."""
