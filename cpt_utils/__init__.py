"""Shared plumbing of the experiment scripts: model loading, parameter names, hooks, data, files, figures."""

__version__ = "0.1.0"
