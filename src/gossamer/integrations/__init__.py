"""Callbacks for training frameworks; each is imported on its own, and only where it is used."""
