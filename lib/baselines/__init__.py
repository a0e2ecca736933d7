"""Rival methods that the papers compare against, one file each."""
