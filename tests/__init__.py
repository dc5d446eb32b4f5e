"""Tests of Headrace: against real processes on loopback ports, never against doubles of our own code."""
