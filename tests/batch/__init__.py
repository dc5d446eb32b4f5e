"""Tests of the batch chain."""
