"""The one source of the version; pyproject.toml and ``swaa_flex.__version__`` read it."""

__version__ = "0.1.0"
